"""Measure how training changes the matrices of a model at chosen steps, compare with a null, and summarise."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spectralbasis.checkpoints import Matrix, logical_matrices, open_checkpoint
from spectralbasis.comparison import metrics
from spectralbasis.comparison.measuring import USUAL_DRAWS, closed_form
from spectralbasis.comparison.metrics import Measurements, Window
from spectralbasis.comparison.nulls import NULLS, SingularVectors
from spectralbasis.comparison.summary import CEILING
from spectralbasis.errors import InputError
from spectralbasis.linalg import (
    Leading,
    LeadingSVD,
    leading_svd,
    leading_svd_and_values,
    resolve_leading,
    singular_values,
    trailing_vectors,
)
from spectralbasis.triplets import matrix_hash

TRAIN_LOSS = "train_loss"
COLUMNS = ("step", "matrix", "layer", "kind", "metric", "side", "value", "null_mean", "null_std", "null")
Values = dict[tuple[str, str], float]
"""(metric, side) → value."""


@dataclass(frozen=True)
class Origin:
    """A matrix before training, decomposed once.

    Attributes:
        W: (m, n), float32, a copy.
        hash: of its content, which fixes the draws.
        leading: its leading triplets.
        values: all its singular values.
        trailing: its trailing window, where that is measured.
    """

    W: Tensor
    hash: str
    leading: LeadingSVD
    values: Tensor
    trailing: Window | None

    @classmethod
    def of(cls, W: Tensor, leading: Leading, trailing: bool) -> "Origin":
        """Decompose a matrix; of one that is too small for so many directions, half of them are taken."""
        W = W.float().clone()
        most = max(1, min(W.shape) // 2)
        k = min(leading, most) if isinstance(leading, int) else min(resolve_leading(leading, W), most)
        found, values = leading_svd_and_values(W, k)
        return cls(W, matrix_hash(W), found, values, trailing_vectors(W, k) if trailing else None)

    @property
    def k(self) -> int:
        """Number of leading directions."""
        return self.leading.S.numel()

    @cached_property
    def vectors(self) -> SingularVectors:
        """All singular vectors, for nulls that are drawn in them."""
        return SingularVectors.of(self.W)


def measure_update(origin: Origin, W1: Tensor) -> Values:
    """Everything that is measured of a trained matrix, at the full number of leading directions.

    Args:
        origin: the matrix before training.
        W1: after, (m, n), float32, different from it.

    Returns:
        subspace_overlap, overlap_haar, and matched_cosine and assigned_cosine averaged over the directions, left and
        right; coverage_left, coverage_right, coverage_core, coverage_diagonal, update_norm_relative and wedin_bound;
        trailing_overlap, left and right, and trailing_coverage, where the origin has its trailing window. Definitions:
        docs/mathematics.md.
    """
    update = W1 - origin.W
    tuned = leading_svd(W1, origin.k)
    found = (
        _against_base(origin, update, tuned)
        | metrics.haar_overlaps((W1.shape[0], W1.shape[1]), origin.k)
        | metrics.wedin_bounds(origin.leading, tuned, float(singular_values(update)[0]))
    )
    cosines: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (metric, side, _, _), value in metrics.cosines(origin.leading, tuned).items():
        cosines[metric, side].append(value)
    norm = float(update.norm() / origin.W.norm())
    return (
        _at_full_k(found, origin.k)
        | {key: float(np.mean(values)) for key, values in cosines.items()}
        | {("update_norm_relative", "both"): norm}
    )


def measure_null(
    origin: Origin, W1: Tensor, null: str, draws: int | None, seed: int
) -> dict[tuple[str, str], tuple[float, float]]:
    """Mean and standard deviation under a null of overlap and coverage, leading and trailing, as `compare` has them.

    Args:
        origin: the matrix before training.
        W1: after, (m, n), float32, different from it.
        null: name of the null.
        draws: how many; None for the closed form where it holds, and `USUAL_DRAWS` elsewhere.
        seed: of the draws.
    """
    update, tuned_hash, record = W1 - origin.W, matrix_hash(W1), NULLS[null]
    known: dict[tuple[str, str], tuple[float, float]] = {}
    if draws is None:
        bound = 2 * origin.leading.subspace_error_bound
        moments, rotated = closed_form(
            record, origin.leading, origin.values, origin.trailing, update, singular_values(update), bound
        )
        known = {(metric, side): one for (metric, side, k, _), one in moments.items() if k == origin.k}
        if rotated and origin.trailing is None:
            return known
        draws = USUAL_DRAWS
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for chance in record.draws(update, draws, seed, origin.hash, tuned_hash, lambda: origin.vectors):
        found = _against_base(origin, chance, leading_svd(origin.W + chance, origin.k))
        for key, value in _at_full_k(found, origin.k).items():
            if key[0] not in record.keeps:
                values[key].append(value)
    drawn = {
        key: (float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else math.nan)
        for key, found in values.items()
    }
    return drawn | known


def _against_base(origin: Origin, update: Tensor, tuned: LeadingSVD) -> Measurements:
    """What has a null: overlaps and coverages of an update and the triplets that it leads to."""
    found = metrics.overlaps(origin.leading, tuned) | metrics.coverage_shares(
        origin.leading.U, origin.leading.Vh, update
    )
    if origin.trailing is not None:
        found |= metrics.trailing(origin.trailing, trailing_vectors(origin.W + update, origin.k), update)
    return found


def _at_full_k(found: Measurements, k: int) -> Values:
    return {(metric, side): value for (metric, side, j, _), value in found.items() if j == k}


class TrajectoryCallback(TrainerCallback):
    """Measures at chosen optimizer steps how far a fully finetuned model's matrices have moved, beside a null.

    Matrices that training has not changed by then, embedding tables and task heads are left out. A step costs a
    decomposition of each matrix and one for each draw of the null; with `trailing` about twice that.

    Args:
        base: what the matrices are compared with: a path, a module, a state dict; None is the model as it is when
            training begins. It is decomposed once.
        steps: optimizer steps to measure after, from 1; those beyond the last step are not reached.
        leading: number of leading directions, or a rule, as for `compare`; at most half of a matrix's smaller side.
        draws: draws of the null for each matrix and step; 0 for none; None for its closed form where that holds, and 5
            elsewhere, as for `compare`.
        nulls: names of nulls that `compare` knows; a matrix is measured against each.
        seed: of the draws.
        trailing: measure as many trailing directions too.

    Raises:
        InputError: an option cannot be; when training begins, the model carries an adapter or has no matrix that
            `base` has.
    """

    def __init__(
        self,
        base: Any = None,
        *,
        steps: Sequence[int],
        leading: Leading = 16,
        draws: int | None = None,
        nulls: Sequence[str] = ("scrambled",),
        seed: int = 0,
        trailing: bool = False,
    ) -> None:
        unknown = [null for null in nulls if null not in NULLS]
        if unknown or isinstance(nulls, str):
            raise InputError(f"nulls={nulls!r} names an unknown null; pass a list from {', '.join(NULLS)}")
        if (draws is not None and draws < 0) or any(step < 1 for step in steps):
            raise InputError(
                f"draws must be at least 0 (or None) and steps at least 1, got draws={draws} and steps={list(steps)}"
            )
        self.base, self.steps, self.leading = base, frozenset(steps), leading
        self.draws, self.nulls, self.seed, self.trailing = draws, tuple(nulls), seed, trailing
        self._rows: list[tuple[Any, ...]] = []
        self._losses: list[float] = []
        self._matrices: Mapping[str, Matrix] = {}
        self._origins: dict[str, Origin] = {}

    def table(self) -> pd.DataFrame:
        """All that was measured: the columns `COLUMNS`, one row per step, matrix, metric, side and null.

        `null` is empty, and `null_mean` NaN, where a metric has no null. The rows of the metric `train_loss` have no
        matrix: the mean training loss since the measurement before.
        """
        return pd.DataFrame(self._rows, columns=list(COLUMNS))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Copy and decompose what the model is compared with."""
        self._matrices = logical_matrices(open_checkpoint(model))[0]
        known = self._matrices if self.base is None else logical_matrices(open_checkpoint(self.base))[0]
        self._origins = {
            name: Origin.of(known[name].read(), self.leading, self.trailing)
            for name, matrix in self._matrices.items()
            if name in known and known[name].shape == matrix.shape
        }
        if not self._origins:
            raise InputError(
                f"{type(model).__name__} has no weight matrix that the base of its trajectory has too; "
                "pass the checkpoint that training starts from, or None"
            )
        self._hook = model.register_forward_hook(self._note_loss)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure, at the chosen steps."""
        if state.global_step in self.steps:
            self._rows += self._measure(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Release the model and the copies."""
        self._hook.remove()
        self._matrices, self._origins = {}, {}

    def _note_loss(self, module: nn.Module, _: Any, output: Any) -> None:
        loss = getattr(output, "loss", None)
        if module.training and loss is not None:
            self._losses.append(float(loss.detach()))

    @torch.no_grad()
    def _measure(self, step: int) -> Iterator[tuple[Any, ...]]:
        loss = float(np.mean(self._losses)) if self._losses else math.nan
        self._losses.clear()
        yield step, "", -1, "", TRAIN_LOSS, "both", loss, math.nan, math.nan, ""
        for name, origin in self._origins.items():
            matrix = self._matrices[name]
            W1 = matrix.read().float()
            if not bool(W1.isfinite().all()) or torch.equal(W1, origin.W):
                continue
            nulls = self.nulls if self.draws != 0 else ()
            chances = {null: measure_null(origin, W1, null, self.draws, self.seed) for null in nulls}
            for (metric, side), value in measure_update(origin, W1).items():
                place = step, name, matrix.layer, matrix.kind, metric, side, value
                found = {null: chance[metric, side] for null, chance in chances.items() if (metric, side) in chance}
                for null, (mean, std) in (found or {"": (math.nan, math.nan)}).items():
                    yield *place, mean, std, null


