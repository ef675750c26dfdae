"""Whether checkpoints of one task share more than those of different tasks: a permutation test over task labels."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MOST_ENUMERATED = 20_000
SAMPLED = 10_000


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
    upper = np.triu_indices(len(labels), 1)
    values = excess[upper]
    same = _same(labels[None], upper)[0]
    if same.all() or not same.any():
        return None
    exact = math.factorial(len(labels)) / math.prod(map(math.factorial, np.bincount(labels))) <= MOST_ENUMERATED
    chance = _statistics(values, _same(_arrangements(labels, exact, seed), upper))
    statistic = float(_statistics(values, same[None])[0])
    # Equal statistics may differ by rounding, and must count as equal.
    reached = chance >= statistic - 1e-12 * np.abs(values).max()
    inside, between = float(values[same].mean()), float(values[~same].mean())
    return PermutationTest(statistic, inside, between, float(reached.mean()), len(chance), exact)


def _same(labels: NDArray[np.int64], upper: tuple[NDArray[np.int64], ...]) -> NDArray[np.bool_]:
    """Which pairs are of one task, (arrangements, pairs)."""
    return labels[:, upper[0]] == labels[:, upper[1]]


def _statistics(values: Floats, same: NDArray[np.bool_]) -> Floats:
    inside = same @ values
    count = same.sum(1)
    return inside / count - (values.sum() - inside) / (values.size - count)


def _arrangements(labels: NDArray[np.int64], exact: bool, seed: int) -> NDArray[np.int64]:
    """All distinct arrangements, or the given one and a sample, (arrangements, t)."""
    if exact:
        return np.array(list(_distinct(Counter(labels.tolist()))))
    rng = np.random.default_rng(seed)
    return np.concatenate([labels[None], rng.permuted(np.tile(labels, (SAMPLED - 1, 1)), axis=1)])


def _distinct(left: Counter[int]) -> Iterator[tuple[int, ...]]:
    """Every different order of a multiset."""
    if not left.total():
        yield ()
    for label in [label for label, count in left.items() if count]:
        for rest in _distinct(left - Counter([label])):
            yield (label, *rest)
