"""The metrics of a pair of matrices, as pure functions; docs/mathematics.md defines them.

A measurement has the key (metric, side, k, index): the metric name, "left", "right" or "both", the number of leading
directions, and the direction (from 0) or -1. `Row` and `SharedRow` are a line of `comparison.parquet` and of
`sharing.parquet`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectralbasis.comparison.coverage_moments import Coverage, Key, Moments, UpdateSums
from spectralbasis.comparison.nulls import HAAR
from spectralbasis.linalg import (
    LeadingSVD,
    assigned_cosines,
    cross_cosines,
    matched_cosines,
    overlaps_by_k,
    wedin_bound,
)
from spectralbasis.linalg.row_blocks import MatrixLike, frobenius_norm, times, transposed_times
from spectralbasis.linalg.svd import largest_cosines
from spectralbasis.triplets import Triplets

if TYPE_CHECKING:
    import pandas as pd

Measurements = dict[Key, float]
Factors = LeadingSVD | Triplets
Window = tuple[Tensor, Tensor]

INTRUDER_WINDOW = 10
INTRUDER_COSINE = 0.5


def leading_grid(k: int) -> list[int]:
    """The numbers of directions that curves are drawn over: 1, 2, 4, … below k, then k."""
    return [2**power for power in range(k.bit_length()) if 2**power < k] + [k]


def overlaps(base: Factors, tuned: Factors) -> Measurements:
    """Subspace overlap, left and right, for every number of directions in the grid."""
    left, right = (overlaps_by_k(cosines) for cosines in _cosines(base, tuned).values())
    return _over_grid("subspace_overlap", "left", left) | _over_grid("subspace_overlap", "right", right)


def coverages(base: Factors, update: MatrixLike) -> Measurements:
    """Share of `‖ΔW‖_F²` in the leading directions of the base: see `coverage_shares`."""
    return coverage_shares(base.U, base.Vh, update)


def coverage_shares(U: Tensor, Vh: Tensor, update: MatrixLike) -> Measurements:
    """Share of a matrix's squared norm in the first k directions: diagonal, core, left and right, over the grid.

    Args:
        U: (m, k), columns orthonormal.
        Vh: (k, n), rows orthonormal.
        update: (m, n), not zero.
    """
    total = frobenius_norm(update).square()
    left = transposed_times(update, U.double()).T
    right = times(update, Vh.double().T)
    core = left @ Vh.double().T
    return (
        _over_grid("coverage_left", "left", left.square().sum(1).cumsum(0) / total)
        | _over_grid("coverage_right", "right", right.square().sum(0).cumsum(0) / total)
        | _over_grid("coverage_core", "both", core.square().cumsum(0).cumsum(1).diagonal() / total)
        | _over_grid("coverage_diagonal", "both", core.diagonal().square().cumsum(0) / total)
    )


def coverage_moments(
    coverage: Coverage, update: MatrixLike, sums: UpdateSums, U: Tensor, Vh: Tensor
) -> dict[Key, Moments]:
    """The moments of `coverage_shares` under a null, by the same keys.

    Args:
        coverage: of the null.
        update: ΔW, (m, n), not zero.
        sums: of the update.
        U: (m, k), columns orthonormal.
        Vh: (k, n), rows orthonormal.
    """
    return {
        (metric, side, k, -1): moments[k - 1]
        for (metric, side), moments in coverage(update, sums, U, Vh).items()
        for k in leading_grid(len(Vh))
    }


def trailing(base: Window, tuned: Window, update: MatrixLike) -> Measurements:
    """Overlap of the trailing windows, left and right, and the share of the update in the core of the base's.

    Args:
        base: U (m, k) and V (n, k) of W0's smallest singular values, the smallest first.
        tuned: those of W1.
        update: ΔW, (m, n), not zero.
    """
    left, right = (overlaps_by_k(cross_cosines(*vectors)) for vectors in zip(base, tuned, strict=True))
    shares = coverage_shares(base[0], base[1].T, update)
    core = {k: value for (metric, _, k, _), value in shares.items() if metric == "coverage_core"}
    return (
        _over_grid("trailing_overlap", "left", left)
        | _over_grid("trailing_overlap", "right", right)
        | {("trailing_coverage", "both", k, -1): value for k, value in core.items()}
    )


def cosines(base: Factors, tuned: Factors) -> Measurements:
    """Matched and assigned cosines of each leading direction, left and right."""
    rules = {"matched_cosine": matched_cosines, "assigned_cosine": assigned_cosines}
    k = base.S.numel()
    return {
        (metric, side, k, index): value
        for side, cross in _cosines(base, tuned).items()
        for metric, rule in rules.items()
        for index, value in enumerate(rule(cross).tolist())
    }


def haar_overlaps(shape: tuple[int, int], k: int) -> Measurements:
    """What two unrelated subspaces overlap by on average, for every number of directions in the grid."""
    m, n = shape
    means = {side: HAAR.closed_forms["subspace_overlap", side] for side in ("left", "right")}
    return {("overlap_haar", side, j, -1): mean(j, m, n) for side, mean in means.items() for j in leading_grid(k)}


def spectra(base: Factors, tuned: Factors) -> Measurements:
    """Leading singular values before and after, and their relative shift `(σ1 − σ0) / σ0`."""
    k = base.S.numel()
    before, after = base.S.double(), tuned.S.double()
    series = {
        "singular_value_base": before,
        "singular_value_tuned": after,
        "singular_value_shift": (after - before) / before,
    }
    return {
        (metric, "both", k, index): value
        for metric, values in series.items()
        for index, value in enumerate(values.tolist())
        if math.isfinite(value)
    }


def intruders(base: Factors, tuned: Factors, W0: MatrixLike) -> Measurements:
    """Largest `|cos|` of each of the tuned top 10 left vectors to any left vector of the base, and how many are new.

    A vector whose largest cosine is below 0.5 is an intruder dimension (Shuttleworth et al., 2410.21228). The base's
    leading vectors settle most: no other vector can be closer than what they leave of the tuned vector. Only where that
    leaves doubt is `W0` decomposed in full.
    """
    top = min(INTRUDER_WINDOW, tuned.S.numel())
    U1 = tuned.U[:, :top].double()
    cosines = (base.U.double().T @ U1).abs()
    largest = cosines.amax(0)
    remaining = (1 - cosines.square().sum(0)).clamp_min(0).sqrt()
    if bool((remaining > largest).any()):
        largest = largest_cosines(W0, U1)
    values = {("max_cosine", "left", top, index): value for index, value in enumerate(largest.tolist())}
    return values | {("intruders", "left", top, -1): float((largest < INTRUDER_COSINE).sum())}


def sizes(spectra: Mapping[str, Tensor], norms: Mapping[str, float], k: int) -> Measurements:
    """Norm of the update, absolute and relative, and the ranks of `W0`, `W1` and `ΔW`.

    Args:
        spectra: all singular values of the "base", the "tuned" matrix and the "update".
        norms: their `‖·‖_F`, which are more accurate than the sums of squares of values in float32.
        k: the number of leading directions that the rows are filed under.
    """
    values = {"update_norm": norms["update"]}
    if norms["base"] > 0:
        values["update_norm_relative"] = norms["update"] / norms["base"]
    for name, S in spectra.items():
        if norms[name] > 0:
            values[f"stable_rank_{name}"] = (norms[name] / float(S[0])) ** 2
            values[f"effective_rank_{name}"] = effective_rank(S)
    return {(metric, "both", k, -1): value for metric, value in values.items()}


def wedin_bounds(base: Factors, tuned: Factors, update_norm: float) -> Measurements:
    """Largest sine of rotation that the spectral norm of ΔW allows, for every number of directions in the grid."""
    after = [*tuned.S.tolist(), tuned.next_singular_value]
    return {
        ("wedin_bound", "both", k, -1): wedin_bound(float(base.S[k - 1]), after[k], update_norm)
        for k in leading_grid(base.S.numel())
    }


def stable_rank(S: Tensor) -> float:
    """`‖W‖_F² / ‖W‖₂²` from all singular values (descending, not all zero); between 1 and the rank."""
    return float((S / S[0]).square().sum())


def effective_rank(S: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values (Roy & Vetterli, EUSIPCO 2007); 1 up to the rank."""
    shares = S / S.sum()
    return math.exp(-float(torch.special.xlogy(shares, shares).sum()))