NOISE = 1e-7
"""Rotation (1 − overlap) that float32 vectors cannot tell from none."""
_LEAST = 1e-12
"""Coverage that counts as none, so that its logarithm exists."""
WITH_NULL = {
    "overlap": "subspace_overlap",
    "trailing_overlap": "trailing_overlap",
    "left": "coverage_left",
    "right": "coverage_right",
    "core": "coverage_core",
    "diagonal": "coverage_diagonal",
    "trailing_core": "trailing_coverage",
}
_ALONE = {
    "matched_cosine": "matched_cosine",
    "assigned_cosine": "assigned_cosine",
    "overlap_haar": "overlap_haar",
    "norm": "update_norm_relative",
    "wedin_bound": "wedin_bound",
}


def summarise_steps(measurements: pd.DataFrame, by: Sequence[str] = ("step",), null: str | None = None) -> pd.DataFrame:
    """Means over matrices and sides, a row for each value of `by`.

    Ratios to the null are taken in each matrix, of the means over its two sides, and their logarithms are averaged over
    matrices: in a ratio of means over matrices, the few that turn most would decide alone.

    Args:
        measurements: the rows of `TrajectoryCallback.table`, and columns of the caller's.
        by: columns that identify a row: of the table (`step`, `layer`, `kind`, `matrix`) or the caller's.
        null: which null's rows are taken; None where one alone was measured.

    Returns:
        `by` and, as far as they were measured, `overlap`, `trailing_overlap`, `left`, `right`, `core`, `diagonal`,
        `trailing_core`, each with its null's mean as `NAME_null`; `matched_cosine`, `assigned_cosine`, `overlap_haar`,
        `norm` (`‖ΔW‖/‖W0‖`) and `wedin_bound`; `forced`, the share of matrices in which Wedin's bound alone forces an
        overlap of `CEILING`, and `stable`, the share whose overlap reaches it; then, in doublings, means over matrices:
        `held` and `trailing_held` (see `halvings`), and `left_gain`, `right_gain`, `core_gain` and `diagonal_gain`, the
        coverage over what chance gives.

    Raises:
        ValueError: `null` is None, and several were measured.
    """
    keys = list(by)
    rows = measurements[measurements["metric"] != TRAIN_LOSS]
    if null is not None:
        chosen = rows["null"] == null
        rows = rows[chosen | ~rows["metric"].isin(set(rows.loc[chosen, "metric"]))]
    elif "null" in rows and len(several := sorted(set(rows["null"].dropna()) - {""})) > 1:
        raise ValueError(f"null=None, but {', '.join(several)} were measured; name one of them")
    means = rows.groupby([*keys, "metric"])[["value", "null_mean"]].mean().unstack("metric")
    columns = {name: means["value"].get(metric) for name, metric in (WITH_NULL | _ALONE).items()}
    columns |= {f"{name}_null": means["null_mean"].get(metric) for name, metric in WITH_NULL.items()}
    table = pd.DataFrame({name: column for name, column in columns.items() if column is not None}, index=means.index)
    for name, metric, reached in (
        ("forced", "wedin_bound", lambda bound: 1 - bound**2 >= CEILING),
        ("stable", "subspace_overlap", lambda overlap: overlap >= CEILING),
    ):
        measured = rows[rows["metric"] == metric]
        table[name] = reached(measured["value"]).groupby([measured[key] for key in keys]).mean()
    if "overlap_null" in table:
        each = rows.groupby([*dict.fromkeys([*keys, "matrix"]), "metric"])[["value", "null_mean"]].mean()
        for name, metric, ratio in _RATIOS:
            if f"{_NAMES[metric]}_null" in table:
                found = each.xs(metric, level="metric")
                table[name] = ratio(found["value"], found["null_mean"]).groupby(level=keys).mean()
    return table.reset_index()


def doublings(coverage: pd.Series, null: pd.Series) -> pd.Series:
    """How many times the null's coverage was doubled."""
    return pd.Series(np.log2(coverage.clip(lower=_LEAST) / null.clip(lower=_LEAST)))


def halvings(overlap: pd.Series, null: pd.Series) -> pd.Series:
    """How many times the null's rotation was halved: `log2((1 − φ_null) / (1 − φ))`, negative where it grew.

    It compares rotations, since overlaps near 1 leave a difference no room.
    """
    return pd.Series(np.log2((1 - null).clip(lower=NOISE) / (1 - overlap).clip(lower=NOISE)))


_NAMES = {metric: name for name, metric in WITH_NULL.items()}
_RATIOS = (
    ("held", "subspace_overlap", halvings),
    ("trailing_held", "trailing_overlap", halvings),
    *((f"{name}_gain", WITH_NULL[name], doublings) for name in ("left", "right", "core", "diagonal")),
)
"""Column, metric, and what is made of it in each matrix."""
