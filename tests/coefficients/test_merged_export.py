"""A merged checkpoint opens in transformers alone, whole, with the logits of the adapter."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizerFast

import spectralbasis as sb
from spectralbasis.coefficients import merged_export
from tests.coefficients.folders import AUTO_MODELS, load_base, save_adapter, save_base, tokens
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
    expected = adapted(**tokens(4)).logits
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
    from peft import get_peft_model

    torch.manual_seed(0)
    model = MLP()
    torch.save(model.state_dict(), tmp_path / "mlp.pt")
    settings = sb.SpectralConfig(target_modules=["lin0"], leading=3, init_weights=False, modules_to_save=["lin1"])
    adapted = get_peft_model(model, settings).eval()
    adapted.save_pretrained(tmp_path / "spectral")
    sb.export_merged(tmp_path / "spectral", tmp_path / "merged", base=tmp_path / "mlp.pt")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["model.safetensors"]
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
