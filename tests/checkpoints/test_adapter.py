"""An adapter over its base reads as PEFT merges it."""

import json

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from spectralbasis import SpectralConfig
from spectralbasis.checkpoints import logical_matrices, match_matrices, open_checkpoint
from spectralbasis.errors import BaseMismatchError, InputError
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
    with pytest.raises(InputError, match=r"attention\.self\.query \(2 of 2\), which its base .*other does not have"):
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


TABLES = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "embedding by a pattern": {"target_modules": r".*embed_tokens"},
    "retrained embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "retrained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "retrained both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "retrained embedding, adapted head": {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}
WEIGHT_TYING = {
    "embedding": TABLES["embedding"],
    "head": TABLES["head"],
    "retrained embedding": TABLES["retrained embedding"],
}
RESIZED = ("embedding", "head", "both", "norms")


def tune_table(tmp_path, method, *, tied, rows=50, **options):
    """A causal model whose adapter is trained, its base in the folder `base`, and the adapter's folder."""
    torch.manual_seed(0)
    tiny("llama", "causal", tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if rows != 50:
        base.resize_token_embeddings(rows)
    settings = LoraConfig(r=3, **options) if method == "lora" else SpectralConfig(leading=4, **options)
    model = get_peft_model(base, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model, save(model, tmp_path)


def assert_reads_as(checkpoint, merged):
    """Every tensor of the checkpoint is PEFT's; a tied head need not have a name of its own."""
    assert set(merged) - set(checkpoint.names()) <= {"lm_head.weight"}
    for name in checkpoint.names():
        assert checkpoint.shape(name) == tuple(merged[name].shape)
        torch.testing.assert_close(checkpoint.read(name), merged[name], rtol=1e-5, atol=1e-6, msg=name)


TABLE_CASES = [(method, tied, name) for method in ("lora", "spectral") for tied in (False, True) for name in TABLES]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "tied", "name"), TABLE_CASES)
def test_tables_and_heads_are_those_of_the_merged_model(method, tied, name, tmp_path):
    model, adapter = tune_table(tmp_path, method, tied=tied, **TABLES[name])
    merged = model.merge_and_unload().state_dict()
    assert_reads_as(open_checkpoint(adapter), merged)
    live = open_checkpoint(adapter, base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    assert_reads_as(live, merged)
    assert set(live.names()) == set(merged)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WEIGHT_TYING)
@pytest.mark.parametrize("tied", [False, True])
def test_tables_that_peft_keeps_tied(tied, name, tmp_path):
    model, adapter = tune_table(tmp_path, "lora", tied=tied, ensure_weight_tying=True, **WEIGHT_TYING[name])
    assert_reads_as(open_checkpoint(adapter), model.merge_and_unload().state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "spectral"])
@pytest.mark.parametrize("name", RESIZED)
def test_a_resized_table_is_the_base_of_its_update(method, name, tmp_path):
    model, adapter = tune_table(tmp_path, method, tied=True, rows=53, **TABLES[name])
    checkpoint = open_checkpoint(adapter)
    assert_reads_as(checkpoint, model.merge_and_unload().state_dict())
    assert checkpoint.shape("model.embed_tokens.weight") == (53, 32)


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_stores_a_tied_head_twice(tmp_path):
    model, adapter = tune_table(tmp_path, "lora", tied=True, **TABLES["embedding"])
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    checkpoint = open_checkpoint(adapter)
    assert "lm_head.weight" in checkpoint.names()
    assert_reads_as(checkpoint, model.merge_and_unload().state_dict())


@pytest.mark.filterwarnings("ignore")
def test_the_stored_table_is_the_one_that_is_hashed(tmp_path):
    _, adapter = tune_table(tmp_path, "spectral", tied=False, **TABLES["embedding"])
    path = adapter / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = load_file(path)
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, path)
    with pytest.raises(BaseMismatchError, match="embed_tokens"):
        open_checkpoint(adapter).read("model.embed_tokens.weight")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "spectral"])
def test_trained_biases_and_the_copies_beside_them(method, tmp_path):
    base = tiny("bert", "classifier")
    base.save_pretrained(tmp_path / "base")
    bias = {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}
    model = get_peft_model(base, LoraConfig(r=3, **bias) if method == "lora" else SpectralConfig(leading=3, **bias))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    checkpoint = open_checkpoint(save(model, tmp_path))
    assert_reads_as(checkpoint, model.merge_and_unload().state_dict())
    assert set(checkpoint.names()) == set(open_checkpoint(tmp_path / "base").names())


@pytest.mark.filterwarnings("ignore")
def test_rows_of_single_tokens_are_refused(tmp_path):
    options = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}
    _, adapter = tune_table(tmp_path, "lora", tied=False, **options)
    with pytest.raises(InputError, match=r"trainable_token_indices.*merge_and_unload"):
        open_checkpoint(adapter)


