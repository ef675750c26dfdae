"""An adapter that was exported to LoRA gives the same logits in plain PEFT, which never hears of this package."""

import json
import re
import subprocess
import sys

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

import spectralbasis as sb
from spectralbasis.checkpoints import matrix_name
from spectralbasis.printable import in_markdown
from tests.coefficients.folders import AUTO_MODELS, load_base, save_adapter, save_base, tokens
from tests.models import tiny
from tests.tuner.cases import CASES as TUNER_CASES

PLAIN = """
import json, sys
import torch, transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

for folder, base, auto_model in json.loads(sys.argv[1]):
    model = getattr(transformers, auto_model).from_pretrained(base)
    model = PeftModel.from_pretrained(model, f"{folder}/lora").eval()
    with torch.no_grad():
        logits = model(**load_file(f"{folder}/batch.safetensors")).logits
    save_file({"logits": logits}, f"{folder}/logits.safetensors")
assert "spectralbasis" not in sys.modules
"""
PATTERN = {"layer.0.attention.self.query": 3, "layer.1.output.dense": 9}
CASES = {
    "diagonal": ("bert", "classifier", {}),
    "core": ("bert", "classifier", {"coefficients": "core"}),
    "several ranks": ("bert", "classifier", {"rank_pattern": PATTERN}),
    "biases": ("bert", "classifier", {"bias": "all"}),
    "biases of adapted layers": ("bert", "classifier", {"bias": "spectral_only", "target_modules": ["query"]}),
    "Conv1D": ("gpt2", "causal", {"target_modules": ["c_attn", "c_proj"], "coefficients": "core"}),
    "Linear, causal": ("llama", "causal", {}),
    "minor": ("bert", "classifier", {"basis": "minor"}),
}


@torch.no_grad()
def exported_logits(folder, base, head="classifier"):
    return PeftModel.from_pretrained(load_base(base, head), folder).eval()(**tokens()).logits


