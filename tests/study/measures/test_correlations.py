"""Rank correlations and their permutation p-values, over pairs and over tables of items."""

import math

import numpy as np
import pytest
from scipy import stats

from spectralbasis.study.estimates import mantel_correlation, rank_correlation_with_p


def test_small_samples_are_enumerated():
    x, y = np.array([1.0, 2, 3, 4, 5, 6]), np.array([2.0, 1, 4, 3, 7, 5])

    def statistic(one):
        return stats.spearmanr(one, y).statistic

    reference = stats.permutation_test((x,), statistic, permutation_type="pairings", n_resamples=np.inf)
    found = rank_correlation_with_p(x, y)
    assert found.rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.p_value == pytest.approx(reference.pvalue)
    assert found.permutations == 720


def test_large_samples_agree_with_the_asymptotic_law():
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    y = x + 4 * rng.normal(size=60)
    assert rank_correlation_with_p(x, y).p_value == pytest.approx(stats.spearmanr(x, y).pvalue, abs=0.02)


def test_what_does_not_vary_has_no_correlation():
    assert math.isnan(rank_correlation_with_p([1, 2, 3], [1, 1, 1]).rho)
    assert math.isnan(rank_correlation_with_p([1, math.nan, 3], [1, 2, 3]).rho)
    assert math.isnan(rank_correlation_with_p([1, 2, 3], [math.nan] * 3).rho)
    assert math.isnan(mantel_correlation(np.full((3, 3), math.nan), np.eye(3)).rho)


def test_a_table_with_itself():
    table = np.random.default_rng(0).normal(size=(5, 5))
    found = mantel_correlation(table, table)
    assert found.rho == pytest.approx(1)
    assert found.p_value == pytest.approx(1 / 120)


def test_missing_pairs_are_left_out():
    x = np.random.default_rng(0).normal(size=(5, 5))
    y = x.copy()
    y[0, 1] = np.nan
    found = mantel_correlation(x, y)
    assert found.rho == pytest.approx(1)
    assert found.p_value == pytest.approx(1 / 120)


@pytest.mark.slow
def test_a_common_item_is_not_taken_for_evidence():
    """Two unrelated properties of items make pairs look related; permuted pairs believe it, permuted items do not."""
    rng, naive, honest = np.random.default_rng(0), [], []
    off = ~np.eye(7, dtype=bool)
    for _ in range(100):
        a, b = rng.normal(size=(2, 7))
        x, y = a[:, None] + a[None], b[:, None] + b[None]
        naive.append(stats.spearmanr(x[off], y[off]).pvalue <= 0.05)
        honest.append(mantel_correlation(x, y).p_value <= 0.05)
    assert np.mean(naive) > 0.2
    assert np.mean(honest) < 0.12