def _over_grid(metric: str, side: str, by_k: Tensor) -> Measurements:
    """Entry k − 1 of values by number of directions, (most,), for every k of the grid."""
    return {(metric, side, k, -1): float(by_k[k - 1]) for k in leading_grid(len(by_k))}


def _cosines(base: Factors, tuned: Factors) -> dict[str, Tensor]:
    """Of the unit vectors: rounding to float32 leaves norms that differ from 1 by what small updates turn."""
    left, right = cross_cosines(base.U, tuned.U), cross_cosines(base.Vh.T, tuned.Vh.T)
    return {
        "left": left / (_norms(base.U)[:, None] * _norms(tuned.U)),
        "right": right / (_norms(base.Vh.T)[:, None] * _norms(tuned.Vh.T)),
    }


def _norms(vectors: Tensor) -> Tensor:
    """Of the columns, (k,), float64."""
    return vectors.double().norm(dim=0)


@dataclass(frozen=True, slots=True)
class Row:
    """A measurement; the fields are the table's columns in their order.

    `k` is the number of leading directions that the row speaks of, `side` is "left", "right" or "both", `index` is the
    direction (from 0) or -1. The last six are empty where the measurement has no null; `null_from` is "closed form" or
    "draws".
    """

    tuned: str
    matrix: str
    layer: int
    kind: str
    m: int
    n: int
    k: int
    metric: str
    side: str
    index: int
    value: float
    null: str = ""
    null_mean: float = math.nan
    null_std: float = math.nan
    z: float = math.nan
    p_value: float = math.nan
    null_from: str = ""


