"""A merged checkpoint opens in transformers alone, whole, with the logits of the adapter."""

import json

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizerFast,
)

import spectralbasis as sb
from spectralbasis.coefficients import merged_export
from spectralbasis.coefficients.architectures import check_opens
from tests.coefficients.folders import AUTO_MODELS, load_base, save_adapter, save_base, tokens
from tests.models import sizes_of, tiny
from tests.tuner.cases import MLP

CASES = {
    "bert": ("bert", "classifier", {}),
    "biases": ("bert", "classifier", {"bias": "all"}),
    "a head of two layers": ("roberta", "classifier", {"coefficients": "core", "target_modules": ["query"]}),
    "Conv1D, tied": ("gpt2", "causal", {"target_modules": ["c_attn", "c_proj"]}),
    "tied": ("llama", "causal", {"coefficients": "core"}),
    "score": ("llama", "classifier", {}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_transformers_opens_it_whole_with_the_same_logits(tmp_path, name):
    model_type, head, config = CASES[name]
    tied = {"tie_word_embeddings": True} if "tied" in name else {}
    base = save_base(tmp_path / "base", model_type, head, **tied)
    labels = 3 if head == "classifier" else 2
    adapted = save_adapter(tmp_path / "spectral", base, head, labels=labels, **config)
    written = sb.export_merged(tmp_path / "spectral", tmp_path / "merged")
    merged, report = AUTO_MODELS[head].from_pretrained(tmp_path / "merged", output_loading_info=True)
    superfluous = {name for name in report.pop("unexpected_keys") if "pooler" not in name}
    assert not any((superfluous, *report.values())), report
    logits = merged.eval()(**tokens(4)).logits
    torch.testing.assert_close(logits, adapted(**tokens(4)).logits, rtol=0, atol=1e-5)
    assert (logits - load_base(base, head, labels)(**tokens(4)).logits).abs().max() > 0.1
    assert written.tensors == len(load_file(tmp_path / "merged" / "model.safetensors"))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == [type(merged).__name__]


def test_weights_have_the_dtype_of_the_base(tmp_path):
    base = save_base(tmp_path / "base")
    half = AutoModelForSequenceClassification.from_pretrained(base).base_model.bfloat16()
    half.save_pretrained(tmp_path / "half")
    adapted = save_adapter(tmp_path / "spectral", tmp_path / "half")
    sb.export_merged(tmp_path / "spectral", tmp_path / "merged")
    assert {T.dtype for T in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    expected = adapted.float()(**tokens(4)).logits
    torch.testing.assert_close(merged(**tokens(4)).logits, expected, atol=0.1, rtol=0.05)


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "spectral", base)
    whole = sb.export_merged(tmp_path / "spectral", tmp_path / "whole")
    monkeypatch.setattr(merged_export, "LARGEST_SHARD", 20_000)
    written = sb.export_merged(tmp_path / "spectral", tmp_path / "merged")
    assert len(written.files) > 2
    assert written.bytes == whole.bytes
    assert all((tmp_path / "merged" / file).stat().st_size < 22_000 for file in written.files)
    found = sb.open_checkpoint(tmp_path / "merged")
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    assert set(found.names()) == set(expected)
    assert all(torch.equal(found.read(name), expected[name]) for name in expected)
    _, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values())


def test_the_tokenizer_comes_along(tmp_path):
    base = save_base(tmp_path / "base")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nword\n")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(base)
    save_adapter(tmp_path / "spectral", base)
    sb.export_merged(tmp_path / "spectral", tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("word")["input_ids"] == [2, 5, 3]


def test_a_tokenizer_that_leads_elsewhere_is_refused(tmp_path):
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "spectral", base)
    (tmp_path / "secret").write_text("{}")
    (base / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(sb.InputError, match="leads out of"):
        sb.export_merged(tmp_path / "spectral", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_model_of_ones_own_gives_a_checkpoint_without_config(tmp_path):
    torch.manual_seed(0)
    model = MLP()
    torch.save(model.state_dict(), tmp_path / "mlp.pt")
    settings = sb.SpectralConfig(target_modules=["lin0"], leading=3, init_weights=False, modules_to_save=["lin1"])
    adapted = get_peft_model(model, settings).eval()
    adapted.save_pretrained(tmp_path / "spectral")
    sb.export_merged(tmp_path / "spectral", tmp_path / "merged", base=tmp_path / "mlp.pt")
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [".spectralbasis", "model.safetensors"]
    plain = MLP().eval()
    plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    X = torch.randn(4, 10)
    torch.testing.assert_close(plain(X), adapted(X), rtol=0, atol=1e-5)


def test_another_base_is_refused(tmp_path):
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "spectral", base)
    model = load_base(base)
    model.bert.encoder.layer[1].output.dense.weight.data += 1e-3
    with pytest.raises(sb.BaseMismatchError):
        sb.export_merged(tmp_path / "spectral", tmp_path / "merged", base=model.bert)
    assert not (tmp_path / "merged").exists()
    assert isinstance(PeftModel.from_pretrained(load_base(base), tmp_path / "spectral"), PeftModel)


CAUSAL = {
    "adapted embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "adapted head": {"target_modules": ["lm_head", "q_proj"]},
    "adapted both": {"target_modules": ["embed_tokens", "lm_head"], "coefficients": "core"},
    "retrained embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "retrained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "retrained both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "retrained embedding, adapted head": {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
}


def tune_causal(tmp_path, *, tied=False, rows=50, model_type="llama", base_dtype=torch.float32, std=0.1, **config):
    """A trained adapter in the folder `spectral`, its base in the folder `base`; gives the PEFT model."""
    torch.manual_seed(0)
    tiny(model_type, "causal", tie_word_embeddings=tied).to(base_dtype).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if rows != 50:
        model.resize_token_embeddings(rows)
    settings = {"leading": 6, "task_type": "CAUSAL_LM", **config}
    adapted = get_peft_model(model, sb.SpectralConfig(**settings))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "spectral")
    return adapted.eval()


def assert_opens_as(folder, merged, model_class=AutoModelForCausalLM):
    """Transformers opens the folder whole, with the weights of PEFT's merged model."""
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    found, expected = model.state_dict(), merged.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    return model


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_embeddings_heads_and_norms(tmp_path, name, tied, given):
    adapted = tune_causal(tmp_path, tied=tied, **CAUSAL[name])
    before = adapted(**tokens(4)).logits
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base") if given else None
    written = sb.export_merged(tmp_path / "spectral", tmp_path / "merged", base=base)
    apart = tied and "retrained" in name
    start = sb.open_checkpoint(tmp_path / "base" if base is None else base)
    found = sb.open_checkpoint(tmp_path / "merged")
    differ = [n for n in found.names() if n in start.names() and not torch.equal(found.read(n), start.read(n))]
    assert written.changed == len(differ)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] == (tied and not apart)
    assert any("one tensor" in note for note in written.notes) == (tied and name.startswith("adapted"))
    assert any("no longer tied" in note for note in written.notes) == apart
    model = assert_opens_as(tmp_path / "merged", adapted.merge_and_unload())
    if not tied or apart or name == "norms":
        torch.testing.assert_close(model(**tokens(4)).logits, before, rtol=0, atol=1e-5)
    assert written.largest_rounding == 0


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("tied", "config"),
    [
        (False, {"target_modules": ["embed_tokens", "lm_head"]}),
        (False, {"target_modules": ["q_proj"]}),
        (False, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
        (True, {"target_modules": ["embed_tokens"]}),
        (True, {"target_modules": ["lm_head"]}),
        (True, {"target_modules": ["q_proj"]}),
    ],
)
def test_a_resized_vocabulary(tmp_path, tied, config):
    adapted = tune_causal(tmp_path, tied=tied, rows=57, **config)
    sb.export_merged(tmp_path / "spectral", tmp_path / "merged")
    assert_opens_as(tmp_path / "merged", adapted.merge_and_unload())
    said = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert said["vocab_size"] == 57
    assert said["tie_word_embeddings"] is tied


