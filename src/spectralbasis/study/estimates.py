"""Statistical tests that experiments share: pure functions on arrays, for few tasks and seeds.

The Student interval and the permutations come from `comparison.statistics`.
"""

import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import nn

from spectralbasis.checkpoints import matrix_name
from spectralbasis.comparison.statistics import (
    NO_INTERVAL,
    SAMPLED,
    Interval,
    arrangements,
    jackknife_error,
    student_interval,
)
from spectralbasis.extras import lacking, require_extra

Floats = NDArray[np.float64]
FEWEST_FLIPS = 10
"""From this many units on, flipping signs gives p-values down to 0.002, which survive correction for 25 claims."""
MOST_ENUMERATED = 2**15
"""Permutations, sign patterns or resamples that are all looked at; of more, `SAMPLED` are drawn."""


def paired_comparison(a: ArrayLike, b: ArrayLike, tasks: ArrayLike | None = None, *, seed: int = 0) -> Interval:
    """Mean of `a − b` over pairs of scores of the same task and seed, with its 95 % interval and two-sided p-value.

    See `mean_interval`: with `tasks`, the unit is the task, so that the interval is about tasks like these; without,
    every pair is a unit of its own, which suits the seeds of a single task.

    Args:
        a, b: scores, (n,), paired; pairs that lack one of the two (NaN) are left out.
        tasks: of each pair, (n,).
        seed: of sampled sign flips.
    """
    return mean_interval(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), tasks, seed=seed)


def mean_interval(values: ArrayLike, clusters: ArrayLike | None = None, *, seed: int = 0) -> Interval:
    """Mean of values, with its 95 % interval and two-sided p-value against zero.

    Values of one cluster (the seeds of a task) are averaged first, since they are not independent evidence of an
    effect; every cluster weighs the same. The interval is Student's over the clusters' means. So is the p-value of
    fewer than ten clusters, as there are too few signs to flip; from ten on it comes from flipping the signs of the
    means, all of them or a sample.

    Args:
        values: (n,); NaN is left out.
        clusters: labels, (n,); None where each value stands alone.
        seed: of sampled sign flips.

    Returns:
        NaN for the interval and the p-value where there is only one cluster.
    """
    units = np.asarray(values, dtype=float)
    known = np.isfinite(units)
    units = units[known]
    if clusters is not None:
        labels = np.asarray(clusters)[known]
        units = np.array([units[labels == label].mean() for label in np.unique(labels)])
    if units.size == 0:
        return NO_INTERVAL
    mean = float(units.mean())
    if units.size == 1:
        return Interval(mean, math.nan, math.nan, math.nan)
    error = float(units.std(ddof=1)) / math.sqrt(units.size)
    interval = student_interval(mean, error, units.size - 1)
    if units.size < FEWEST_FLIPS or error == 0:
        return interval
    return Interval(mean, interval.low, interval.high, _sign_flip_p(units, seed))


def clustered_interval(values: ArrayLike, *clusters: ArrayLike) -> Interval:
    """Mean of values that are dependent where they share a cluster of any kind, with its 95 % interval and p-value.

    The variance adds those of the clusters of each kind and takes off those of their intersections (Cameron, Gelbach &
    Miller, J. Bus. Econ. Stat. 29, 2011), each times `G / (G − 1)` for its G clusters. Where that is not positive, as
    few clusters can make it, the largest variance of one kind alone counts. The interval is Student's with one degree
    of freedom less than the kind with the fewest clusters has.

    Args:
        values: (n,), such as differences by task and cell; NaN is left out.
        clusters: labels of each kind, (n,) each; a kind with a single cluster is left out, as it cannot tell.

    Returns:
        NaN for the interval and the p-value where no kind has two clusters.

    Example:
        >>> clustered_interval([1.0, 2.0, 3.0, 4.0], ["a", "a", "b", "b"], ["x", "y", "x", "y"]).estimate
        2.5
    """
    y = np.asarray(values, dtype=float)
    known = np.isfinite(y)
    y = y[known]
    if y.size == 0:
        return NO_INTERVAL
    mean = float(y.mean())
    kinds = [np.unique(np.asarray(labels)[known].astype(str), return_inverse=True)[1] for labels in clusters]
    kinds = [labels for labels in kinds if labels.max() > 0]
    if not kinds:
        return Interval(mean, math.nan, math.nan, math.nan)
    alone = [_cluster_variance(y, labels) for labels in kinds]
    together = sum(
        (-1) ** (size + 1) * _cluster_variance(y, np.unique(np.stack(some), axis=1, return_inverse=True)[1])
        for size in range(1, len(kinds) + 1)
        for some in combinations(kinds, size)
    )
    variance = together if together > 0 else max(alone)
    return student_interval(mean, math.sqrt(variance), min(int(labels.max()) for labels in kinds))


