"""Tuning, as a user calls it."""

import json
import shlex
import subprocess
import sys
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

import spectralbasis as sb
from spectralbasis.basis import SpectralBasis
from spectralbasis.errors import InputError
from spectralbasis.training import evaluate, fitting, tune
from tests.training.examples import bright_side_task, save_image_model, save_text_model, write_sst2

METHODS = [
    {"method": "full"},
    {"method": "head"},
    {"method": "lora", "rank": 2},
    {"method": "spectral", "coefficients": "diagonal", "leading": 8},
    {"method": "spectral", "coefficients": "core", "budget": 0.02},
    {"method": "spectral", "coefficients": "band", "leading": 8, "bandwidth": 2, "scaling": "relative"},
    {"method": "spectral", "coefficients": "sparse", "budget": 0.02, "scaling": "normalized"},
    {"method": "spectral", "coefficients": "block", "leading": 8, "block_size": 3},
    {"method": "spectral", "coefficients": "rotation", "budget": 0.02, "block_size": 4},
    {"method": "spectral", "leading": 8, "also": ("biases", "norms")},
]
RATES = [(5e-3, 2e-2), (None, 5e-2), (2e-2, 2e-2), *[(1e-1, 2e-2)] * 7]
NAMES = [options["method"] + options.get("coefficients", "") for options in METHODS]
QUICK = "full", "lora", "spectralcore"
"""What the tests that train often try in the default suite."""
SHORT = {"steps": 3, "batch_size": 8, "max_length": 16, "progress": False}


