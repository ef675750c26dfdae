"""Hiding tokens of passages, and scoring how a model fills them in."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import BertForMaskedLM

from spectralbasis.errors import InputError
from spectralbasis.training import evaluate, load_model, tune
from spectralbasis.training.evaluation import score_task, token_scores
from spectralbasis.training.text_tasks import masked_language_task
from tests.training.examples import WORDS, save_image_model, save_text_model

SENTENCE = " ".join(WORDS[:10])


@pytest.fixture
def task():
    return masked_language_task("words", [SENTENCE] * 64, ["the film is good", SENTENCE] * 4, "end")


@pytest.fixture
def source(tmp_path):
    return save_text_model(tmp_path / "model")


def collator_of(source, task):
    return load_model(source, task, max_length=16).collator


def test_labels_are_the_tokens_that_were_hidden_and_nothing_else_changed(source, task):
    collator = collator_of(source, task)
    batch = collator([{"text": SENTENCE}] * 2000)
    whole = collator.tokenizer([SENTENCE] * 2000, return_tensors="pt")["input_ids"]
    hidden = batch["labels"] != -100
    assert torch.equal(batch["labels"][hidden], whole[hidden])
    assert torch.equal(batch["input_ids"][~hidden], whole[~hidden])
    assert set(hidden.sum(1).tolist()) == {round(0.15 * 10)}
    assert not hidden[:, [0, -1]].any()
    assert hidden[:, 1:-1].any(0).all()


def test_eight_in_ten_hidden_tokens_are_masked_and_one_in_ten_stays(source, task):
    collator = collator_of(source, task)
    batch = collator([{"text": SENTENCE}] * 3000)
    hidden = batch["labels"] != -100
    tokens, labels = batch["input_ids"][hidden], batch["labels"][hidden]
    masked = tokens == collator.tokenizer.mask_token_id
    by_chance = 0.1 / len(collator.tokenizer)
    assert masked.float().mean().item() == pytest.approx(0.8 + by_chance, abs=0.02)
    assert (tokens == labels).float().mean().item() == pytest.approx(0.1 + by_chance, abs=0.02)


def test_a_row_with_a_seed_is_masked_alike_in_any_company(source, task):
    collator = collator_of(source, task)
    row = {"text": "the film is good", "mask_seed": 3}
    alone, beside = collator([row]), collator([{"text": SENTENCE, "mask_seed": 1}, row])
    length = alone["labels"].shape[1]
    assert torch.equal(alone["labels"][0], beside["labels"][1, :length])
    assert torch.equal(alone["input_ids"][0], beside["input_ids"][1, :length])
    assert (beside["labels"][1, length:] == -100).all()


def test_rows_without_a_seed_are_masked_anew_each_time(source, task):
    collator = collator_of(source, task)
    assert not torch.equal(*(collator([{"text": SENTENCE}] * 20)["labels"] for _ in range(2)))


def test_a_short_text_has_one_hidden_token_and_an_empty_one_none(source, task):
    collator = collator_of(source, task)
    batch = collator([{"text": "good"}, {"text": ""}])
    assert (batch["labels"] != -100).sum(1).tolist() == [1, 0]


def test_scores_are_those_of_the_definitions(source, task):
    loaded = load_model(source, task, max_length=16)
    scores = token_scores(loaded.model, task.evaluation, loaded.collator)
    logs, hits = [], []
    for row in task.evaluation:
        batch = loaded.collator([row])
        labels = batch.pop("labels")[0]
        with torch.no_grad():
            log_probabilities = loaded.model(**batch).logits[0].log_softmax(1)
        for position in (labels != -100).nonzero()[:, 0]:
            logs.append(log_probabilities[position, labels[position]].item())
            hits.append(log_probabilities[position].argmax() == labels[position])
    mean = sum(logs) / len(logs)
    expected = {"log_likelihood": mean, "perplexity": math.exp(-mean), "accuracy": sum(hits).item() / len(hits)}
    assert scores == pytest.approx(expected, rel=1e-5)


def test_what_fills_in_words_is_kept_where_the_checkpoint_has_it(tmp_path, source, task):
    assert load_model(source, task, max_length=16).head == ("cls",)
    filled = tmp_path / "filled"
    loaded = load_model(source, task, max_length=16)
    loaded.save(filled)
    again = load_model(filled, task, max_length=16, seed=1)
    assert again.head == ()
    assert torch.equal(again.model.cls.predictions.transform.dense.weight,
                       loaded.model.cls.predictions.transform.dense.weight)  # fmt: skip
    assert isinstance(again.model, BertForMaskedLM)


def test_a_model_that_reads_no_text_is_refused(tmp_path, task):
    with pytest.raises(InputError, match="is a vit model, which cannot fill in masked words; the task words"):
        load_model(save_image_model(tmp_path / "images"), task)


@pytest.mark.parametrize(("method", "rate"), [("full", 1e-2), ("spectral", 0.2), ("lora", 1e-2)])
def test_tuning_learns_to_fill_in_and_evaluates_to_the_same(tmp_path, source, task, method, rate):
    base = tmp_path / "base"
    load_model(source, task, max_length=16).save(base)
    options = {"max_length": 16, "steps": 60, "learning_rate": rate, "progress": False}
    result = tune(base, task=task, output=tmp_path / "tuned", method=method, **options)
    before = load_model(base, task, max_length=16)
    start = token_scores(before.model, task.evaluation, before.collator)
    assert result.metric == "log_likelihood"
    assert result.score > start["log_likelihood"] + 0.2
    places = (tmp_path / "tuned",) if method == "full" else (base, tmp_path / "tuned")
    again = evaluate(*places, task=task, progress=False)
    assert again.metrics == pytest.approx(result.metrics, rel=1e-5)


def test_a_model_that_writes_learns_each_next_token_of_the_same_text(tmp_path, writer, task):
    options = {"task": task, "progress": False}
    result = tune(writer, output=tmp_path / "tuned", method="full", steps=30, learning_rate=1e-2, **options)
    before = load_model(writer, replace(task, kind="causal_language"))
    assert result.metric == "log_likelihood"
    assert result.score > score_task(before.model, before.task, before.collator, progress=False)["log_likelihood"] + 1
    again = evaluate(tmp_path / "tuned", **options)
    assert again.metrics == pytest.approx(result.metrics, rel=1e-5)


def test_passages_held_out_of_training_are_masked_alike_every_time(source, task):
    parted = task.held_out_of_train(0.25)
    assert (len(parted.train), len(parted.selection)) == (48, 16)
    assert parted.train.column_names == ["text"]
    loaded = load_model(source, parted, max_length=16)
    scores = [token_scores(loaded.model, parted.selection, loaded.collator) for _ in range(2)]
    assert scores[0] == scores[1]
    assert len({tuple(loaded.collator([row])["labels"][0].tolist()) for row in parted.selection}) > 4
