"""The actions `diagnose` and `power_laws`: what the field looks at beside singular vectors, before and after tuning."""

from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from spectralbasis.study.actions.inputs import halved_task, model_of
from spectralbasis.study.measures.activations import Floats, layer_activations, linear_cka, linear_probe, svcca
from spectralbasis.study.measures.power_laws import power_law_exponents
from spectralbasis.study.models.loading import LoadedModel, load_model
from spectralbasis.study.runs import Outcome, Run, Site
from spectralbasis.study.tasks.arrays import LABEL, batches

Rows = Iterator[dict[str, Any]]


def diagnose(run: Run, site: Site) -> Outcome:
    """Compare the activations of a model before and after full finetuning, and what probes read off each layer.

    The needs are `tuned`, a whole model, and `model`, what it was before, unless that is a setting. The settings are
    `task`, `examples` (of the reporting half, at most), `probe_examples` (of the training examples, at most) and
    `max_length`.

    Returns:
        Rows `layer, matrix, metric, value`, where `matrix` is empty. For each layer from 0, and −1 for the embeddings,
        `cka` and `svcca` between before and after; for tasks with labels `probe_before` and `probe_after`, accuracy or
        Pearson's correlation.
    """
    return _outcome(_activations(*_before_and_after(run, site), run.settings, run.seed))


def power_laws(run: Run, site: Site) -> Outcome:
    """Fit the power-law exponents of a model's matrices before and after full finetuning.

    The needs are those of `diagnose`, the settings `task` and `max_length`.

    Returns:
        Rows `layer, matrix, metric, value`: for each matrix `power_law_before` and `power_law_after`. Its result also
        names the version of `weightwatcher`.

    Raises:
        InputError: `weightwatcher` is not installed.
    """
    found = _outcome(_power_laws(*_before_and_after(run, site)))
    return Outcome({**found.result, "weightwatcher": version("weightwatcher")}, found.measurements)


def _before_and_after(run: Run, site: Site) -> tuple[LoadedModel, LoadedModel]:
    task, length = halved_task(run.settings["task"], site), run.settings.get("max_length", 64)
    before = load_model(model_of(run, site), task, seed=run.seed, max_length=length)
    return before, load_model(site.needs["tuned"], task, head="stored", max_length=length)


def _outcome(rows: Iterable[dict[str, Any]]) -> Outcome:
    table = pd.DataFrame(rows, columns=["layer", "matrix", "metric", "value"])
    means = table.groupby("metric")["value"].mean()
    return Outcome({str(metric): float(value) for metric, value in means.items()}, table)


def _activations(before: LoadedModel, after: LoadedModel, settings: Any, seed: int) -> Rows:
    task = before.task
    held_out = _rows_of(task.evaluation, settings["examples"], seed)
    states = [layer_activations(one.model, held_out, one.collator) for one in (before, after)]
    for layer, (X, Y) in enumerate(zip(*states, strict=True), start=-1):
        yield _row(layer, "cka", linear_cka(X, Y))
        yield _row(layer, "svcca", svcca(X, Y))
    if task.kind == "masked_language":
        return
    seen = _rows_of(task.train, settings["probe_examples"], seed)
    for name, one, unseen in zip(("before", "after"), (before, after), states, strict=True):
        for layer, (X, Y) in enumerate(zip(layer_activations(one.model, seen, one.collator), unseen, strict=True), -1):
            score = linear_probe((X, _labels(seen)), (Y, _labels(held_out)), regression=task.kind == "regression")
            yield _row(layer, f"probe_{name}", score)


def _power_laws(before: LoadedModel, after: LoadedModel) -> Rows:
    for name, one in (("before", before), ("after", after)):
        matrices = logical_matrices(open_checkpoint(one.model))[0]
        for matrix, exponent in power_law_exponents(one.model, set(matrices)).items():
            yield _row(matrices[matrix].layer, f"power_law_{name}", exponent, matrix)


def _row(layer: int, metric: str, value: float, matrix: str = "") -> dict[str, Any]:
    return {"layer": layer, "matrix": matrix, "metric": metric, "value": value}


def _rows_of(examples: Dataset, most: int, seed: int) -> list[dict[str, Any]]:
    """A sample of the examples, drawn by the seed, or all where there are no more."""
    chosen = np.random.default_rng(seed).permutation(len(examples))[:most]
    return [row for rows in batches(examples.select(chosen), 64) for row in rows]


def _labels(rows: Sequence[dict[str, Any]]) -> Floats:
    return np.array([row[LABEL] for row in rows], dtype=np.float64)