@pytest.mark.slow
@torch.no_grad()
def test_a_process_without_this_package_gives_the_same_logits(tmp_path):
    expected, jobs = {}, []
    for name in ("several ranks", "Conv1D"):
        model_type, head, config = CASES[name]
        folder, base = tmp_path / name, save_base(tmp_path / name / "base", model_type, head)
        expected[name] = save_adapter(folder / "spectral", base, head, **config)(**tokens()).logits
        assert (expected[name] - load_base(base, head)(**tokens()).logits).abs().max() > 0.1
        sb.export_lora(folder / "spectral", folder / "lora")
        save_file(tokens(), folder / "batch.safetensors")
        jobs.append((str(folder), str(base), AUTO_MODELS[head].__name__))
    command = [sys.executable, "-W", "error::UserWarning:peft", "-c", PLAIN, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, logits in expected.items():
        found = load_file(tmp_path / name / "logits.safetensors")["logits"]
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_the_update_is_the_same(tmp_path, name):
    model_type, head, config = CASES[name]
    base = save_base(tmp_path / "base", model_type, head)
    spectral = save_adapter(tmp_path / "spectral", base, head, **config)
    written = sb.export_lora(tmp_path / "spectral", tmp_path / "lora")
    torch.testing.assert_close(
        exported_logits(tmp_path / "lora", base, head), spectral(**tokens()).logits, rtol=0, atol=1e-5
    )
    assert written.error == 0
    assert set(written.errors.values()) == {0}
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert written.parameters == sum(T.numel() for n, T in tensors.items() if ".lora_" in n)
    assert {T.shape[0] for T in _by_module(tensors, "lora_A").values()} == {written.rank}
    updates = spectral.peft_config["default"].ranks
    assert written.ranks == {name: updates[matrix_name(name)] for name in written.ranks}
    assert written.rank == max(updates.values())


def _by_module(tensors, factor):
    ending = f".{factor}.weight"
    return {n.removeprefix("base_model.model.").removesuffix(ending): T for n, T in tensors.items() if ending in n}


@torch.no_grad()
@pytest.mark.parametrize("coefficients", ["diagonal", "core"])
def test_truncation_says_how_much_is_lost(tmp_path, coefficients):
    base = save_base(tmp_path / "base")
    spectral = save_adapter(tmp_path / "spectral", base, coefficients=coefficients, rank_pattern=PATTERN)
    written = sb.export_lora(tmp_path / "spectral", tmp_path / "lora", rank=4)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    A, B = _by_module(tensors, "lora_A"), _by_module(tensors, "lora_B")
    lost, whole = 0.0, 0.0
    for module, k in written.ranks.items():
        update = spectral.get_submodule(f"base_model.model.{module}").get_delta_weight("default")
        singular_values = torch.linalg.svdvals(update.double())
        error = torch.linalg.norm(update.double() - B[module].double() @ A[module].double())
        torch.testing.assert_close(
            error, singular_values[4:].norm() if k == 4 else error.new_zeros(()), atol=1e-5, rtol=0
        )
        assert written.errors[module] == pytest.approx(float(error / update.norm()), abs=1e-5)
        lost, whole = lost + float(error) ** 2, whole + float(update.norm()) ** 2
    assert written.error == pytest.approx((lost / whole) ** 0.5, abs=1e-5)
    assert max(written.ranks.values()) == 4
    assert written.ranks["bert.encoder.layer.0.attention.self.query"] == 3


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "embedding, core",
        "convolutions, core",
        "conv1d, band",
        "mlp, pattern",
        "mlp, block",
        "mlp, rotation",
        "conv1d, rotation",
    ],
)
@pytest.mark.parametrize("rank", [None, 1])
def test_every_kind_of_layer(tmp_path, name, rank):
    case = TUNER_CASES[name]
    adapted = case.adapted()
    adapted.save_pretrained(tmp_path / "spectral")
    written = sb.export_lora(tmp_path / "spectral", tmp_path / "lora", base=case.base(), rank=rank)
    lora = PeftModel.from_pretrained(case.base(), tmp_path / "lora").eval()
    if rank is None:
        torch.testing.assert_close(case.output(lora), case.output(adapted), rtol=0, atol=1e-5)
    assert (case.output(lora) - case.output(case.base())).abs().max() > 1e-3
    assert set(written.ranks.values()) != {1} if rank is None else set(written.ranks.values()) == {1}


def test_a_rank_that_suffices_loses_nothing(tmp_path):
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "spectral", base)
    for rank in (6, 100):
        assert sb.export_lora(tmp_path / "spectral", tmp_path / f"lora{rank}", rank=rank).error == 0


def test_untrained_coefficients_are_an_update_of_nothing(tmp_path):
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "spectral", base, init_weights=True)
    assert sb.export_lora(tmp_path / "spectral", tmp_path / "lora", rank=2).error == 0
    update = sb.open_checkpoint(tmp_path / "lora", base=base)
    start = sb.open_checkpoint(base)
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(update.read(name), start.read(name))


def test_the_base_may_be_given_and_must_be_the_right_one(tmp_path):
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "spectral", base)
    other = tmp_path / "other"
    load_base(base).base_model.save_pretrained(other)
    weights = load_file(other / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(sb.BaseMismatchError, match=r"encoder\.layer\.1\.output\.dense"):
        sb.export_lora(tmp_path / "spectral", tmp_path / "lora", base=other)
    assert not (tmp_path / "lora").exists()
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(sb.InputError, match="base_model_name_or_path"):
        sb.export_lora(tmp_path / "spectral", tmp_path / "lora")
    sb.export_lora(tmp_path / "spectral", tmp_path / "lora", base=moved)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved)


