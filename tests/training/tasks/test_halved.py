"""A held-out split in two halves: one to choose settings by, one to report on."""

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
