"""The action `exchange`: how far updates of other tasks, at the size of the task's own, turn the leading directions."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from spectralbasis.comparison import metrics
from spectralbasis.errors import InputError
from spectralbasis.linalg import leading_svd
from spectralbasis.study.runs import Outcome, Run, Site
from spectralbasis.study.starting import model_of
from spectralbasis.study.trajectories import COLUMNS, Origin

OTHER_TASKS = "other tasks"
"""Name of this null, in the column `null`."""


def exchange(run: Run, site: Site) -> Outcome:
    """Compare the overlap of each finetuned model with those that the updates of other tasks give.

    In each matrix, the null of task a is `W0 + ‖ΔW_a‖_F / ‖ΔW_b‖_F · ΔW_b`, over all b of other tasks. The needs are
    `tuned_0`, `tuned_1`, …, and `model`, the base, unless it is a setting. The settings are `tasks`, what each was
    tuned to, in their order, and `leading`, the number of directions.

    Returns:
        Rows `tuned` (its number), `task` and those of `TrajectoryCallback.table`, of the metric `subspace_overlap`; the
        step is the last, written as −1. The result has the number of `matrices`.

    Raises:
        InputError: all were tuned to one task, or there is no matrix that finetuning changed in two of them.
    """
    tasks, leading = run.settings["tasks"], run.settings["leading"]
    if len(set(tasks)) < 2:
        raise InputError(f"tasks={tasks} are one task; pass models that were tuned to two tasks or more")
    base = logical_matrices(open_checkpoint(model_of(run, site)))[0]
    tuned = [logical_matrices(open_checkpoint(site.needs[f"tuned_{number}"]))[0] for number in range(len(tasks))]
    rows: list[tuple[Any, ...]] = []
    for name, matrix in base.items():
        if not all(name in one and one[name].shape == matrix.shape for one in tuned):
            continue
        W0 = matrix.read().float()
        updates = [one[name].read().float() - W0 for one in tuned]
        for number, side, value, mean, std in exchanged(W0, updates, tasks, leading):
            place = number, tasks[number], -1, name, matrix.layer, matrix.kind
            rows.append((*place, "subspace_overlap", side, value, mean, std, OTHER_TASKS))
    if not rows:
        raise InputError("no matrix was changed in models of two tasks; pass models that were tuned in full")
    table = pd.DataFrame(rows, columns=["tuned", "task", *COLUMNS])
    return Outcome({"matrices": int(table["matrix"].nunique())}, table)


def exchanged(
    W0: Tensor, updates: Sequence[Tensor], tasks: Sequence[str], leading: int
) -> Iterator[tuple[int, str, float, float, float]]:
    """The overlap under each update, and mean and standard deviation of those under other tasks' updates of its size.

    Args:
        W0: base, (m, n), float32.
        updates: ΔW of each finetuned model; those that are zero give no row, and are no other's null.
        tasks: of each.
        leading: number of directions; of a matrix that is too small, half of them.

    Yields:
        Number of the update, side, overlap, and the null's mean and standard deviation (NaN of a single one).
    """
    origin = Origin.of(W0, leading, trailing=False)
    norms = [float(update.norm()) for update in updates]
    for a, update in enumerate(updates):
        others = [b for b, task in enumerate(tasks) if task != tasks[a] and norms[b] > 0]
        if not norms[a] or not others:
            continue
        seen = _overlaps(origin, update)
        drawn = [_overlaps(origin, updates[b] * (norms[a] / norms[b])) for b in others]
        for side, value in seen.items():
            values = [one[side] for one in drawn]
            yield a, side, value, float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _overlaps(origin: Origin, update: Tensor) -> dict[str, float]:
    """Left and right, at the full number of directions."""
    with torch.no_grad():
        found = metrics.overlaps(origin.leading, leading_svd(origin.W + update, origin.k))
    return {side: value for (_, side, k, _), value in found.items() if k == origin.k}