def test_what_cannot_be_exported_is_a_sentence(tmp_path):
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "spectral", base)
    sb.export_lora(tmp_path / "spectral", tmp_path / "lora")
    with pytest.raises(sb.InputError, match="not the folder of a spectral adapter"):
        sb.export_lora(tmp_path / "lora", tmp_path / "again")
    with pytest.raises(sb.InputError, match="rank must be at least 1, got 0"):
        sb.export_lora(tmp_path / "spectral", tmp_path / "again", rank=0)
    with pytest.raises(sb.InputError, match="not empty"):
        sb.export_lora(tmp_path / "spectral", tmp_path / "lora")
    assert sb.export_lora(tmp_path / "spectral", tmp_path / "lora", rank=2, overwrite=True).error > 0
    with pytest.raises(sb.InputError, match="not made by spectralbasis"):
        sb.export_lora(tmp_path / "spectral", base / "..", overwrite=True)


def peft_scale(config, module, factors):
    """`alpha_pattern` and `rank_pattern` decide for a module, else the config does."""
    named = next((key for key in config["rank_pattern"] if re.fullmatch(rf"(.*\.)?({key})", module)), None)
    rank = config["rank_pattern"].get(named, config["r"])
    assert len(factors[0]) == rank, "PEFT makes factors of this rank and loads no others"
    alpha = next((a for key, a in config["alpha_pattern"].items() if re.fullmatch(rf"(.*\.)?({key})", module)), None)
    return (config["lora_alpha"] if alpha is None else alpha) / rank


def vllm_scale(config, module, factors):
    """`PEFTHelper`: one scale for all modules; a tensor may have fewer rows than the config says."""
    assert config["modules_to_save"] is None
    assert len(factors[0]) <= config["r"]
    return config["lora_alpha"] / config["r"]


def llama_cpp_scale(config, module, factors):
    """`llama_adapter_lora_weight::get_scale`: `adapter.lora.alpha` over the inner dimension of the second factor."""
    return config["lora_alpha"] / factors[1].shape[1]


RULES = {"PEFT": peft_scale, "vLLM": vllm_scale, "llama.cpp": llama_cpp_scale}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("consumer", RULES)
def test_each_consumer_computes_the_same_update(tmp_path, consumer, rank):
    """Several ranks, an embedding and a head, scaled by the rule of each program, against ΔW of the tuner."""
    base = save_base(tmp_path / "base", "llama", "causal")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        sb.SpectralConfig(
            target_modules=["q_proj", "down_proj", "embed_tokens", "lm_head"],
            leading=6,
            rank_pattern={"layers.0.self_attn.q_proj": 2, "down_proj": 9, "lm_head": 3},
            coefficients="core",
            init_weights=False,
            task_type="CAUSAL_LM",
        ),
    )
    model.save_pretrained(tmp_path / "spectral")
    written = sb.export_lora(tmp_path / "spectral", tmp_path / "lora", rank=rank)
    assert written.rank == (rank or 9)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    endings = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    assert all(name.endswith(endings) for name in tensors), "a table that the base has is not stored again"
    for module, k in written.ranks.items():
        table = module.endswith("embed_tokens")
        names = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
        A, B = (tensors[f"base_model.model.{module}.{name}"].double() for name in names)
        update = RULES[consumer](config, module, (A, B)) * (B @ A)
        exact = model.get_submodule(f"base_model.model.{module}").get_delta_weight("default").double()
        exact = exact.T if table else exact
        if rank is not None:
            U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
            exact = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(update, exact, rtol=0, atol=1e-5)
        assert torch.linalg.matrix_rank(update, rtol=1e-5) == k


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]])
def test_embeddings_and_heads(tmp_path, targets, tied):
    base = save_base(tmp_path / "base", "llama", "causal", tie_word_embeddings=tied)
    config = sb.SpectralConfig(target_modules=targets, leading=5, init_weights=False, task_type="CAUSAL_LM")
    spectral = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    spectral.save_pretrained(tmp_path / "spectral")
    written = sb.export_lora(tmp_path / "spectral", tmp_path / "lora")
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora").eval()
    torch.testing.assert_close(lora(**tokens()).logits, spectral(**tokens()).logits, rtol=0, atol=1e-5)
    merged, expected = lora.merge_and_unload().state_dict(), spectral.merge_and_unload().state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-5, msg=name)
    assert any("vLLM opens it" in note for note in written.notes)
    assert any("tied to a table" in note for note in written.notes) == (tied and "lm_head" in targets)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_a_resized_table_comes_along(tmp_path):
    base = save_base(tmp_path / "base", "llama", "causal")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(57)
    config = sb.SpectralConfig(target_modules=["embed_tokens", "lm_head"], leading=5, init_weights=False)
    spectral = get_peft_model(model, config).eval()
    spectral.save_pretrained(tmp_path / "spectral")
    written = sb.export_lora(tmp_path / "spectral", tmp_path / "lora")
    assert any("resize_token_embeddings(57)" in note for note in written.notes)
    larger = AutoModelForCausalLM.from_pretrained(base)
    larger.resize_token_embeddings(57)
    lora = PeftModel.from_pretrained(larger, tmp_path / "lora").eval()
    torch.testing.assert_close(lora(**tokens()).logits, spectral(**tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "head", "config", "opens"),
    [
        ("llama", "causal", {"target_modules": ["q_proj"]}, True),
        ("llama", "causal", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, False),
        ("bert", "classifier", {"target_modules": ["query"]}, False),
        ("bert", "", {"target_modules": ["query"], "bias": "all"}, False),
        ("resnet", "", {"target_modules": ["convolution"], "leading": 2}, False),
    ],
)
def test_the_notes_say_who_opens_it(tmp_path, model_type, head, config, opens):
    base = save_base(tmp_path / "base", model_type, head) if model_type != "resnet" else tmp_path / "base"
    if model_type == "resnet":
        tiny("resnet").save_pretrained(base)
    save_adapter(tmp_path / "spectral", base, head, **config)
    written = sb.export_lora(tmp_path / "spectral", tmp_path / "lora")
    said = " ".join(written.notes)
    assert ("vLLM opens it with --max-lora-rank 6" in said) is opens
    assert ("vLLM and llama.cpp do not open it" in said) is not opens
    assert all(in_markdown(note) in (tmp_path / "lora" / "README.md").read_text() for note in written.notes)