def rarely(*columns):
    """Parameters for every method, those not in `QUICK` marked slow."""
    return [
        pytest.param(*row, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, *row in zip(NAMES, *columns, strict=True)
    ]


@pytest.fixture
def model(tmp_path):
    return save_text_model(tmp_path / "model")


@pytest.fixture
def data(tmp_path):
    return write_sst2(tmp_path / "data")


@pytest.mark.parametrize("options", METHODS, ids=NAMES)
def test_what_is_written_scores_the_same_when_it_is_read_back(tmp_path, model, data, options):
    output = tmp_path / "tuned"
    result = tune(model, task="sst2", data=data, output=output, **options, **SHORT)
    adapted = (output / "adapter_config.json").is_file()
    assert adapted == (options["method"] in ("lora", "spectral"))
    again = evaluate(model if adapted else output, output if adapted else None, task="sst2", data=data, progress=False)
    assert again.metrics == result.metrics
    assert (again.score, again.metric, again.examples) == (result.score, "accuracy", 20)


@pytest.mark.parametrize("options", rarely(METHODS))
def test_the_same_seed_gives_the_same_weights(tmp_path, model, data, options):
    for name, seed in (("first", 0), ("second", 0), ("third", 1)):
        torch.rand(3)
        tune(model, task="sst2", data=data, output=tmp_path / name, seed=seed, **options, **SHORT)
    first, second, third = (
        load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("first", "second", "third")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


@pytest.mark.parametrize(("options", "rates"), rarely(METHODS, RATES))
def test_every_method_learns_a_task_that_can_be_learnt(tmp_path, options, rates):
    result = tune(
        save_image_model(tmp_path / "model"), task=bright_side_task(), output=tmp_path / "tuned", steps=60,
        batch_size=16, learning_rate=rates[0], head_learning_rate=rates[1], progress=False, **options,
    )  # fmt: skip
    assert result.score > 0.9


@pytest.mark.parametrize("options", [{"budget": 0.02, "coefficients": "core"}, {"coefficients": "sparse"}])
def test_a_curvature_basis_lies_beside_the_adapter_that_it_was_made_for(tmp_path, model, data, options):
    output = tmp_path / "tuned"
    result = tune(model, task="sst2", data=data, output=output, basis="curvature", **options, **SHORT)
    assert SpectralBasis.load(output / "basis.safetensors").kind == "curvature"
    assert result.adapter_bytes == (output / "adapter_model.safetensors").stat().st_size
    moved = output.rename(tmp_path / "moved")
    again = evaluate(model, moved, task="sst2", data=data, progress=False)
    assert again.metrics == result.metrics


def named_as_in_the_base(adapter):
    """The tensors of an adapter."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.").replace(".base_layer.", "."): one for name, one in tensors.items()}


def test_biases_and_norms_are_in_the_adapter_and_in_what_is_exported(tmp_path, model, data):
    output = tmp_path / "tuned"
    options = {"coefficients": "rotation", "also": ["biases", "norms"], "learning_rate": 0.3, "leading": 4}
    result = tune(model, task="sst2", data=data, output=output, **options, **SHORT)
    before = {f"bert.{name}": one for name, one in load_file(model / "model.safetensors").items()}
    saved = named_as_in_the_base(output)
    changed = [name for name, one in before.items() if name in saved and not torch.equal(saved[name], one)]
    assert "bert.encoder.layer.1.output.LayerNorm.weight" in changed
    assert "bert.encoder.layer.0.attention.self.query.bias" in changed
    moved = max(float((saved[name] - before[name]).abs().max()) for name in changed)
    assert 0 < moved < 3 * 0.3 * fitting.OTHER_SHARE * 1.01
    assert evaluate(model, output, task="sst2", data=data, progress=False).metrics == result.metrics
    sb.export_merged(output, tmp_path / "merged", base=model)
    read = {"task": "sst2", "data": data, "max_length": 16, "progress": False}
    assert evaluate(tmp_path / "merged", **read).metrics == result.metrics
    sb.export_lora(output, tmp_path / "lora", base=model)
    assert set(changed) <= named_as_in_the_base(tmp_path / "lora").keys()
    assert evaluate(model, tmp_path / "lora", **read).metrics == result.metrics


def test_a_rotation_with_a_curvature_basis_is_refused_before_anything_is_computed(tmp_path, model, data):
    with pytest.raises(InputError, match="turn singular vectors, which the basis curvature has none of"):
        tune(
            model,
            task="sst2",
            data=data,
            output=tmp_path / "tuned",
            coefficients="rotation",
            basis="curvature",
            **SHORT,
        )


def test_bf16_trains_otherwise_and_scores_in_float32(tmp_path, monkeypatch, model, data):
    monkeypatch.setattr(fitting, "native_bf16", lambda: True)
    results = {
        bf16: tune(model, task="sst2", data=data, output=tmp_path / str(bf16), bf16=bf16, method="full", **SHORT)
        for bf16 in (False, True)
    }
    tune(model, task="sst2", data=data, output=tmp_path / "again", method="full", **SHORT)
    plain, half, again = (load_file(tmp_path / name / "model.safetensors") for name in ("False", "True", "again"))
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}
    assert any(not torch.equal(plain[name], half[name]) for name in plain)
    assert evaluate(tmp_path / "True", task="sst2", data=data, progress=False).score == results[True].score
    assert {bf16: result.precision for bf16, result in results.items()} == {False: "float32", True: "bf16"}


def test_where_bf16_would_be_emulated_it_trains_in_float32_and_says_so(tmp_path, monkeypatch, model, data):
    monkeypatch.setattr(fitting, "native_bf16", lambda: False)
    plain = tune(model, task="sst2", data=data, output=tmp_path / "plain", **SHORT)
    with pytest.warns(UserWarning, match="emulate it, which is slower; training in float32"):
        asked = tune(model, task="sst2", data=data, output=tmp_path / "asked", bf16=True, **SHORT)
    assert asked.precision == json.loads((tmp_path / "asked/tuning.json").read_text())["precision"] == "float32"
    assert asked.metrics == plain.metrics


def test_an_adapter_folder_opens_with_peft_alone(tmp_path, model, data):
    output = tmp_path / "adapter"
    tune(model, task="sst2", data=data, output=output, leading=4, **SHORT)
    assert {file.name for file in output.iterdir()} == {
        ".spectralbasis", "adapter_config.json", "adapter_model.safetensors", "README.md", "tuning.json"
    }  # fmt: skip
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    adapted = PeftModel.from_pretrained(base, output)
    batch = AutoTokenizer.from_pretrained(model)(["the film is good"], return_tensors="pt")
    stored = load_file(output / "adapter_model.safetensors")
    assert torch.isfinite(adapted(**batch).logits).all()
    assert any("spectral_" in name for name in stored)
    assert any(name.endswith("classifier.weight") for name in stored)


def test_a_fully_tuned_folder_is_a_model_with_its_tokenizer(tmp_path, model, data):
    tune(model, task="sst2", data=data, output=tmp_path / "full", method="full", **SHORT)
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "full")
    assert tuned.config.id2label == {0: "negative", 1: "positive"}
    assert AutoTokenizer.from_pretrained(tmp_path / "full")("good")["input_ids"] == [2, 8, 3]
    again = tune(tmp_path / "full", task="sst2", data=data, output=tmp_path / "again", **SHORT)
    assert again.model == str(tmp_path / "full")


def test_tuning_json_holds_the_result(tmp_path, model, data):
    result = tune(model, task="sst2", data=data, output=tmp_path / "a", coefficients="core", leading=3, **SHORT)
    written = json.loads((tmp_path / "a" / "tuning.json").read_text())
    assert written == json.loads(json.dumps(result.to_dict()))
    assert (written["task"], written["method"], written["coefficients"]) == ("SST-2", "spectral", "core")
    assert written["parameters_backbone"] == 9 * 13
    assert written["share_backbone"] == 9 * 13 / written["parameters_model"]
    assert written["parameters_head"] == 2 * 32 + 2
    assert written["adapter_bytes"] == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert written["seconds_per_step"] == pytest.approx(written["seconds"] / 3)
    assert (written["settings"]["leading"], written["settings"]["batch_size"]) == (3, 8)
    assert {"python", "torch", "transformers", "peft", "spectralbasis"} <= set(written["versions"])


def test_the_card_names_task_and_score_and_its_code_loads_the_adapter(tmp_path, monkeypatch):
    base = save_image_model(tmp_path / "model", labels=10)
    result = tune(base, task=bright_side_task(), output=tmp_path / "a", leading=3, **SHORT)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "bright side adapter (spectral, band)" in card
    assert f"| accuracy on evaluation | {result.score:.4f} |" in card
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path / "a")
    exec(card.split("```python")[2].split("```")[0], names)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(names["model"].base_model.model.classifier.modules_to_save["default"].weight, stored)


@pytest.mark.slow
def test_the_cards_commands_run_as_printed(tmp_path, monkeypatch, model, data):
    monkeypatch.chdir(tmp_path)
    result = tune("model", task="sst2", data="data", output="a", leading=3, **SHORT)
    card = (tmp_path / "a" / "README.md").read_text()
    command = shlex.split(card.split("## Use")[1].split("```")[1])
    done = subprocess.run(
        [sys.executable, "-m", *command, "--json"], cwd=tmp_path / "a", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"] == result.metrics
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path / "a")
    exec(card.split("```python")[1].split("```")[0], names)
    assert isinstance(names["model"], PeftModel)


@pytest.mark.parametrize(("length", "steps"), [({"epochs": 2}, 16), ({"epochs": 0.5}, 4), ({}, 24), ({"steps": 5}, 5)])
def test_steps_follow_from_epochs(tmp_path, length, steps):
    model = save_image_model(tmp_path / "model")
    result = tune(
        model, task=bright_side_task(64), output=tmp_path / "a", method="head", batch_size=8, progress=False, **length
    )
    assert result.steps == steps


def test_train_examples_are_counted_into_the_epochs(tmp_path):
    model = save_image_model(tmp_path / "model")
    result = tune(
        model, task=bright_side_task(), output=tmp_path / "a", method="head", train_examples=20, batch_size=8,
        epochs=1, progress=False,
    )  # fmt: skip
    assert (result.steps, result.settings["train_examples"]) == (3, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3, "epochs": 1}, "both steps=3 and epochs=1 were given"),
        ({"steps": 0}, "steps must be above 0 and at most .*, got 0"),
        ({"batch_size": -1}, "batch_size must be above 0 and at most .*, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"method": "lora", "budget": 0.1}, "budget does not apply to the method lora"),
        ({"method": "lora", "rank": 0}, "rank"),
        ({"coefficients": "triangle"}, "triangle"),
        ({"leading": 3, "budget": 0.1}, "budget"),
        ({"train_examples": 97}, "97 training examples"),
    ],
)
def test_options_that_cannot_be_leave_nothing_behind(tmp_path, options, message):
    model = save_image_model(tmp_path / "model")
    with pytest.raises(InputError, match=message):
        tune(model, task=bright_side_task(), output=tmp_path / "a", progress=False, **options)
    assert {entry.name for entry in tmp_path.iterdir()} == {"model"}


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        raise KeyboardInterrupt


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    model = save_image_model(tmp_path / "model")
    options = {"task": bright_side_task(), "output": tmp_path / "a", "steps": 3}
    with pytest.raises(KeyboardInterrupt):
        tune(model, callbacks=[Interrupt()], **options)
    assert {entry.name for entry in tmp_path.iterdir()} == {"model"}
    assert tune(model, **options).steps == 3


def test_a_loss_that_overflows_is_an_error(tmp_path):
    model = save_image_model(tmp_path / "model")
    with pytest.raises(InputError, match=r"training diverged: .* pass a learning rate below 1e\+30"):
        tune(
            model, task=bright_side_task(), output=tmp_path / "a", method="full", learning_rate=1e30, steps=5,
            progress=False,
        )  # fmt: skip
    assert not (tmp_path / "a").exists()


def test_a_folder_in_use_is_refused_and_replaced_only_on_purpose(tmp_path):
    model, task = save_image_model(tmp_path / "model"), bright_side_task()
    options = {"task": task, "method": "head", "steps": 1, "progress": False}
    tune(model, output=tmp_path / "a", **options)
    (tmp_path / "a" / "note.txt").write_text("old")
    with pytest.raises(InputError, match=r"a is not empty; name a new one"):
        tune(model, output=tmp_path / "a", **options)
    with pytest.raises(InputError, match=r"a holds note\.txt, which no earlier run wrote"):
        tune(model, output=tmp_path / "a", overwrite=True, **options)
    (tmp_path / "a" / "note.txt").rename(tmp_path / "note.txt")
    tune(model, output=tmp_path / "a", overwrite=True, **options)
    with pytest.raises(InputError, match="was not made by spectralbasis, so it is not replaced"):
        tune(model, output=model, overwrite=True, **options)
    assert (model / "config.json").is_file()


def test_bars_and_results_keep_to_stderr(tmp_path, capfd):
    model = save_image_model(tmp_path / "model")
    tune(model, task=bright_side_task(), output=tmp_path / "a", method="head", steps=2)
    assert capfd.readouterr().out == ""
