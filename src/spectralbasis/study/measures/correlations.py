"""Rank correlations whose p-values come from permutations of what is independent: pairs, or the items of a table."""

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]

MOST_ENUMERATED = 2**15
SAMPLED = 10_000


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
    return _correlation(stats.rankdata(x[known]), ranks, ranks[_orders(ranks.size, seed)])


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
    orders = _orders(len(x), seed)
    shuffled = ranked[orders[:, rows], orders[:, columns]]
    # A permutation moves gaps onto known pairs; these take the mean rank, which says nothing.
    shuffled = np.where(np.isnan(shuffled), (rows.size + 1) / 2, shuffled)
    return _correlation(stats.rankdata(x[rows, columns]), ranked[rows, columns], shuffled)


def _orders(size: int, seed: int) -> NDArray[np.int64]:
    """All orders of `size` things, or a sample of them behind the given one, (orders, size)."""
    if math.factorial(size) <= MOST_ENUMERATED:
        return np.array(list(permutations(range(size))), dtype=np.int64).reshape(math.factorial(size), size)
    given = np.arange(size)
    sampled = np.random.default_rng(seed).permuted(np.tile(given, (SAMPLED - 1, 1)), axis=1)
    return np.concatenate([given[None], sampled])


def _correlation(x: Floats, y: Floats, shuffled: Floats) -> Correlation:
    """Of ranks x with ranks y (n,), beside that with each row of `shuffled` (permutations, n)."""
    if x.size < 3 or x.std() == 0 or y.std() == 0:
        return Correlation(math.nan, math.nan, len(shuffled))
    rho = float(np.corrcoef(x, y)[0, 1])
    centred = shuffled - shuffled.mean(1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1)
    chance = centred @ (x - x.mean()) / (np.where(lengths > 0, lengths, 1) * x.std() * math.sqrt(x.size))
    return Correlation(rho, float((np.abs(chance) >= abs(rho) - 1e-12).mean()), len(shuffled))