def _cluster_variance(y: Floats, labels: NDArray[Any]) -> float:
    """Of the mean of values that are dependent within clusters alone."""
    sums = np.bincount(labels.ravel(), y - y.mean())
    return float(sums.size / (sums.size - 1) * (sums @ sums) / y.size**2)


def _sign_flip_p(units: Floats, seed: int) -> float:
    """All 2ⁿ sign patterns, or the given one and a seeded sample of them."""
    if 2**units.size <= MOST_ENUMERATED:
        signs = np.array(list(product((1, -1), repeat=units.size)))
    else:
        signs = np.random.default_rng(seed).choice((1, -1), (SAMPLED, units.size))
        signs[0] = 1
    chance = np.abs(signs @ units)
    # Equal sums may differ by rounding, and must count as equal.
    return float((chance >= abs(units.sum()) - 1e-12 * np.abs(units).sum()).mean())


def jackknife_interval(estimate: float, without_each: ArrayLike) -> Interval:
    """Interval of a statistic from its values without each of n units; Student's with n − 1 degrees of freedom.

    Args:
        estimate: with all units.
        without_each: (n,); NaN where leaving out a unit leaves nothing to compute, which leaves the interval unknown.
    """
    values = np.asarray(without_each, dtype=float)
    if values.size < 2 or not np.isfinite([estimate, *values]).all():
        return Interval(estimate, math.nan, math.nan, math.nan)
    return student_interval(estimate, jackknife_error(values), values.size - 1)


