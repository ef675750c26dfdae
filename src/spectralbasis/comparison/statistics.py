"""Effects, intervals and verdicts from measurements and null draws, and the permutation test of task labels.

The study also uses `student_interval`, `jackknife_error`, `arrangements` and `share_reached`. pandas and scipy.stats
are imported on use, because the processes that measure matrices need neither.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special
from typing_extensions import TypedDict

from spectralbasis.linalg import haar_overlap, haar_overlap_std
from spectralbasis.records import Count, Finite

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["supported", "contradicted", "undecided"]
CONFIDENCE = 0.95
RESAMPLES = 2000
FALSE_DISCOVERY_RATE = 0.05
_BATCH_ENTRIES = 4_000_000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class NullFit:
    """A measurement compared with draws of its null; NaN where there are too few draws to tell."""

    null_mean: float
    null_std: float
    z: float
    p_value: float


def against_null(value: float, draws: Floats) -> NullFit:
    """Effect of one value in standard deviations of its null, and its two-sided p-value.

    The p-value is that of a further draw from a normal null whose mean and variance are estimated from the R draws:
    Student's t with R − 1 degrees of freedom and a variance of `s² (1 + 1/R)`, which accounts for few draws.
    """
    mean = float(draws.mean()) if draws.size else math.nan
    std = float(draws.std(ddof=1)) if draws.size > 1 else math.nan
    if not std > 0:
        return NullFit(mean, std, math.nan, math.nan)
    t = (value - mean) / (std * math.sqrt(1 + 1 / draws.size))
    return NullFit(mean, std, (value - mean) / std, float(2 * special.stdtr(draws.size - 1, -abs(t))))


def against_moments(share: float, mean: float, std: float) -> NullFit:
    """A share in [0, 1] compared with a null of known mean and standard deviation.

    The two-sided p-value is that of the Beta law with these two moments.
    """
    weight = mean * (1 - mean) / std**2 - 1 if std > 0 else 0.0
    if not weight > 0:
        return NullFit(mean, std, math.nan, math.nan)
    law, inside = (mean * weight, (1 - mean) * weight), min(max(share, 0.0), 1.0)
    tail = min(special.betainc(*law, inside), special.betaincc(*law, inside))
    return NullFit(mean, std, (share - mean) / std, float(min(1.0, 2 * tail)))


def against_haar(overlap: float, size: int, k: int) -> NullFit:
    """An overlap of two k-dimensional subspaces of a `size`-dimensional space, compared with Haar-random ones.

    Mean and standard deviation are exact; the law is that of `against_moments`, which is the exact one for k = 1.
    """
    return against_moments(overlap, haar_overlap(size, k), haar_overlap_std(size, k))


def against_unrelated(cosine: float, shape: tuple[int, int]) -> NullFit:
    """A cosine between two updates, compared with updates whose orientations are unrelated.

    Its mean is 0 and its standard deviation `1/√(mn)`, exactly, under Haar-random rotations and under scrambling, for
    all updates. Its law depends on the updates (for rank one it is a product of two normals), so the p-value is
    Chebyshev's bound, 1/z².
    """
    std = 1 / math.sqrt(math.prod(shape))
    z = cosine / std
    return NullFit(0.0, std, z, min(1.0, z**-2) if z else 1.0)


def with_q_values(table: "pd.DataFrame") -> "pd.DataFrame":
    """The table with a column `q_value`: p-values adjusted over matrices by Benjamini–Hochberg.

    A family is one metric, side and number of directions in one checkpoint. The full numbers of directions of all
    matrices count as the same number, also where a fraction, "mp" or "gd" makes them differ.
    """
    from scipy import stats

    tested = table[table["p_value"].notna()]
    directions = tested["k"].where(tested["k"] != full_k(table)[tested.index], -1)
    families = tested.groupby(["tuned", "metric", "side", "index", directions])["p_value"]
    return table.assign(q_value=families.transform(stats.false_discovery_control).reindex(table.index))


def full_k(table: "pd.DataFrame") -> "pd.Series":
    """The full number of leading directions of each row's matrix."""
    overlaps = table[table["metric"] == "subspace_overlap"]
    return table["matrix"].map(overlaps.groupby("matrix")["k"].max())


