"""The training loops of transformers, as a user of LoRA calls them."""

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from tests.tuner.cases import CASES

CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
pytestmark = pytest.mark.usefixtures("own_precision")
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


def settings(folder, **changes):
    """What trainers are asked for."""
    return {
        "output_dir": folder, "learning_rate": 0.05, "max_steps": 6, "per_device_train_batch_size": 4,
        "logging_steps": 1, "save_steps": 2, "report_to": [], "use_cpu": True, "bf16": False, **changes,
    }  # fmt: skip


def arguments(folder, **changes):
    return TrainingArguments(**settings(folder, **changes))


def rows(count=8):
    ids = torch.randint(1, 50, (count, 7), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()})


@pytest.mark.parametrize("options", [{}, {"bf16": True}, CHECKPOINTED, COMPILED], ids=["", "bf16", "checks", "compile"])
def test_trainer(options, tmp_path):
    case = CASES["bert"]
    model = case.adapted(init_weights=True, modules_to_save=["classifier"])
    trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    saved = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    assert any("spectral_coefficients" in name for name in saved)
    assert not any("base_layer" in name or name.endswith((".U", ".V")) for name in saved)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "checkpoint-6")
    torch.testing.assert_close(dict(loaded.named_parameters()), dict(model.named_parameters()))


@pytest.mark.parametrize("coefficients", ["diagonal", "rotation"])
def test_training_goes_on_from_a_checkpoint(coefficients, tmp_path):
    case = CASES["bert"]

    def run(folder, resume=None):
        model = case.adapted(coefficients=coefficients, init_weights=True)
        Trainer(model, arguments(folder, max_steps=4), train_dataset=rows()).train(resume_from_checkpoint=resume)
        return case.output(model.eval())

    expected = run(tmp_path)
    torch.testing.assert_close(run(tmp_path / "again", str(tmp_path / "checkpoint-2")), expected)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    case = CASES["bert"]
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 2.0}
    model = case.adapted(init_weights=True)
    trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=rows(), eval_dataset=rows())
    trainer.train()
    best = PeftModel.from_pretrained(case.base(), trainer.state.best_model_checkpoint)
    torch.testing.assert_close(case.output(model.eval()), case.output(best))


def test_auto_classes_find_the_base_by_its_name(tmp_path):
    case = CASES["bert"]
    base = case.base()
    base.save_pretrained(tmp_path / "base")
    named = type(base).from_pretrained(tmp_path / "base")
    model = get_peft_model(named, case.settings()).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(case.output(loaded), case.output(model))
