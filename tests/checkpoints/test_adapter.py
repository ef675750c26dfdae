"""An adapter over its base reads as PEFT merges it."""

import json

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from spectralbasis.checkpoints import logical_matrices, match_matrices, open_checkpoint
from spectralbasis.errors import InputError
from tests.models import tiny


def trained(model, **options):
    """A PEFT model whose adapter is not the identity."""
    config = LoraConfig(r=3, lora_alpha=5, **options)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def save(model, folder):
    """Saves the adapter, which names the folder `base` beside it."""
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def edit_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CASES = [
    ("bert", {"target_modules": ["query", "dense"]}),
    ("bert", {"target_modules": ["query"], "use_rslora": True}),
    ("bert", {"target_modules": ["query", "key"], "rank_pattern": {"query": 6}, "alpha_pattern": {"1.*key": 11}}),
    ("bert", {"target_modules": ["query", "word_embeddings"]}),
    ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "lora_only"}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    ("llama", {"target_modules": "all-linear"}),
    ("resnet", {"target_modules": ["convolution"]}),
]


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize(("model_type", "options"), CASES)
def test_equals_merged_model(model_type, options, safetensors, tmp_path):
    base = tiny(model_type, "" if model_type == "resnet" else "classifier")
    base.save_pretrained(tmp_path / "base")
    model = trained(base, **options)
    adapter = save(model, tmp_path)
    if not safetensors:
        torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()

    checkpoint = open_checkpoint(adapter)

    merged = dict(model.merge_and_unload().named_parameters())
    original = open_checkpoint(tmp_path / "base")
    assert set(checkpoint.names()) >= set(merged)
    for name, expected in merged.items():
        assert checkpoint.shape(name) == tuple(expected.shape)
        torch.testing.assert_close(checkpoint.read(name), expected.data, rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(checkpoint.read_rows(name, 1, 2), expected.data[1:2], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(original.read(name), checkpoint.read(name)) for name in merged)
    assert checkpoint.config == original.config


def test_square_embedding_table(tmp_path):
    base = tiny("bert", vocab_size=32)
    base.save_pretrained(tmp_path / "base")
    model = trained(base, target_modules=["word_embeddings"])
    checkpoint = open_checkpoint(save(model, tmp_path))
    merged = model.merge_and_unload().embeddings.word_embeddings.weight
    torch.testing.assert_close(checkpoint.read("embeddings.word_embeddings.weight"), merged.data)


@pytest.fixture
def adapter(tmp_path):
    base = tiny("bert", "classifier")
    base.save_pretrained(tmp_path / "base")
    return save(trained(base, target_modules=["query"], modules_to_save=["classifier"]), tmp_path)


def test_over_a_bare_base(adapter, tmp_path):
    full = open_checkpoint(adapter)
    expected = {matrix.name: matrix.read() for matrix in logical_matrices(full)[0].values()}
    weights = load_file(tmp_path / "base" / "model.safetensors")
    bare = {name.removeprefix("bert."): tensor for name, tensor in weights.items() if name.startswith("bert.")}
    save_file(bare, tmp_path / "base" / "model.safetensors")
    found, skipped = logical_matrices(open_checkpoint(adapter))
    assert found.keys() == expected.keys()
    assert all(torch.equal(matrix.read(), expected[name]) for name, matrix in found.items())
    assert "classifier" in skipped


def test_update_is_of_the_adapters_rank(adapter, tmp_path):
    pairs = match_matrices(open_checkpoint(tmp_path / "base"), open_checkpoint(adapter)).pairs
    ranks = {ours.kind: torch.linalg.matrix_rank(theirs.read() - ours.read()).item() for ours, theirs in pairs}
    assert ranks.pop("attention.self.query") == 3
    assert set(ranks.values()) == {0}


def test_update_of_a_bfloat16_base_is_not_rounded(adapter, tmp_path):
    path = tmp_path / "base" / "model.safetensors"
    weights = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(weights, path)
    checkpoint = open_checkpoint(adapter)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert checkpoint.dtype(name) == checkpoint.read(name).dtype == torch.float32
    update = checkpoint.read(name) - weights[name].float()
    assert torch.linalg.matrix_rank(update, rtol=1e-4) == 3
    assert checkpoint.dtype(name.replace("query", "key")) == torch.bfloat16


def test_base_relative_to_the_adapter_or_to_the_working_directory(adapter, tmp_path, monkeypatch):
    edit_config(adapter, base_model_name_or_path="../base")
    assert open_checkpoint(adapter).names()
    monkeypatch.chdir(tmp_path)
    edit_config(adapter, base_model_name_or_path="base")
    assert open_checkpoint("adapter").names()


def test_a_given_base_is_the_base_whatever_the_adapter_names(adapter, tmp_path):
    other = load_file(tmp_path / "base" / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    other[name] = other[name] + 1
    over_other = open_checkpoint(adapter, base=other)
    torch.testing.assert_close(over_other.read(name), open_checkpoint(adapter).read(name) + 1)
    edit_config(adapter, base_model_name_or_path="/nowhere/at/all")
    for base in (tmp_path / "base", open_checkpoint(tmp_path / "base"), tiny("bert", "classifier")):
        assert name in open_checkpoint(adapter, base=base).names()


def test_a_given_base_changes_nothing_for_other_sources(tmp_path):
    tiny("bert").save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path, base="/nowhere").names() == open_checkpoint(tmp_path).names()


def test_two_adapters_of_one_base_are_not_stacked(adapter):
    sibling = open_checkpoint(adapter, base=adapter)
    alone = open_checkpoint(adapter)
    assert all(torch.equal(sibling.read(name), alone.read(name)) for name in alone.names())


@pytest.mark.parametrize("base", [None, "", "/nowhere/at/all", 3])
def test_base_that_is_not_there(adapter, base):
    edit_config(adapter, base_model_name_or_path=base)
    with pytest.raises(InputError, match="base_model_name_or_path"):
        open_checkpoint(adapter)


def test_other_base(adapter, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path / "other")
    edit_config(adapter, base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"query\.weight, which its base .*other does not have"):
        open_checkpoint(adapter)


def test_base_of_another_width(adapter, tmp_path):
    tiny("bert", hidden_size=64).save_pretrained(tmp_path / "other")
    edit_config(adapter, base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"32×32 at rank 3.*64×64"):
        open_checkpoint(adapter)


def test_adapter_over_itself(adapter):
    edit_config(adapter, base_model_name_or_path=str(adapter))
    with pytest.raises(InputError, match="adapter as its base"):
        open_checkpoint(adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "corda"},
        {"layer_replication": [[0, 1]]},
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"lora_alpha": "much"},
        {"alpha_pattern": {"(": 3}},
    ],
)
def test_what_is_not_plain_lora_is_named(adapter, changes):
    edit_config(adapter, **changes)
    with pytest.raises(
        InputError, match=str(next(iter(changes)) if "peft_type" not in changes else changes["peft_type"])
    ):
        open_checkpoint(adapter)


def test_other_type_as_peft_saves_it(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny("bert"), VeraConfig(r=4, target_modules=["query"]))
    with pytest.raises(InputError, match=r"type VERA.*merge_and_unload"):
        open_checkpoint(save(model, tmp_path))


def test_missing_factor_and_missing_file(adapter):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: tensor for name, tensor in weights.items() if "0.attention.self.query.lora_B" not in name}, path)
    with pytest.raises(InputError, match="one LoRA factor"):
        open_checkpoint(adapter)
    path.unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        open_checkpoint(adapter)


def test_adapted_module_in_memory_says_what_to_pass():
    with pytest.raises(InputError, match="merge_and_unload"):
        open_checkpoint(trained(tiny("bert"), target_modules=["query"]))