@dataclass(frozen=True)
class Finding:
    """What was observed over matrices, beside what its null gives, with a confidence interval of the difference.

    `verdict` is "supported" where the whole interval lies above zero, "contradicted" where it lies below, else
    "undecided".
    """

    value: float
    null_mean: float
    effect: float
    ci_low: float
    ci_high: float
    p_value: float
    verdict: str
    matrices: int

    def to_dict(self) -> dict[str, float | str | int | None]:
        """The fields by name; None where a number does not exist."""
        return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in asdict(self).items()}


class FindingEntry(TypedDict):
    """A `Finding` in `summary.json`; None where a number does not exist."""

    value: Finite | None
    null_mean: Finite | None
    effect: Finite | None
    ci_low: Finite | None
    ci_high: Finite | None
    p_value: Finite | None
    verdict: Verdict
    matrices: Count


def find(units: "pd.DataFrame", seed: int, interval_of: "IntervalRule | None" = None) -> Finding:
    """Test over matrices whether a measurement exceeds its null.

    Args:
        units: one row per matrix with the columns `tuned`, `layer`, `value`, `null_mean`.
        seed: of the bootstrap.
        interval_of: gives the interval of `units` with a column `effect`; None is `hierarchical_interval`.
    """
    value, null_mean = _mean(units["value"]), _mean(units["null_mean"])
    effects = units.assign(effect=units["value"] - units["null_mean"]).dropna(subset=["effect"])
    interval = (interval_of or hierarchical_interval)(effects, seed)
    return Finding(
        value=value,
        null_mean=null_mean,
        effect=interval.estimate,
        ci_low=interval.low,
        ci_high=interval.high,
        p_value=interval.p_value,
        verdict=verdict_of(interval.low, interval.high),
        matrices=len(units),
    )


def _mean(column: "pd.Series") -> float:
    return float(column.mean()) if column.notna().any() else math.nan


def verdict_of(low: float, high: float) -> str:
    """ "supported" where a whole interval lies above zero, "contradicted" where it lies below, else "undecided"."""
    if low > 0:
        return "supported"
    return "contradicted" if high < 0 else "undecided"


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval and two-sided p-value against zero; NaN where one group alone cannot tell."""

    estimate: float
    low: float
    high: float
    p_value: float


NO_INTERVAL = Interval(math.nan, math.nan, math.nan, math.nan)
"""What is known of no values."""
IntervalRule = Callable[["pd.DataFrame", int], Interval]


def student_interval(estimate: float, error: float, freedom: int) -> Interval:
    """Student's confidence interval and two-sided p-value against zero; NaN where the standard error is NaN."""
    from scipy import stats

    if math.isnan(error):
        return Interval(estimate, math.nan, math.nan, math.nan)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    p_value = float(2 * stats.t.sf(abs(estimate) / error, freedom)) if error > 0 else float(estimate == 0)
    return Interval(estimate, estimate - reach, estimate + reach, p_value)


def jackknife_error(without_each: ArrayLike) -> float:
    """Standard error of a statistic from its values without each of n units, (n,); NaN of fewer than two."""
    values = np.asarray(without_each, dtype=float)
    return math.sqrt((values.size - 1) * float(values.var())) if values.size > 1 else math.nan


