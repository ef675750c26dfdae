"""Means of values that are clustered in several ways: by hand, by known cases, and how often the truth is covered."""

import math

import numpy as np
import pytest
from scipy import stats

from spectralbasis.study.estimates import clustered_interval, mean_interval


def test_two_ways_by_hand():
    """Of 2 tasks and 3 cells: sums of deviations by task are 3 and -3, by cell -1, 0 and 1."""
    y = np.array([3.0, 2, 4, 0, 2, 1])  # deviations 1, 0, 2 and -2, 0, -1
    tasks, cells = np.repeat(["a", "b"], 3), np.tile(["x", "y", "z"], 2)
    by_task = 2 / 1 * (3**2 + 3**2) / 36
    by_cell = 3 / 2 * (1**2 + 0 + 1**2) / 36
    single = 6 / 5 * (1 + 4 + 4 + 1) / 36
    error = math.sqrt(by_task + by_cell - single)
    found = clustered_interval(y, tasks, cells)
    assert found.estimate == 2
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 1, loc=2, scale=error))
    assert found.p_value == pytest.approx(2 * stats.t.sf(2 / error, 1))


def test_one_way_is_the_mean_of_clusters_of_equal_size():
    y = np.random.default_rng(0).normal(size=12)
    tasks = np.repeat(np.arange(4), 3)
    one, means = clustered_interval(y, tasks), mean_interval(y, tasks)
    assert (one.low, one.high, one.p_value) == pytest.approx((means.low, means.high, means.p_value))
    # A kind with a single cluster cannot tell.
    assert clustered_interval(y, tasks, ["x"] * 12) == one
    alone = clustered_interval(y, ["x"] * 12)
    assert (alone.estimate, math.isnan(alone.low)) == (pytest.approx(y.mean()), True)


def test_labels_that_are_equal_count_once():
    y = np.random.default_rng(1).normal(size=12)
    tasks = np.repeat(np.arange(4), 3)
    assert clustered_interval(y, tasks, tasks).high == pytest.approx(clustered_interval(y, tasks).high)


def test_a_variance_that_is_not_positive_gives_way_to_that_of_one_kind():
    y = np.array([1.0, -1, -1, 1])  # every task and every cell sums to zero
    tasks, cells = ["a", "a", "b", "b"], ["x", "y", "x", "y"]
    assert clustered_interval(y, tasks, cells).high == 0
    assert clustered_interval([*y, math.nan], [*tasks, "c"], [*cells, "z"]).high == 0
    assert math.isnan(clustered_interval([], [], []).estimate)


@pytest.mark.parametrize(("of_tasks", "of_cells"), [(0.5, 0.7), (0.0, 0.7), (0.5, 0.0), (0.0, 0.0)])
def test_the_truth_is_covered(of_tasks, of_cells):
    rng = np.random.default_rng(2)
    tasks, cells = np.repeat(np.arange(7), 13), np.tile(np.arange(13), 7)
    covered, by_task = [], []
    for _ in range(400):
        y = of_tasks * rng.normal(size=7)[tasks] + of_cells * rng.normal(size=13)[cells] + rng.normal(size=91)
        both, alone = clustered_interval(y, tasks, cells), mean_interval(y, tasks)
        covered.append(both.low < 0 < both.high)
        by_task.append(alone.low < 0 < alone.high)
    assert np.mean(covered) > 0.91
    if of_cells and not of_tasks:  # cells in common are missed by tasks alone
        assert np.mean(by_task) < 0.85


def test_three_ways_add_and_take_off():
    rng = np.random.default_rng(3)
    kinds = [rng.integers(0, size, 60) for size in (3, 4, 5)]
    y = rng.normal(size=60)

    def variance(*labels):
        sums = dict.fromkeys(zip(*labels, strict=True), 0.0)
        for key, value in zip(zip(*labels, strict=True), y - y.mean(), strict=True):
            sums[key] += value
        return len(sums) / (len(sums) - 1) * sum(value**2 for value in sums.values()) / 60**2

    a, b, c = kinds
    total = variance(a) + variance(b) + variance(c) - variance(a, b) - variance(a, c) - variance(b, c)
    total += variance(a, b, c)
    total = total if total > 0 else max(map(variance, kinds))
    found = clustered_interval(y, *kinds)
    assert found.high - found.estimate == pytest.approx(stats.t.ppf(0.975, 2) * math.sqrt(total))