def holm(p_values: ArrayLike) -> Floats:
    """p-values adjusted for their number by Holm's step-down rule (Scand. J. Stat. 6, 1979), in their order.

    Args:
        p_values: (n,); NaN, of what could not be tested, stays NaN and does not count.
    """
    given = np.asarray(p_values, dtype=float)
    adjusted = np.full(given.shape, math.nan)
    tested = np.flatnonzero(np.isfinite(given))
    order = tested[np.argsort(given[tested], kind="stable")]
    scaled = given[order] * np.arange(order.size, 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


def slope_with_interval(examples: ArrayLike, values: ArrayLike, groups: ArrayLike, *, seed: int = 0) -> Interval:
    """Slope of values on log10(examples), with its 95 % interval and two-sided p-value, over groups such as seeds.

    Least squares with a level for each group. The error is that of a bootstrap over groups, all resamples of them or a
    sample, widened by `sqrt(G / (G − 1))`, and the interval is Student's with G − 1 degrees of freedom: percentiles of
    three seeds would be far too narrow. On the same sizes for all groups this is Student's t over their slopes.

    Args:
        examples: (n,), above 0.
        values: (n,); NaN is left out.
        groups: labels, (n,).
        seed: of a sampled bootstrap.

    Returns:
        NaN where no group has two sizes; NaN for interval and p-value where one alone has.
    """
    sums = _slope_sums(np.log10(np.asarray(examples, dtype=float)), np.asarray(values, dtype=float), np.asarray(groups))
    if len(sums) == 0:
        return NO_INTERVAL
    slope = float(sums[:, 0].sum() / sums[:, 1].sum())
    count = len(sums)
    if count == 1:
        return Interval(slope, math.nan, math.nan, math.nan)
    if count**count <= MOST_ENUMERATED:
        chosen = np.array(list(product(range(count), repeat=count)))
    else:
        chosen = np.random.default_rng(seed).integers(0, count, (SAMPLED, count))
    resampled = sums[chosen].sum(1)
    spread = float((resampled[:, 0] / resampled[:, 1]).std())
    return student_interval(slope, spread * math.sqrt(count / (count - 1)), count - 1)


def _slope_sums(x: Floats, y: Floats, groups: NDArray[Any]) -> Floats:
    """`Σ (x − x̄)(y − ȳ)` and `Σ (x − x̄)²` of each group that has several x, (groups, 2)."""
    sums = []
    for group in np.unique(groups):
        here = (groups == group) & np.isfinite(x) & np.isfinite(y)
        if np.unique(x[here]).size > 1:
            centred = x[here] - x[here].mean()
            sums.append((centred @ y[here], centred @ centred))
    return np.array(sums)


@dataclass(frozen=True)
class Trend:
    """A trend over ordered groups.

    Attributes:
        statistic: pairs of values of different groups that rise with the order of the groups; ties count a half.
        expected: that number without a trend, half of all such pairs.
        p_value: two-sided.
        exact: whether the p-value is from the exact distribution.
    """

    statistic: float
    expected: float
    p_value: float
    exact: bool


def jonckheere(groups: Sequence[ArrayLike], *, seed: int = 0) -> Trend:
    """Jonckheere's test for a trend over ordered groups (Biometrika 41, 1954), without a normal approximation.

    Without ties the distribution is exact, from its generating function; with ties the p-value is that of a seeded
    sample of permutations.

    Args:
        groups: the values of each group, in the order that a trend would follow; NaN is left out.
        seed: of sampled permutations.

    Returns:
        NaN for the p-value where fewer than two groups have values.
    """
    values = [array[np.isfinite(array)] for array in (np.asarray(group, dtype=float) for group in groups)]
    sizes = [array.size for array in values]
    pooled = np.concatenate([*values, np.empty(0)])
    statistic = float(_rising(pooled[None], sizes)[0])
    expected = (pooled.size**2 - sum(size**2 for size in sizes)) / 4
    if sum(size > 0 for size in sizes) < 2:
        return Trend(statistic, expected, math.nan, False)
    exact = np.unique(pooled).size == pooled.size
    if exact:
        p_value = _exact_trend_p(int(statistic), sizes)
    else:
        sampled = np.random.default_rng(seed).permuted(np.tile(pooled, (SAMPLED - 1, 1)), axis=1)
        chance = _rising(np.concatenate([pooled[None], sampled]), sizes)
        p_value = min(1.0, 2 * float(min((chance >= chance[0]).mean(), (chance <= chance[0]).mean())))
    return Trend(statistic, expected, p_value, exact)


def _rising(rows: Floats, sizes: Sequence[int]) -> Floats:
    """The statistic of each row of pooled values (rows, n)."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    before, after = np.nonzero(group[:, None] < group[None, :])
    return (0.5 + 0.5 * np.sign(rows[:, after] - rows[:, before])).sum(1)


def _exact_trend_p(statistic: int, sizes: Sequence[int]) -> float:
    """From the product of the Gaussian binomials of each group with all before it, as polynomials in q."""
    counts, before = [1], 0
    for size in sizes:
        for j in range(1, size + 1):
            shifted = [0] * (before + j)
            counts = [
                a - b for a, b in zip(counts + shifted, shifted + counts, strict=True)
            ]  # times 1 − q^(before + j)
            # Divided by 1 − q^j, which leaves no remainder.
            for i in range(j, len(counts)):
                counts[i] += counts[i - j]
            counts = counts[: len(counts) - j]
        before += size
    total = sum(counts)
    tail = min(sum(counts[: statistic + 1]), sum(counts[statistic:]))
    return min(1.0, 2 * tail / total)


def interpolate_at(norms: ArrayLike, values: ArrayLike, target: float) -> float:
    """What a measurement was when the update had the norm `target`, along one training run.

    Linear in the logarithm of the norm, between the first two measured steps whose norms enclose the target.

    Args:
        norms: of the update at each measured step, (steps,), above 0, in the order of the steps.
        values: (steps,).
        target: a norm.

    Returns:
        NaN where the run never had that norm between two measured steps.
    """
    x, y = np.log(np.asarray(norms, dtype=float)), np.asarray(values, dtype=float)
    sought = math.log(target)
    for i in range(x.size):
        if x[i] == sought:
            return float(y[i])
        if i + 1 < x.size and min(x[i], x[i + 1]) < sought < max(x[i], x[i + 1]):
            share = (sought - x[i]) / (x[i + 1] - x[i])
            return float(y[i] + share * (y[i + 1] - y[i]))
    return math.nan


@dataclass(frozen=True)
class Correlation:
    """A rank correlation.

    Attributes:
        rho: Spearman's, in [−1, 1]; NaN where one side does not vary.
        p_value: two-sided, the share of permutations whose `|rho|` is at least as large.
        permutations: how many were looked at, the given order among them.
    """

    rho: float
    p_value: float
    permutations: int


def rank_correlation_with_p(x: ArrayLike, y: ArrayLike, *, seed: int = 0) -> Correlation:
    """Spearman's rank correlation of independent pairs, with a p-value over all permutations or a sample of them.

    Args:
        x, y: (n,); pairs that lack one of the two (NaN) are left out.
        seed: of sampled permutations.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    known = np.isfinite(x) & np.isfinite(y)
    ranks = stats.rankdata(y[known])
    return _correlation(stats.rankdata(x[known]), ranks, ranks[arrangements(np.arange(ranks.size), seed)[0]])


def within(found: Interval, low: float = -1.0, high: float = 1.0) -> Interval:
    """An interval without what its statistic cannot be, such as a correlation beyond 1."""
    return Interval(found.estimate, max(found.low, low), min(found.high, high), found.p_value)


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation of pairs, (n,) each; those that lack one of the two (NaN) are left out."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    known = np.isfinite(x) & np.isfinite(y)
    ranks = stats.rankdata(y[known])
    return _correlation(stats.rankdata(x[known]), ranks, ranks[None]).rho


def mantel_correlation(x: ArrayLike, y: ArrayLike, *, seed: int = 0) -> Correlation:
    """Spearman's rank correlation of two tables over the same items, pair by pair (Mantel, Cancer Res. 27, 1967).

    Pairs with an item in common are not independent, so that the items are permuted, not the pairs: rows and columns
    of one table at once.

    Args:
        x, y: (items, items), not necessarily symmetric; diagonals are not read, and pairs that lack one of the two
            (NaN) are left out, which asks for tables whose gaps are few.
        seed: of sampled permutations.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    rows, columns = np.nonzero(~np.eye(len(x), dtype=bool) & np.isfinite(x) & np.isfinite(y))
    ranked = np.full(y.shape, math.nan)
    ranked[rows, columns] = stats.rankdata(y[rows, columns])
    orders = arrangements(np.arange(len(x)), seed)[0]
    shuffled = ranked[orders[:, rows], orders[:, columns]]
    # A permutation moves gaps onto known pairs; these take the mean rank, which says nothing.
    shuffled = np.where(np.isnan(shuffled), (rows.size + 1) / 2, shuffled)
    return _correlation(stats.rankdata(x[rows, columns]), ranked[rows, columns], shuffled)


def _correlation(x: Floats, y: Floats, shuffled: Floats) -> Correlation:
    """Of ranks x with ranks y (n,), beside that with each row of `shuffled` (permutations, n)."""
    if x.size < 3 or x.std() == 0 or y.std() == 0:
        return Correlation(math.nan, math.nan, len(shuffled))
    rho = float(np.corrcoef(x, y)[0, 1])
    centred = shuffled - shuffled.mean(1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1)
    chance = centred @ (x - x.mean()) / (np.where(lengths > 0, lengths, 1) * x.std() * math.sqrt(x.size))
    return Correlation(rho, float((np.abs(chance) >= abs(rho) - 1e-12).mean()), len(shuffled))


def is_available() -> bool:
    """Whether `weightwatcher` is installed."""
    return not lacking("diagnostics")


def power_law_exponents(model: nn.Module, matrices: set[str]) -> dict[str, float]:
    """The exponent α of the tail of each matrix's eigenvalue density (Martin & Mahoney, 1810.01075), by matrix name.

    Args:
        model: its layers are read as they are.
        matrices: names of matrices to fit.

    Returns:
        Matrices that the package finds no fit for are absent.

    Raises:
        InputError: the package is not installed.
    """
    require_extra("diagnostics", "a fit of power-law exponents")
    with redirect_stdout(None):  # it prints where it has few eigenvalues to fit
        watcher = import_module("weightwatcher").WeightWatcher(model=model)
        layers = _rows(watcher.describe())
        wanted = [int(row.layer_id) for row in layers if matrix_name(str(row.longname)) in matrices]
        found = watcher.analyze(layers=wanted) if wanted else pd.DataFrame()
    return {matrix_name(str(row.longname)): float(row.alpha) for row in _rows(found) if row.alpha > 0}


def _rows(table: pd.DataFrame) -> Any:
    return table.itertuples()