@pytest.mark.filterwarnings("ignore")
def test_a_resized_vocabulary_of_which_only_one_table_was_saved(tmp_path):
    tune_causal(tmp_path, rows=57, target_modules=["embed_tokens"])
    with pytest.raises(sb.InputError, match=r"embed_tokens.weight 57 rows and lm_head.weight 50"):
        sb.export_merged(tmp_path / "spectral", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def tiny_llava():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"model_type": "llama", "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **sizes}
    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, "vocab_size": 50, **sizes}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=49))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_the_vocabulary_of_a_model_that_sees(tmp_path):
    torch.manual_seed(0)
    model = tiny_llava().eval()
    tiny_base = tmp_path / "base"
    model.save_pretrained(tiny_base)
    model.resize_token_embeddings(57)
    config = sb.SpectralConfig(target_modules=r".*language_model.*q_proj", leading=4, init_weights=False)
    adapted = get_peft_model(model, config).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_base)
    adapted.save_pretrained(tmp_path / "spectral", save_embedding_layers=True)
    start = tiny_llava()
    start.load_state_dict(type(model).from_pretrained(tiny_base).state_dict())
    sb.export_merged(tmp_path / "spectral", tmp_path / "merged", base=start)
    said = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert said["text_config"]["vocab_size"] == 57
    assert said["vision_config"].get("vocab_size", 50) == 50
    assert_opens_as(tmp_path / "merged", adapted.merge_and_unload(), type(model))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_rounding_is_that_of_the_dtype(tmp_path):
    tune_causal(tmp_path, base_dtype=torch.bfloat16, target_modules=["q_proj"])
    written = sb.export_merged(tmp_path / "spectral", tmp_path / "merged")
    exact = sb.open_checkpoint(tmp_path / "spectral")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    changed = [name for name in found if "q_proj" in name]
    assert all(torch.equal(found[name], exact.read(name).bfloat16()) for name in found)
    expected = max(float((found[name].float() - exact.read(name)).abs().max()) for name in changed)
    assert written.largest_rounding == pytest.approx(expected)
    assert 0 < expected < 1e-2
    said = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert {said[key] for key in ("dtype", "torch_dtype") if key in said} == {"bfloat16"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore")
def test_numbers_that_the_dtype_cannot_hold(tmp_path):
    tune_causal(tmp_path, base_dtype=torch.float16, std=1e6, target_modules=["q_proj"])
    with pytest.raises(sb.InputError, match=r"q_proj.weight .* too large for torch.float16"):
        sb.export_merged(tmp_path / "spectral", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def change_adapter(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_open_is_not_kept(tmp_path):
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "spectral", base)
    change_adapter(
        tmp_path / "spectral", lambda tensors: {n: T for n, T in tensors.items() if "classifier.bias" not in n}
    )
    with pytest.raises(sb.InputError, match=r"BertForSequenceClassification: it lacks classifier.bias"):
        sb.export_merged(tmp_path / "spectral", tmp_path / "merged")
    strange = {"base_model.model.bert.embeddings.strange.weight": torch.ones(3, 3)}
    head = {"base_model.model.classifier.bias": torch.zeros(2)}
    change_adapter(tmp_path / "spectral", lambda tensors: tensors | head | strange)
    with pytest.raises(sb.InputError, match=r"does not use bert.embeddings.strange.weight"):
        sb.export_merged(tmp_path / "spectral", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("damage", ["changed", "unchanged"])
def test_a_disk_that_writes_something_else(tmp_path, monkeypatch, damage):
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "spectral", base, target_modules=["query"])

    def wrong(tensors, path, metadata):
        name = next(name for name in tensors if ("query.weight" in name) == (damage == "changed"))
        save_file(tensors | {name: tensors[name] + 1e-6}, path, metadata)

    monkeypatch.setattr(merged_export, "save_file", wrong)
    with pytest.raises(sb.InputError, match="differs from what was computed"):
        sb.export_merged(tmp_path / "spectral", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_architecture_that_transformers_does_not_know(tmp_path):
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "spectral", base, task_type=None, target_modules=["query"], modules_to_save=["classifier"])
    path = tmp_path / "spectral" / "adapter_config.json"
    own = {"auto_mapping": {"base_model_class": "MyModel", "parent_library": "mine"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    written = sb.export_merged(tmp_path / "spectral", tmp_path / "merged")
    assert any("does not know the architecture (MyModel)" in note for note in written.notes)
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) >= {"classifier.weight"}


@torch.no_grad()
def test_what_the_base_stores_encoded_stays_so(tmp_path):
    base = save_base(tmp_path / "base", "wav2vec2", "")
    adapted = save_adapter(tmp_path / "spectral", base, "", target_modules=["q_proj"])
    sb.export_merged(tmp_path / "spectral", tmp_path / "merged")
    found, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base))
    assert found.keys() == before.keys()
    assert {name for name in before if not torch.equal(before[name], found[name])} == {
        n for n in before if "q_proj.w" in n
    }
    assert_opens_as(tmp_path / "merged", adapted.merge_and_unload(), AutoModel)


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_base_is_refused(tmp_path):
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "spectral", base)
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(sb.InputError, match=r"quantized \(fp8\)"):
        sb.export_merged(tmp_path / "spectral", tmp_path / "merged")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_a_shallower_base_takes_part_of_it(tmp_path):
    adapted = tune_causal(tmp_path, target_modules=["q_proj", "v_proj"])
    merged = adapted.merge_and_unload().state_dict()
    path = tmp_path / "base" / "model.safetensors"
    save_file({n: T for n, T in load_file(path).items() if "layers.1." not in n}, path, {"format": "pt"})
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1, "layer_types": None}))
    with pytest.raises(sb.InputError, match=r"self_attn.q_proj \(1 of 2\), self_attn.v_proj \(1 of 2\)"):
        sb.export_merged(tmp_path / "spectral", tmp_path / "merged")
    written = sb.export_merged(tmp_path / "spectral", tmp_path / "merged", partial=True)
    assert any("layers.1.self_attn.q_proj" in note for note in written.notes)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)


