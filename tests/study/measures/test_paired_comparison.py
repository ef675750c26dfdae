"""Means of paired scores: closed forms, honest units, and how often nothing is found to be something."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from spectralbasis.comparison.statistics import verdict_of
from spectralbasis.study.estimates import holm, jackknife_interval, mean_interval, paired_comparison


def test_few_units_are_student_s():
    a, b = np.array([0.8, 0.7, 0.9, 0.6]), np.array([0.7, 0.65, 0.8, 0.61])
    found, expected = paired_comparison(a, b), stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert found.estimate == pytest.approx(np.mean(a - b))
    assert (found.low, found.high) == pytest.approx(tuple(interval))
    assert found.p_value == pytest.approx(expected.pvalue)


def test_from_ten_units_on_all_signs_are_flipped():
    values = np.array([0.1, 0.2, 0.05, 0.3, 0.1, 0.15, 0.4, 0.25, 0.1, 0.3])
    assert mean_interval(values).p_value == 2 / 2**10
    mixed = values * np.array([1, -1, 1, 1, -1, 1, 1, 1, -1, 1])
    reference = stats.permutation_test((mixed,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert mean_interval(mixed).p_value == pytest.approx(reference.pvalue)
    assert mean_interval(mixed[:9]).p_value == pytest.approx(stats.ttest_1samp(mixed[:9], 0).pvalue)


def test_many_units_are_sampled():
    values = np.random.default_rng(0).normal(0.2, 1, 40)
    assert mean_interval(values).p_value == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.02)
    assert mean_interval(np.ones(40) + values / 10).p_value == pytest.approx(1e-4)


def test_seeds_of_a_task_are_one_unit():
    tasks = np.repeat(["RTE", "MRPC", "CoLA"], 3)
    difference = np.repeat([0.01, 0.02, 0.06], 3) + np.tile([-0.001, 0, 0.001], 3)
    clustered, pooled = paired_comparison(difference, np.zeros(9), tasks), paired_comparison(difference, np.zeros(9))
    assert clustered.estimate == pytest.approx(0.03)
    assert (clustered.low, clustered.high) == pytest.approx(
        stats.t.interval(0.95, 2, loc=0.03, scale=stats.sem([0.01, 0.02, 0.06]))
    )
    assert clustered.high - clustered.low > pooled.high - pooled.low


def test_pairs_that_lack_one_are_left_out():
    assert paired_comparison([1, 2, math.nan], [0, 1, 5]).estimate == 1
    assert paired_comparison([1, math.nan], [0, 1]).estimate == 1
    assert math.isnan(paired_comparison([1, math.nan], [0, 1]).low)
    assert math.isnan(paired_comparison([], []).estimate)


@pytest.mark.parametrize("clusters", [3, 5, 12])
def test_false_alarms_are_as_rare_as_they_should_be(clusters):
    rng = np.random.default_rng(1)
    tasks = np.repeat(np.arange(clusters), 3)
    found = [
        mean_interval(np.repeat(rng.normal(size=clusters), 3) + 0.1 * rng.normal(size=3 * clusters), tasks)
        for _ in range(400)
    ]
    outside = np.mean([verdict_of(one.low, one.high) != "undecided" for one in found])
    assert outside < 0.085
    assert np.mean([one.p_value <= 0.05 for one in found]) < 0.085


def test_the_jackknife_of_a_mean_is_student_s():
    values = np.array([1.0, 2, 4, 8])
    found = jackknife_interval(values.mean(), [np.delete(values, i).mean() for i in range(4)])
    expected = mean_interval(values)
    assert (found.low, found.high, found.p_value) == pytest.approx((expected.low, expected.high, expected.p_value))
    assert math.isnan(jackknife_interval(1.0, [1.0, math.nan]).low)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, math.nan, 0.9]) == pytest.approx([0.02, math.nan, 0.9], nan_ok=True)
    assert holm([]).size == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_the_raw_values_and_bonferroni_s(p_values):
    adjusted, raw = holm(p_values), np.array(p_values)
    assert (adjusted >= raw).all()
    assert (adjusted <= np.minimum(raw * raw.size, 1) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(raw, kind="stable")]) >= 0).all()


def test_verdicts():
    assert verdict_of(0.1, 0.2) == "supported"
    assert verdict_of(-0.2, -0.1) == "contradicted"
    assert verdict_of(-0.1, 0.1) == verdict_of(math.nan, math.nan) == "undecided"
