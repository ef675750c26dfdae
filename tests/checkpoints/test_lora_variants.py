"""Relatives of LoRA read as PEFT merges them, or are refused with what to do."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from spectralbasis.checkpoints import open_checkpoint
from spectralbasis.errors import InputError
from tests.models import tiny

# PEFT warns of what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*invalid shape", "ignore:.*changes the base", "ignore:Using Rank-Stab")


def start(model_type, folder, **options):
    """A model with a fresh adapter, and its untouched base saved in `folder / base`."""
    base = tiny(model_type)
    base.save_pretrained(folder / "base")
    return get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))


def train(model):
    """Move what the adapter trains, as an optimiser would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def assert_reads_as_merged(adapter, folder, model):
    base = open_checkpoint(folder / "base")
    checkpoint = open_checkpoint(adapter, base)
    merged = dict(model.merge_and_unload().named_parameters())
    changed = [name for name in merged if not torch.equal(checkpoint.read(name), base.read(name))]
    for name, expected in merged.items():
        torch.testing.assert_close(checkpoint.read(name), expected.data, rtol=1e-4, atol=1e-5, msg=name)
    return changed


DORA = [
    ("bert", {"target_modules": ["query", "dense"]}),
    ("bert", {"target_modules": ["query"], "use_rslora": True}),
    ("bert", {"target_modules": ["word_embeddings"]}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ("resnet", {"target_modules": ["convolution"]}),
]


@pytest.mark.parametrize(("model_type", "options"), DORA)
def test_dora(model_type, options, tmp_path):
    model = train(start(model_type, tmp_path, use_dora=True, **options))
    model.save_pretrained(tmp_path / "adapter")
    assert assert_reads_as_merged(tmp_path / "adapter", tmp_path, model)


def test_bias_of_the_second_factor(tmp_path):
    model = train(start("bert", tmp_path, target_modules=["query"], lora_bias=True, use_rslora=True))
    model.save_pretrained(tmp_path / "adapter")
    changed = assert_reads_as_merged(tmp_path / "adapter", tmp_path, model)
    assert sum(name.endswith("query.bias") for name in changed) == 2


def test_bias_for_layers_without_one(tmp_path):
    with pytest.warns(UserWarning, match="has no bias"):
        model = train(start("llama", tmp_path, target_modules=["q_proj"], lora_bias=True))
    model.save_pretrained(tmp_path / "adapter")
    checkpoint = open_checkpoint(tmp_path / "adapter", tmp_path / "base")
    assert checkpoint.names() == open_checkpoint(tmp_path / "base").names()


STARTS = [
    ("pissa", "bert", {"target_modules": ["query", "dense"]}),
    ("pissa", "bert", {"target_modules": ["query"], "use_rslora": True, "rank_pattern": {"1.*query": 7}}),
    ("pissa", "bert", {"target_modules": ["query"], "use_dora": True}),
    ("pissa", "gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ("olora", "bert", {"target_modules": ["query", "dense"]}),
    ("olora", "bert", {"target_modules": ["query"], "use_rslora": True}),
]


@pytest.mark.parametrize(("kind", "model_type", "options"), STARTS)
def test_start_that_changed_the_base(kind, model_type, options, tmp_path):
    model = train(start(model_type, tmp_path, init_lora_weights=kind, **options))
    model.save_pretrained(tmp_path / "adapter")
    assert assert_reads_as_merged(tmp_path / "adapter", tmp_path, model)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(("kind", "target"), [("pissa", "lm_head"), ("olora", "lm_head"), ("pissa", "embed_tokens")])
def test_start_that_changed_the_table_that_is_stored(kind, target, stored, tmp_path):
    """PEFT saves the table after the start was taken from it, and takes none from an embedding."""
    base = tiny("llama", "causal", tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=[target, "q_proj"], init_lora_weights=kind))
    train(model).save_pretrained(tmp_path / "adapter", save_embedding_layers=stored)
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(name.endswith(f"{target}.base_layer.weight") for name in held) is stored
    assert assert_reads_as_merged(tmp_path / "adapter", tmp_path, model)


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_start_that_was_converted_to_lora(kind, rank_stabilised, tmp_path):
    options = {"target_modules": ["query"], "use_rslora": rank_stabilised}
    model = start("bert", tmp_path, init_lora_weights=kind, **options)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = kind
    train(model).save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    assert assert_reads_as_merged(tmp_path / "adapter", tmp_path, model)


@pytest.mark.parametrize("kind", ["pissa_niter_4", "corda", "loftq", "lora_ga", ["pissa"], 3])
def test_start_that_cannot_be_repeated(kind, tmp_path):
    model = train(start("bert", tmp_path, target_modules=["query"]))
    model.save_pretrained(tmp_path / "adapter")
    edit_config(tmp_path / "adapter", init_lora_weights=kind)
    with pytest.raises(InputError, match=r"init_lora_weights=.*path_initial_model_for_weight_conversion"):
        open_checkpoint(tmp_path / "adapter", tmp_path / "base")


@pytest.mark.parametrize(("kind", "weight"), [("pissa", torch.eye(32)), ("olora", torch.ones(32, 32))])
def test_start_that_this_matrix_does_not_determine(kind, weight, tmp_path):
    model = start("bert", tmp_path, target_modules=["query"])
    model.save_pretrained(tmp_path / "adapter")
    edit_config(tmp_path / "adapter", init_lora_weights=kind)
    path, name = tmp_path / "base" / "model.safetensors", "encoder.layer.0.attention.self.query.weight"
    save_file(load_file(path) | {name: weight}, path)
    checkpoint = open_checkpoint(tmp_path / "adapter", tmp_path / "base")
    assert checkpoint.read(name.replace("layer.0", "layer.1")).shape == (32, 32)
    with pytest.raises(InputError, match=r"cannot be found again.*path_initial_model_for_weight_conversion"):
        checkpoint.read(name)


@pytest.mark.parametrize("trained_with", [True, False])
def test_dora_of_the_config_and_of_the_tensors_differ(trained_with, tmp_path):
    model = start("bert", tmp_path, target_modules=["query"], use_dora=trained_with)
    model.save_pretrained(tmp_path / "adapter")
    edit_config(tmp_path / "adapter", use_dora=not trained_with)
    with pytest.raises(InputError, match=r"lora_magnitude_vector.*use_dora"):
        open_checkpoint(tmp_path / "adapter", tmp_path / "base")


def test_unknown_parameter(tmp_path):
    start("bert", tmp_path, target_modules=["query"]).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.lora_mystery": nn.Parameter(torch.ones(1)).data}, path)
    with pytest.raises(InputError, match="lora_mystery"):
        open_checkpoint(tmp_path / "adapter", tmp_path / "base")


def edit_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
