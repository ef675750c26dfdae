"""Reading tuned models back, and models that cannot be."""

import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageClassification

from spectralbasis.errors import BaseMismatchError, InputError
from spectralbasis.training import Task, evaluate, load_model, load_task, tune
from spectralbasis.training.evaluation import all_outputs
from tests.training.examples import bright_side_task, save_image_model, save_text_model, write_tsv

SHORT = {"steps": 2, "batch_size": 8, "progress": False}


@pytest.fixture
def task():
    return bright_side_task()


def test_an_adapter_on_another_base_is_refused(tmp_path, task):
    base, other = save_image_model(tmp_path / "base"), save_image_model(tmp_path / "other")
    tune(base, task=task, output=tmp_path / "adapter", leading=4, **SHORT)
    with pytest.raises(BaseMismatchError):
        evaluate(other, tmp_path / "adapter", task=task, progress=False)


def test_an_adapter_for_other_shapes_is_refused(tmp_path, task):
    base = save_image_model(tmp_path / "base")
    tune(base, task=task, output=tmp_path / "adapter", method="lora", **SHORT)
    ten_classes = bright_side_task(classes=10)
    with pytest.raises(InputError, match=r"adapter does not fit .*base"):
        evaluate(base, tmp_path / "adapter", task=ten_classes, progress=False)


def test_an_adapter_without_a_head_is_refused(tmp_path, task):
    base = save_image_model(tmp_path / "base")
    model = AutoModelForImageClassification.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules="all-linear", exclude_modules=["classifier"])).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(InputError, match=r"has no head for bright side.*modules_to_save=\['classifier'\]"):
        evaluate(base, tmp_path / "adapter", task=task, progress=False)


def test_a_model_given_as_adapter_is_refused(tmp_path, task):
    base = save_image_model(tmp_path / "base")
    with pytest.raises(InputError, match=r"base has no adapter_config\.json"):
        evaluate(base, base, task=task, progress=False)


def test_a_base_without_a_head_for_the_task_is_refused(tmp_path, task):
    with pytest.raises(InputError, match="has no head for bright side"):
        evaluate(save_image_model(tmp_path / "base"), task=task, progress=False)


def test_an_adapter_serves_a_copy_of_its_base_elsewhere(tmp_path, task):
    base = save_image_model(tmp_path / "base")
    tuned = tune(base, task=task, output=tmp_path / "adapter", leading=4, **SHORT)
    shutil.move(base, tmp_path / "moved")
    assert evaluate(tmp_path / "moved", tmp_path / "adapter", task=task, progress=False).score == tuned.score


def test_the_length_of_texts_is_that_of_the_tuning(tmp_path):
    rows = [("a " * 12 + word, label) for word, label in (("good", "1"), ("bad", "0")) for _ in range(8)]
    for name in ("train", "dev"):
        write_tsv(tmp_path / "SST-2" / f"{name}.tsv", [("sentence", "label"), *rows])
    base, tuned = save_text_model(tmp_path / "base"), tmp_path / "tuned"
    blind = tune(base, task="sst2", data=tmp_path, output=tuned, method="full", steps=2, max_length=8, progress=False)
    assert blind.score == 0.5
    assert evaluate(tuned, task="sst2", data=tmp_path, progress=False).score == 0.5


def test_predictions_are_the_models_outputs_in_the_order_of_the_examples(tmp_path):
    images = np.random.default_rng(0).uniform(size=(150, 8, 8))
    labels = np.arange(150) % 3
    task = Task.from_arrays("noise", (images, labels), (images, labels))
    loaded = load_model(save_image_model(tmp_path / "model"), task)
    outputs, references = all_outputs(loaded.model, task.evaluation, loaded.collator)
    pixels = torch.tensor(images, dtype=torch.float32)[:, None] * 2 - 1
    with torch.no_grad():
        expected = loaded.model.eval()(pixel_values=pixels).logits.numpy()
    assert outputs == pytest.approx(expected, abs=1e-5)
    assert references.tolist() == labels.tolist()


def test_a_regression_is_scored_by_its_correlations(tmp_path):
    header = (*["x"] * 7, "sentence1", "sentence2", "score")
    for name in ("train", "dev"):
        rows = [(*["x"] * 7, "the film is", text, str(score)) for text, score in (("bad", 0.5), ("good", 4.5)) * 8]
        write_tsv(tmp_path / "data" / "STS-B" / f"{name}.tsv", [header, *rows])
    base = save_text_model(tmp_path / "base")
    result = tune(
        base, task="stsb", data=tmp_path / "data", output=tmp_path / "tuned", method="full", steps=60, max_length=16,
        learning_rate=3e-3, head_learning_rate=2e-2, progress=False,
    )  # fmt: skip
    assert set(result.metrics) == {"pearson", "spearman", "pearson_spearman"}
    assert result.score > 0.9
    assert load_task("stsb", tmp_path / "data").num_labels == 1
