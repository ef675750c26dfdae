"""What training scripts save: states nested under other entries, names wrapped by DDP and torch.compile."""

import argparse
import types

import pytest
import torch

from spectralbasis.checkpoints import open_checkpoint
from spectralbasis.errors import InputError

STATE = {"a.weight": torch.eye(3), "a.bias": torch.zeros(3)}
OTHER = {"a.weight": torch.zeros(3, 3), "a.bias": torch.ones(3)}


def read(saved, tmp_path):
    torch.save(saved, tmp_path / "run.pt")
    checkpoint = open_checkpoint(tmp_path / "run.pt")
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "key", ["model", "state_dict", "model_state_dict", "net", "teacher", "encoder", "weights_of_mine"]
)
def test_nested_state(key, tmp_path):
    optimizer = {"state": {0: {"exp_avg": torch.ones(3, 3)}}, "param_groups": []}
    assert same(read({"epoch": 3, "loss": 0.5, key: STATE, "optimizer": optimizer}, tmp_path), STATE)


def test_nested_twice(tmp_path):
    assert same(read({"model": {"state_dict": STATE}}, tmp_path), STATE)


def test_scalar_tensors_beside_the_state_do_not_hide_it(tmp_path):
    assert same(read({"loss": torch.tensor(0.5), "model": STATE}, tmp_path), STATE)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_are_removed(prefix, tmp_path):
    assert same(read({prefix + name: tensor for name, tensor in STATE.items()}, tmp_path), STATE)


def test_a_prefix_of_some_names_only_stays(tmp_path):
    state = {"module.a.weight": torch.eye(2), "b.weight": torch.eye(2)}
    assert read(state, tmp_path).keys() == state.keys()


def test_teacher_is_preferred_to_student(tmp_path):
    assert same(read({"student": OTHER, "teacher": STATE}, tmp_path), STATE)


def test_several_unknown_states_are_asked_about(tmp_path):
    with pytest.raises(InputError, match=r"several sets of weights.*'left', 'right'.*state_dict"):
        read({"left": STATE, "right": OTHER}, tmp_path)


@pytest.mark.parametrize("first", [{}, {"w": torch.eye(2)}])
def test_a_mapping_that_contains_itself_ends(first, tmp_path):
    state = dict(first)
    state["model"] = state
    if first:
        assert read(state, tmp_path).keys() == first.keys()
    else:
        with pytest.raises(InputError, match="no tensors"):
            read(state, tmp_path)


def test_nested_mapping_in_memory():
    assert open_checkpoint({"model": STATE, "epoch": 1}).names() == tuple(STATE)


def test_an_encoder_beside_its_decoder_is_asked_about(tmp_path):
    with pytest.raises(InputError, match=r"several sets of weights.*'encoder', 'decoder'"):
        read({"encoder": STATE, "decoder": OTHER}, tmp_path)


def test_parsed_arguments_beside_the_weights(tmp_path):
    arguments = argparse.Namespace(lr=0.1, betas=[0.9, 0.98], output="runs", inner=argparse.Namespace(depth=12))
    assert same(read({"model": STATE, "args": arguments}, tmp_path), STATE)


def test_other_objects_beside_the_weights_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"refused.*types\.SimpleNamespace.*safetensors"):
        read({"model": STATE, "args": types.SimpleNamespace(lr=0.1)}, tmp_path)