def hierarchical_interval(effects: "pd.DataFrame", seed: int, resamples: int = RESAMPLES) -> Interval:
    """Confidence interval of the mean effect by a hierarchical bootstrap: matrices within layers within checkpoints.

    The bootstrap gives the standard error; the interval is Student's, with one degree of freedom less than there are
    groups at the outermost level that has several, and the error is widened by `sqrt(G / (G − 1))`: percentiles of so
    few groups are too narrow (Cameron, Gelbach & Miller, 2008).

    Args:
        effects: the columns `tuned`, `layer`, `effect`, a row per matrix.
        seed: of the resampling.
        resamples: number of bootstrap samples.
    """
    if effects.empty:
        return NO_INTERVAL
    error, groups = _bootstrap_error(effects, seed, resamples)
    return student_interval(float(effects["effect"].mean()), error, groups - 1)


def pair_interval(effects: "pd.DataFrame", seed: int) -> Interval:
    """Confidence interval of the mean effect over pairs of checkpoints, of which many have a checkpoint in common.

    The hierarchical bootstrap treats pairs, its outermost groups, as independent. Where the delete-one jackknife over
    checkpoints (for statistics of pairs: Arvesen, 1969) gives a larger error, that error counts. The degrees of freedom
    are those of the checkpoints in any case.

    Args:
        effects: the columns `tuned` (the pair), `tuned_a`, `tuned_b`, `layer`, `effect`, a row per matrix.
        seed: of the resampling.
    """
    if effects.empty:
        return NO_INTERVAL
    error, groups = _bootstrap_error(effects, seed, RESAMPLES)
    pairs = effects.groupby(["tuned_a", "tuned_b"])["effect"].agg(["sum", "count"]).reset_index()
    checkpoints = dict.fromkeys(pairs[["tuned_a", "tuned_b"]].to_numpy().ravel())
    others = [pairs[(pairs["tuned_a"] != one) & (pairs["tuned_b"] != one)] for one in checkpoints]
    without_each = [rest["sum"].sum() / rest["count"].sum() for rest in others if len(rest)]
    if len(without_each) > 1:
        error, groups = max(error, jackknife_error(without_each)), len(without_each)
    return student_interval(float(effects["effect"].mean()), error, groups - 1)


def _bootstrap_error(effects: "pd.DataFrame", seed: int, resamples: int) -> tuple[float, int]:
    """Standard error of the mean effect, and how many independent groups it rests on."""
    counts = (effects["tuned"].nunique(), effects.groupby("tuned")["layer"].nunique().max(), len(effects))
    groups = int(next((count for count in counts if count > 1), 1))
    if groups < 2:
        return math.nan, groups
    means = bootstrap_means(effects, np.random.default_rng(seed), resamples)
    return float(means.std(ddof=1)) * math.sqrt(groups / (groups - 1)), groups