def save_trained(model, folder, **config):
    """Save a model in `base` and a trained adapter of it in `spectral`; gives PEFT's model."""
    model.save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base", dtype=torch.float32)
    adapted = get_peft_model(model, sb.SpectralConfig(leading=3, **config))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "spectral")
    return adapted


TIED_CLASSES = [
    ("gpt2", "GPT2LMHeadModel", "wte", "lm_head"),
    ("mamba", "MambaForCausalLM", "embeddings", "lm_head"),
    ("bloom", "BloomForCausalLM", "word_embeddings", "lm_head"),
    ("whisper", "WhisperForConditionalGeneration", "decoder.embed_tokens", "proj_out"),
]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model_type", "named", "table", "head"), TIED_CLASSES)
@pytest.mark.parametrize("trained", ["table adapted", "head adapted", "table retrained", "head retrained"])
def test_the_names_of_other_classes(tmp_path, model_type, named, table, head, trained):
    model_class = getattr(transformers, named)
    torch.manual_seed(0)
    model = model_class(transformers.AutoConfig.for_model(model_type, **sizes_of(model_type)))
    which, retrained = (table, head)[trained.startswith("head")], trained.endswith("retrained")
    config = {"target_modules": r".*(c_attn|q_proj|in_proj|query_key_value)$" if retrained else [which]}
    config |= {"modules_to_save": [which]} if retrained else {}
    merged = save_trained(model, tmp_path, **config).merge_and_unload()
    sb.export_merged(tmp_path / "spectral", tmp_path / "merged")
    assert_opens_as(tmp_path / "merged", merged, model_class)


def test_a_table_that_no_file_can_hold_apart(tmp_path):
    model = transformers.T5ForConditionalGeneration(transformers.AutoConfig.for_model("t5", **sizes_of("t5")))
    save_trained(model, tmp_path, target_modules=["q"], modules_to_save=["shared"])
    with pytest.raises(sb.InputError, match=r"retrains shared.weight apart from encoder.embed_tokens.weight"):
        sb.export_merged(tmp_path / "spectral", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_two_tensors_for_one_parameter(tmp_path):
    """transformers 5 calls the head of GPT-NeoX by another name than its files do."""
    model = tiny("gpt_neox", "causal")
    model.save_pretrained(tmp_path)
    tensors = {name: (T.shape, T.dtype) for name, T in load_file(tmp_path / "model.safetensors").items()}
    config = json.loads((tmp_path / "config.json").read_text())
    assert check_opens(config, tensors, [])[0] == ""
    both = tensors | dict.fromkeys(["lm_head.weight", "embed_out.weight"], tensors["embed_out.weight"])
    with pytest.raises(sb.InputError, match=r"lm_head.weight.* from another tensor|does not use lm_head.weight"):
        check_opens(config, both, ["lm_head.weight"])
