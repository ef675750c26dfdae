"""What training scripts save: nested states, names wrapped by DDP, FSDP and torch.compile, adapters not merged."""

import argparse
import copy
import json
import types

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn

import spectralbasis as sb
from spectralbasis.checkpoints import match_matrices, open_checkpoint
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


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module._fsdp_wrapped_module.", "module." * 3],
)
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


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_wrappers_within_names_pair_with_the_plain_model(wrapper, suffix, tmp_path):
    state = {f"model.layers.{i}.mlp.weight": torch.randn(4, 3) for i in range(2)}
    wrapped = {name.replace(".mlp", f".{wrapper}.mlp"): tensor + 1 for name, tensor in state.items()}
    save = torch.save if suffix == "pt" else save_file
    save(wrapped, tmp_path / f"run.{suffix}")
    matching = match_matrices(open_checkpoint(state), open_checkpoint(tmp_path / f"run.{suffix}"))
    assert [ours.name for ours, _ in matching.pairs] == ["layers.0.mlp", "layers.1.mlp"]
    assert not matching.skipped
    assert all(torch.equal(theirs.read(), ours.read() + 1) for ours, theirs in matching.pairs)


def test_deepspeeds_states_of_the_model_are_read(tmp_path):
    saved = {"module": STATE, "param_shapes": [{"a.weight": torch.Size([3, 3])}], "optimizer": None, "dp_world_size": 2}
    torch.save(saved, tmp_path / "mp_rank_00_model_states.pt")
    assert set(open_checkpoint(tmp_path / "mp_rank_00_model_states.pt").names()) == set(STATE)
    torch.save(saved, tmp_path / "mp_rank_01_model_states.pt")
    for path in (tmp_path, tmp_path / "mp_rank_00_model_states.pt"):
        with pytest.raises(InputError, match=r"over several devices.*convert"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.weight": torch.empty(0), "b.weight": torch.ones(3)}, r"a\.weight has the shape \(0,\).*zero_to_fp32"),
        ({"_fsdp_wrapped_module._flat_param": torch.ones(9)}, r"flattened parameters.*FULL_STATE_DICT"),
        ({"layers.0._fpw_module.flat_param_0": torch.ones(9), "b.weight": torch.ones(3)}, r"flattened parameters"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors", ""])
def test_what_sharding_leaves_on_one_rank_is_refused(state, message, suffix, tmp_path):
    source = tmp_path / f"run.{suffix}" if suffix else state
    if suffix:
        (torch.save if suffix == "pt" else save_file)(state, source)
    with pytest.raises(InputError, match=message):
        open_checkpoint(source)


def test_empty_tensors_that_are_no_weights_are_read():
    state = {"a.weight": torch.eye(3), "a.position_ids": torch.empty(0), "b.weight": torch.empty(0, 3)}
    assert open_checkpoint(state).names() == tuple(state)


@pytest.mark.parametrize("name", ["DTensor", "ShardedTensor"])
def test_tensors_that_are_spread_over_processes_are_refused(name):
    kind = type(name, (torch.Tensor,), {})
    with pytest.raises(InputError, match=rf"a\.weight of state_dict is a {name}.*full_state_dict=True"):
        open_checkpoint({"a.weight": torch.eye(3).as_subclass(kind)})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, ids):
        return self.norm(self.second(self.first(self.embed(ids))))


CONFIGS = {
    "LoRA": peft.LoraConfig(target_modules=["first"], init_lora_weights=False),
    "LoRA of a table": peft.LoraConfig(target_modules=["embed"], init_lora_weights=False),
    "LoRA and a head": peft.LoraConfig(target_modules=["first"], modules_to_save=["second"]),
    "LoRA and tokens": peft.LoraConfig(target_modules=["first"], trainable_token_indices={"embed": [1, 2]}),
    "DoRA": peft.LoraConfig(target_modules=["first"], use_dora=True, init_lora_weights=False),
    "SPECTRAL": sb.SpectralConfig(target_modules=["first"], leading=4, init_weights=False),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=["first"], total_step=10),
    "IA3": peft.IA3Config(target_modules=["first"], feedforward_modules=[]),
    "VeRA": peft.VeraConfig(target_modules=["first"], r=4),
    "OFT": peft.OFTConfig(target_modules=["first"], oft_block_size=4),
    "BOFT": peft.BOFTConfig(target_modules=["first"], boft_block_size=4),
    "LoHa": peft.LoHaConfig(target_modules=["first"]),
    "LoKr": peft.LoKrConfig(target_modules=["first"]),
    "FourierFT": peft.FourierFTConfig(target_modules=["first"], n_frequency=9),
    "HRA": peft.HRAConfig(target_modules=["first"]),
    "norms": peft.LNTuningConfig(target_modules=["norm"]),
    "tokens": peft.TrainableTokensConfig(target_modules=["embed"], token_indices=[1]),
}
TWO_PARTS = r"was not merged.*two parts.*merge_and_unload\(\).*save_pretrained"