def bootstrap_means(effects: "pd.DataFrame", rng: np.random.Generator, resamples: int) -> Floats:
    """Means of hierarchical resamples, (resamples,): checkpoints, then their layers, then the layers' matrices."""
    cells = [[layer["effect"].to_numpy() for _, layer in one.groupby("layer")] for _, one in effects.groupby("tuned")]
    layers = np.array([len(checkpoint) for checkpoint in cells])
    sizes = np.zeros((len(cells), layers.max()), dtype=np.int64)
    values = np.zeros((*sizes.shape, max(len(cell) for checkpoint in cells for cell in checkpoint)))
    for i, checkpoint in enumerate(cells):
        for j, cell in enumerate(checkpoint):
            sizes[i, j] = len(cell)
            values[i, j, : len(cell)] = cell
    batch = max(1, _BATCH_ENTRIES // values.size)
    starts = range(0, resamples, batch)
    return np.concatenate([_resample(values, sizes, layers, rng, min(batch, resamples - s)) for s in starts])


def _resample(
    values: Floats, sizes: NDArray[np.int64], layers: NDArray[np.int64], rng: np.random.Generator, count: int
) -> Floats:
    """`count` resampled means from values (checkpoints, layers, matrices), of which only the first of each are real."""
    checkpoints, width, depth = values.shape
    i = rng.integers(0, checkpoints, (count, checkpoints))
    j = (rng.random((count, checkpoints, width)) * layers[i][..., None]).astype(np.int64)
    size = np.where(np.arange(width) < layers[i][..., None], sizes[i[..., None], j], 0)
    pick = (rng.random((count, checkpoints, width, depth)) * size[..., None]).astype(np.int64)
    drawn = values[i[..., None, None], j[..., None], pick]
    real = np.arange(depth) < size[..., None]
    return np.where(real, drawn, 0).sum((1, 2, 3)) / size.sum((1, 2))


MOST_ENUMERATED = 20_000
"""Arrangements up to which a permutation test looks at all of them; beyond, it looks at `SAMPLED` of them."""
SAMPLED = 10_000


def arrangements(values: ArrayLike, seed: int) -> tuple[NDArray[Any], bool]:
    """All different orders of some values, or the given order and a sample of others.

    Args:
        values: (n,); equal ones are interchangeable.
        seed: of the sample.

    Returns:
        The orders, (arrangements, n), and whether they are all there are.
    """
    given = np.asarray(values)
    counts = Counter(given.tolist())
    different = math.factorial(given.size) // math.prod(map(math.factorial, counts.values()))
    if different <= MOST_ENUMERATED:
        return np.array(list(_distinct(counts)), dtype=given.dtype), True
    sampled = np.random.default_rng(seed).permuted(np.tile(given, (SAMPLED - 1, 1)), axis=1)
    return np.concatenate([given[None], sampled]), False


def share_reached(chance: Floats, statistic: float, scale: float) -> float:
    """Share of `chance` that is at least `statistic`; what differs only by rounding at this scale counts as equal."""
    return float((chance >= statistic - 1e-12 * scale).mean())


def _distinct(left: Counter[Any]) -> Iterator[tuple[Any, ...]]:
    """Every different order of a multiset."""
    if not left.total():
        yield ()
    for value in [value for value, count in left.items() if count]:
        for rest in _distinct(left - Counter([value])):
            yield (value, *rest)


@dataclass(frozen=True)
class PermutationTest:
    """Mean excess of pairs of one task less that of pairs of two tasks, and how often chance gives as much.

    Attributes:
        statistic: the difference of the two means.
        same_task: mean over pairs of one task.
        different_tasks: mean over pairs of two tasks.
        p_value: share of the arrangements of the labels whose statistic is at least as large (one-sided).
        arrangements: how many were looked at, the given one among them.
        exact: whether those are all there are.
    """

    statistic: float
    same_task: float
    different_tasks: float
    p_value: float
    arrangements: int
    exact: bool


def permutation_test(excess: Floats, tasks: Sequence[str], seed: int) -> PermutationTest | None:
    """Test over all arrangements of the labels, or over a sample of them where they are too many.

    Args:
        excess: what each two checkpoints share beyond chance, (t, t), symmetric; its diagonal is not read.
        tasks: the task of each checkpoint, (t,).
        seed: of the sample.

    Returns:
        None where all pairs are of one kind, so that there is nothing to compare.
    """
    labels = np.unique(list(tasks), return_inverse=True)[1]
    i, j = np.triu_indices(len(labels), 1)
    values, same = excess[i, j], labels[i] == labels[j]
    if same.all() or not same.any():
        return None

    def statistics(same: NDArray[np.bool_]) -> Floats:
        """Of each arrangement, from which of its pairs are of one task, (arrangements, pairs)."""
        inside, count = same @ values, same.sum(1)
        return inside / count - (values.sum() - inside) / (values.size - count)

    orders, exact = arrangements(labels, seed)
    statistic = float(statistics(same[None])[0])
    p_value = share_reached(statistics(orders[:, i] == orders[:, j]), statistic, np.abs(values).max())
    inside, between = float(values[same].mean()), float(values[~same].mean())
    return PermutationTest(statistic, inside, between, p_value, len(orders), exact)
