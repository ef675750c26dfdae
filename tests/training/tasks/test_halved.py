"""Examples to choose settings by: a half of the held-out ones, or a part of those to train on."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectralbasis.errors import InputError
from spectralbasis.training import Task, tune
from tests.training.examples import bright_side_task, save_image_model


def numbered_task(labels: list[int]) -> Task:
    """Images that say by their first pixel which one they are."""
    images = np.zeros((len(labels), 2, 2), np.uint8)
    images[:, 0, 0] = np.arange(len(labels))
    examples = images, np.array(labels)
    return Task.from_arrays("numbered", examples, examples, label_names=["a", "b", "c"])


def numbers(dataset) -> list[int]:
    return [int(row["image"][0, 0, 0]) for row in dataset]


@given(st.lists(st.integers(0, 2), min_size=2, max_size=60), st.integers(0, 5))
def test_halves_part_the_examples_and_each_label_among_them(labels, seed):
    halved = numbered_task(labels).halved(seed)
    assert sorted(numbers(halved.selection) + numbers(halved.evaluation)) == list(range(len(labels)))
    for label in range(3):
        counts = [sum(row["label"] == label for row in half) for half in (halved.selection, halved.evaluation)]
        assert abs(counts[0] - counts[1]) <= 1


def test_halves_are_fixed_by_the_seed_and_leave_training_alone():
    task = numbered_task([0, 1] * 20)
    first, same, other = task.halved(), task.halved(0), task.halved(1)
    assert numbers(first.evaluation) == numbers(same.evaluation) != numbers(other.evaluation)
    assert first.train is task.train
    assert first.evaluation_split != task.evaluation_split


@given(st.lists(st.integers(0, 2), min_size=2, max_size=60), st.integers(0, 5))
def test_a_part_held_out_of_training_is_not_trained_on_and_leaves_all_of_the_rest_to_score_on(labels, seed):
    task = numbered_task(labels)
    parted = task.held_out_of_train(0.25, seed=seed)
    assert sorted(numbers(parted.selection) + numbers(parted.train)) == list(range(len(labels)))
    assert len(parted.selection) == max(1, round(0.25 * len(labels)))
    assert parted.evaluation is task.evaluation
    for label in range(3):
        taken = sum(row["label"] == label for row in parted.selection)
        assert abs(taken - 0.25 * labels.count(label)) <= 1.5


def test_no_more_is_held_out_of_training_than_was_asked_for():
    task = numbered_task([0, 1] * 50)
    assert len(task.held_out_of_train(0.5, most=7).selection) == 7
    with pytest.raises(InputError, match="has a selection split already"):
        task.held_out_of_train().held_out_of_train()
    with pytest.raises(InputError, match="numbered has 1 training example; holding some out needs two"):
        numbered_task([0]).held_out_of_train()


def test_what_cannot_be_halved_is_refused():
    with pytest.raises(InputError, match="numbered has 1 example; halving needs"):
        numbered_task([0]).halved()
    with pytest.raises(InputError, match="has a selection split already"):
        numbered_task([0, 1, 1, 0]).halved().halved()


def test_tune_scores_both_halves(tmp_path):
    model = save_image_model(tmp_path / "model")
    options = {"method": "head", "steps": 5, "progress": False}
    whole = tune(model, task=bright_side_task(), output=tmp_path / "whole", **options)
    halved = tune(model, task=bright_side_task().halved(), output=tmp_path / "halved", **options)
    assert (halved.score + halved.selection_score) / 2 == pytest.approx(whole.score)
    assert halved.selection_metrics == {"accuracy": halved.selection_score}
    assert (whole.selection_score, whole.selection_metrics) == (None, None)
    written = [json.loads((tmp_path / name / "tuning.json").read_text()) for name in ("whole", "halved")]
    assert ["selection_score" in content for content in written] == [False, True]
    assert written[1]["selection_score"] == halved.selection_score
