"""Slopes and trends over sizes, and values at equal norm: closed forms, enumeration and planted truths."""

import math
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from spectralbasis.study.estimates import interpolate_at, jonckheere, slope_with_interval

SIZES = np.array([1e3, 4e3, 16e3, 64e3])


def test_the_slope_of_a_balanced_design_is_student_s_t_over_the_groups():
    rng = np.random.default_rng(0)
    x, groups = np.tile(SIZES, 3), np.repeat([0, 1, 2], 4)
    y = 0.3 * np.log10(x) + groups + 0.1 * rng.normal(size=12)
    slopes = [stats.linregress(np.log10(SIZES), y[groups == group]).slope for group in range(3)]
    found = slope_with_interval(x, y, groups)
    assert found.estimate == pytest.approx(np.mean(slopes))
    assert (found.low, found.high) == pytest.approx(
        stats.t.interval(0.95, 2, loc=np.mean(slopes), scale=stats.sem(slopes)), rel=1e-9
    )
    assert found.p_value == pytest.approx(stats.ttest_1samp(slopes, 0).pvalue)


def test_three_seeds_cover_the_planted_slope():
    rng = np.random.default_rng(1)
    x, groups = np.tile(SIZES, 3), np.repeat([0, 1, 2], 4)
    hits = 0
    for _ in range(300):
        found = slope_with_interval(x, 0.3 * np.log10(x) + rng.normal(size=12), groups)
        hits += found.low <= 0.3 <= found.high
    assert hits / 300 > 0.92


def test_missing_sizes_and_lone_groups():
    x, groups = np.array([10, 100, 1000, 10, 100, 50]), np.array([0, 0, 0, 1, 1, 2])
    y = 2 * np.log10(x) + groups
    assert slope_with_interval(x, y, groups).estimate == pytest.approx(2)
    assert math.isnan(slope_with_interval(x[:3], y[:3], groups[:3]).low)
    assert math.isnan(slope_with_interval(x[5:], y[5:], groups[5:]).estimate)


def test_jonckheere_against_enumeration():
    groups = [[1.0, 4.0], [2.0, 3.0], [5.0, 7.0, 6.5]]
    values, label = np.concatenate(groups), np.repeat([0, 1, 2], [2, 2, 3])

    def statistic(order):
        pairs = ((i, j) for i in range(7) for j in range(7) if label[i] < label[j])
        return sum(values[order[j]] > values[order[i]] for i, j in pairs)

    chance = np.array([statistic(order) for order in permutations(range(7))])
    found = jonckheere(groups)
    assert found.exact
    assert found.statistic == chance[0]
    assert found.expected == pytest.approx(chance.mean())
    assert found.p_value == pytest.approx(2 * min((chance >= chance[0]).mean(), (chance <= chance[0]).mean()))


def test_two_groups_are_mann_and_whitney_s_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=6), rng.normal(0.8, 1, size=8)
    assert jonckheere([a, b]).p_value == pytest.approx(stats.mannwhitneyu(b, a, method="exact").pvalue)


def test_ties_are_permuted():
    found = jonckheere([[1, 1, 2], [2, 2, 3], [3, 4, 4], [4, 5, 5]])
    assert not found.exact
    assert 1e-4 <= found.p_value < 0.005
    assert jonckheere([[1, 1], [1, 1]]).p_value == 1


def test_a_single_group_shows_no_trend():
    assert math.isnan(jonckheere([[1.0, 2.0], []]).p_value)


def test_values_at_equal_norm():
    assert interpolate_at([0.01, 0.1], [1.0, 0.0], 10**-1.5) == pytest.approx(0.5)
    assert interpolate_at([0.01, 0.1, 0.05], [3.0, 2.0, 9.0], 0.1) == 2.0
    assert math.isnan(interpolate_at([0.01, 0.1], [1.0, 0.0], 0.2))
    assert math.isnan(interpolate_at([0.01, 0.1], [1.0, 0.0], 0.001))
    assert math.isnan(interpolate_at([], [], 0.1))