def test_part_of_an_adapter(tmp_path):
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "spectral", base, target_modules=["query"])
    whole = sb.export_lora(tmp_path / "spectral", tmp_path / "whole")
    path = base / "model.safetensors"
    save_file({name: T for name, T in load_file(path).items() if "layer.1." not in name}, path, {"format": "pt"})
    with pytest.raises(sb.InputError, match=r"attention.self.query \(1 of 2\)"):
        sb.export_lora(tmp_path / "spectral", tmp_path / "lora")
    part = sb.export_lora(tmp_path / "spectral", tmp_path / "lora", partial=True)
    assert part.ranks == {name: k for name, k in whole.ranks.items() if "layer.1." not in name}
    assert any("layer.1.attention.self.query" in note for note in part.notes)


@pytest.mark.skipif(not transformers.__version__.startswith("5"), reason="transformers 4 has its own names")
def test_modules_have_the_names_of_the_installed_release(tmp_path):
    torch.manual_seed(0)
    AutoModelForImageClassification.from_config(tiny("vit", initializer_range=0.2).config).save_pretrained(
        tmp_path / "base"
    )
    load = AutoModelForImageClassification.from_pretrained
    adapted = get_peft_model(
        load(tmp_path / "base"), sb.SpectralConfig(target_modules=["q_proj"], leading=3, init_weights=False)
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    config, file = (tmp_path / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors"))

    def former(text):
        text = text.replace("attention.q_proj", "attention.attention.query")
        return text.replace("vit.layers.", "vit.encoder.layer.").replace('"layers.', '"encoder.layer.')

    config.write_text(former(config.read_text()).replace('"q_proj"', '"query"'))
    save_file({former(name): tensor for name, tensor in load_file(file).items()}, file)
    sb.export_lora(tmp_path / "adapter", tmp_path / "lora")
    size = adapted.config.image_size
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, plain = adapted(pixels).logits, load(tmp_path / "base").eval()(pixels).logits
        found = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "lora").eval()(pixels).logits
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
