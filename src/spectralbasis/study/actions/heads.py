"""A model at its pretrained weights under a head that was trained on the task alone."""

import tempfile
from pathlib import Path
from typing import Any

from spectralbasis.study.models.loading import LoadedModel, load_model
from spectralbasis.study.tasks.task import Task
from spectralbasis.study.training.tuning import tune


def with_trained_head(model: str, task: Task, *, steps: int, max_length: int, seed: int, **options: Any) -> LoadedModel:
    """Train the head alone for some steps and open the result; with no steps, the head is as drawn.

    A gradient at a random head says more of the draw than of the task.

    Args:
        model: as `load_model` takes it.
        task: with its examples.
        steps: of training the head.
        max_length: tokens at which texts are cut.
        seed: of the head and the order of examples.
        options: further ones of `tune`.
    """
    if steps == 0:
        return load_model(model, task, seed=seed, max_length=max_length)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "head"
        tune(
            model, task=task, output=folder, method="head", steps=steps, max_length=max_length, seed=seed,
            progress=False, **options,
        )  # fmt: skip
        return load_model(folder, task, head="stored", max_length=max_length)