def _with_adapter_name(name):
    for marker in ("lora_A", "lora_B", "spectral_coefficients"):
        name = name.replace(f".{marker}.weight", f".{marker}.mine.weight")
        name = f"{name}.mine" if name.endswith(f".{marker}") else name
    return name.replace(".classifier.", ".classifier.modules_to_save.mine.")


SPELLINGS = {
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "the prefix twice": lambda name: f"base_model.model.{name}",
    "a compiled model": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "a compiled model around PEFT's": lambda name: f"_orig_mod.{name}",
    "a parallel model": lambda name: f"module.{name}",
    "sharded layers": lambda name: name.replace(".attention.", "._fsdp_wrapped_module.attention."),
    "recomputed layers": lambda name: name.replace(".attention.", "._checkpoint_wrapped_module.attention."),
    "no prefix of the head's model": lambda name: name.replace("base_model.model.bert.", "base_model.model."),
    "the adapter's name": _with_adapter_name,
    "all": lambda name: f"module.{_with_adapter_name(name).removeprefix('base_model.model.')}",
}


@pytest.fixture(params=["lora", "spectral"])
def classifier_adapter(request, tmp_path):
    base = tiny("bert", "classifier")
    base.save_pretrained(tmp_path / "base")
    options = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    method = LoraConfig(r=3, **options) if request.param == "lora" else SpectralConfig(leading=3, **options)
    model = get_peft_model(base, method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return save(model, tmp_path)


def respell(adapter, spelling):
    path = adapter / "adapter_model.safetensors"
    save_file({spelling(name): tensor for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("safetensors", [True, False])
def test_names_as_other_tools_write_them(classifier_adapter, spelling, safetensors):
    before = open_checkpoint(classifier_adapter)
    expected = {name: before.read(name) for name in before.names()}
    respell(classifier_adapter, SPELLINGS[spelling])
    path = classifier_adapter / "adapter_model.safetensors"
    assert load_file(path).keys() != set(before.adapter.tensors.names())
    if not safetensors:
        torch.save(load_file(path), classifier_adapter / "adapter_model.bin")
        path.unlink()
    found = open_checkpoint(classifier_adapter)
    assert set(found.names()) == expected.keys()
    assert all(torch.equal(found.read(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("spelling", "said"),
    [
        (lambda name: name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"), r"lora_down.*kohya"),
        (lambda name: name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"), r"lora\.down.*kohya"),
        (lambda name: name.replace("lora_A", "lora_A.one").replace("lora_B", "lora_B.two"), r"one, two.*own"),
    ],
)
def test_names_that_are_not_pefts(adapter, spelling, said):
    respell(adapter, spelling)
    with pytest.raises(InputError, match=said):
        open_checkpoint(adapter)


def test_two_names_of_one_tensor(adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {f"module.{name}": tensor.clone() for name, tensor in tensors.items()}, path)
    with pytest.raises(InputError, match="two names of one tensor"):
        open_checkpoint(adapter)


def shorten(base):
    """Leave out the last layer of a base."""
    path = base / "model.safetensors"
    save_file({name: T for name, T in load_file(path).items() if "layer.1." not in name}, path, {"format": "pt"})


def test_an_adapter_of_a_deeper_model(classifier_adapter, tmp_path):
    checkpoint = open_checkpoint(classifier_adapter)
    full = {name: checkpoint.read(name).clone() for name in checkpoint.names()}
    shorten(tmp_path / "base")
    with pytest.raises(InputError, match=r"self\.query \(1 of 2\).*partial=True"):
        open_checkpoint(classifier_adapter)
    part = open_checkpoint(classifier_adapter, partial=True)
    assert part.missing == ("bert.encoder.layer.1.attention.self.query.weight",)
    assert set(part.names()) == {name for name in full if "layer.1." not in name}
    assert all(torch.equal(part.read(name), full[name]) for name in part.names())


def test_retrained_parts_of_missing_layers(tmp_path):
    base = tiny("bert", "classifier")
    base.save_pretrained(tmp_path / "base")
    model = trained(base, target_modules=["query"], bias="all", modules_to_save=["classifier", "LayerNorm"])
    adapter = save(model, tmp_path)
    shorten(tmp_path / "base")
    with pytest.raises(InputError, match=r"output\.LayerNorm \(1 of 2\).*which its base .* does not have"):
        open_checkpoint(adapter)
    assert not any("layer.1." in name for name in open_checkpoint(adapter, partial=True).names())


def test_nothing_fits_in_part(adapter, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"self\.query \(2 of 2\), which"):
        open_checkpoint(adapter, base=tmp_path / "other", partial=True)