def unmerged(name):
    return get_peft_model(Net(), copy.deepcopy(CONFIGS[name]))


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "module._orig_mod.", "_fsdp_wrapped_module."])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_that_was_not_merged_is_refused(name, prefix):
    state = unmerged(name).state_dict()
    with pytest.raises(InputError, match=TWO_PARTS):
        open_checkpoint({prefix + key.removeprefix("base_model.model."): tensor for key, tensor in state.items()})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_live_model_with_an_adapter_is_refused_in_the_same_words(name):
    with pytest.raises(InputError, match=TWO_PARTS):
        open_checkpoint(unmerged(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_refusal_says_to_pass_is_read(name):
    state = unmerged(name).merge_and_unload().state_dict()
    assert set(open_checkpoint(state).names()) == set(Net().state_dict())


def save_torch_file(state, folder):
    torch.save({"module": state, "epoch": 3}, folder / "run.pt")
    return folder / "run.pt"


def save_safetensors_file(state, folder):
    save_file(state, folder / "run.safetensors")
    return folder / "run.safetensors"


def save_folder(state, folder):
    save_file(state, folder / "model.safetensors")
    return folder


def save_sharded(state, folder):
    names, half = list(state), len(state) // 2
    parts = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


WAYS = [lambda state, folder: state, save_torch_file, save_safetensors_file, save_folder, save_sharded]


@pytest.mark.parametrize("name", ["LoRA", "SPECTRAL"])
@pytest.mark.parametrize("way", WAYS)
def test_compare_never_answers_for_one_of_two_parts(way, name, tmp_path):
    model = unmerged(name)
    base = model.unload().state_dict()
    state = {key: tensor.clone() for key, tensor in unmerged(name).state_dict().items()}
    state["base_model.model.second.weight"] += 0.1  # trained in full beside the adapter
    with pytest.raises(InputError, match=TWO_PARTS):
        sb.compare(base, [way(state, tmp_path)], leading=2, null=None)


def test_several_adapters_of_one_model_are_refused():
    model = unmerged("LoRA")
    model.add_adapter("other", copy.deepcopy(CONFIGS["LoRA and a head"]))
    with pytest.raises(InputError, match=TWO_PARTS):
        open_checkpoint(model.state_dict())


def test_names_of_an_adapter_that_was_unloaded_are_read_as_they_are():
    state = {name.replace("first.", "first.base_layer."): tensor for name, tensor in Net().state_dict().items()}
    state["first.base_layer.weight"] = state["first.base_layer.weight"] + 1
    pairs = match_matrices(open_checkpoint(Net()), open_checkpoint(state)).pairs
    assert "first" in {ours.name for ours, _ in pairs}


@pytest.mark.parametrize(
    "native",
    [
        ["base_layer.0.weight", "base_layer.1.weight", "level0.0.weight", "fc.weight"],
        ["base.base_layer.0.weight", "base.level0.0.weight"],
        ["prompt_encoder.point_embeddings.0.weight", "prompt_encoder.mask_embed.conv1.weight"],
        ["layers.0.attn.w_lora.lora.0.weight", "layers.0.attn.w_lora.lora.2.weight"],
        ["road_encoder.weight", "spectral_conv.weight", "oft_head.weight"],
    ],
)
def test_names_of_models_that_resemble_those_of_adapters_are_read(native):
    state = {name: torch.randn(4, 4) for name in native}
    assert open_checkpoint(state).names() == tuple(native)


def test_a_live_model_with_a_part_called_base_layer_is_read():
    model = nn.ModuleDict({"base_layer": nn.Sequential(nn.Linear(3, 3)), "fc": nn.Linear(3, 2)})
    assert "fc.weight" in open_checkpoint(model).names()