@dataclass(frozen=True, slots=True)
class SharedRow:
    """A measurement between two finetuned checkpoints; as `Row`, but for `tuned_a` and `tuned_b`.

    `base_overlap_a` and `base_overlap_b` are what the base's leading subspace overlaps with each of theirs, beside a
    `subspace_overlap`.
    """

    tuned_a: str
    tuned_b: str
    matrix: str
    layer: int
    kind: str
    m: int
    n: int
    k: int
    metric: str
    side: str
    value: float
    null: str = ""
    null_mean: float = math.nan
    null_std: float = math.nan
    z: float = math.nan
    p_value: float = math.nan
    base_overlap_a: float = math.nan
    base_overlap_b: float = math.nan
    null_from: str = ""


_VALUES = {kind: attrgetter(*(field.name for field in fields(kind))) for kind in (Row, SharedRow)}


def row_values(row: Row | SharedRow) -> tuple[Any, ...]:
    """The values of a row, in the order of its fields."""
    return _VALUES[type(row)](row)


def to_frame(rows: Iterable[Row | SharedRow], kind: type[Row | SharedRow] = Row) -> "pd.DataFrame":
    """The rows, all of one kind, as a table with one column per field, also where there are none."""
    import pandas as pd

    names = [field.name for field in fields(kind)]
    columns = list(zip(*map(row_values, rows), strict=True)) or [()] * len(names)
    frame = pd.DataFrame(dict(zip(names, columns, strict=True)))
    types = {int: "int64", float: "float64"}
    return frame.astype({field.name: types[field.type] for field in fields(kind) if field.type in types})
