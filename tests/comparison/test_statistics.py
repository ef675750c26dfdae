"""Effects, intervals and verdicts: right where the truth is planted, calibrated where there is none."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from spectralbasis.comparison.statistics import (
    against_haar,
    against_null,
    against_unrelated,
    bootstrap_means,
    find,
    hierarchical_interval,
    jackknife_error,
    pair_interval,
    with_q_values,
)


def units(effects, *, layers=6, tuned=1) -> pd.DataFrame:
    """Matrices in layers in checkpoints, with the given effects over a null of 0.5."""
    index = np.arange(len(effects))
    per_checkpoint = len(effects) // tuned
    return pd.DataFrame(
        {
            "tuned": (index // per_checkpoint).astype(str),
            "layer": index % per_checkpoint % layers,
            "value": 0.5 + np.asarray(effects),
            "null_mean": 0.5,
            "effect": np.asarray(effects),
        }
    )


def test_p_values_of_null_draws_are_uniform():
    rng = np.random.default_rng(0)
    p_values = [against_null(sample[0], sample[1:]).p_value for sample in rng.normal(3, 2, (4000, 6))]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_z_is_in_standard_deviations_of_the_draws():
    fit = against_null(5.0, np.array([1.0, 2.0, 3.0]))
    assert (fit.null_mean, fit.null_std, fit.z) == (2.0, 1.0, 3.0)
    assert fit.p_value == pytest.approx(2 * stats.t.sf(3 / math.sqrt(4 / 3), 2))


@pytest.mark.parametrize("draws", [[], [1.0], [1.0, 1.0]])
def test_too_few_or_equal_draws_claim_no_significance(draws):
    fit = against_null(2.0, np.array(draws))
    assert math.isnan(fit.z)
    assert math.isnan(fit.p_value)


@pytest.mark.parametrize(("shift", "verdict"), [(0.1, "supported"), (-0.1, "contradicted"), (0.0, "undecided")])
def test_verdicts_of_planted_effects(shift, verdict):
    noise = np.random.default_rng(1).normal(0, 0.02, 36)
    found = find(units(shift + noise - noise.mean()), seed=0)
    assert found.verdict == verdict
    assert found.effect == pytest.approx(shift)
    assert found.ci_low < shift < found.ci_high
    assert (found.p_value < 0.05) == (verdict != "undecided")


@pytest.mark.parametrize(("tuned", "layer_scale"), [(1, 0.0), (1, 1.0), (3, 1.0)])
def test_false_findings_stay_within_their_rate(tuned, layer_scale):
    rng = np.random.default_rng(2)
    hits = 0
    trials = 150
    for trial in range(trials):
        layer_effects = rng.normal(0, layer_scale, (tuned, 1, 6))
        effects = (layer_effects + rng.normal(0, 1, (tuned, 4, 6))).reshape(-1)
        hits += hierarchical_interval(units(effects, tuned=tuned), trial, resamples=300).p_value < 0.05
    assert stats.binomtest(hits, trials, 0.05, alternative="greater").pvalue > 0.01


def test_matrices_of_one_layer_do_not_count_as_independent_evidence():
    layer_effects = np.random.default_rng(3).normal(0.1, 1, 4)
    together = hierarchical_interval(
        units(np.repeat(layer_effects, 25), layers=1).assign(layer=np.arange(100) // 25), 0
    )
    apart = hierarchical_interval(units(np.repeat(layer_effects, 25), layers=100), 0)
    assert together.high - together.low > 3 * (apart.high - apart.low)


def test_resampled_means_have_the_mean_of_the_data_whatever_the_sizes_of_layers():
    frame = units(np.arange(9.0), layers=9).assign(layer=[0, 0, 0, 0, 0, 1, 1, 2, 2], tuned=["a"] * 5 + ["b"] * 4)
    means = bootstrap_means(frame, np.random.default_rng(0), 20000)
    by_checkpoint = frame.groupby(["tuned", "layer"]).effect.mean()
    assert means.min() >= 0
    assert means.max() <= 8
    assert by_checkpoint.min() < means.mean() < by_checkpoint.max()
    one_layer = frame.assign(tuned="a", layer=0)
    assert bootstrap_means(one_layer, np.random.default_rng(0), 20000).mean() == pytest.approx(4, abs=0.05)


def test_one_matrix_cannot_tell():
    found = find(units([0.3]), seed=0)
    assert (found.verdict, found.effect) == ("undecided", pytest.approx(0.3))
    assert found.to_dict()["ci_low"] is None


def test_without_a_null_nothing_is_tested():
    found = find(units([0.1, 0.2]).assign(null_mean=math.nan), seed=0)
    assert found.verdict == "undecided"
    assert found.value == pytest.approx(0.65)
    assert found.to_dict()["null_mean"] is None


def test_q_values_are_adjusted_within_one_metric_side_and_number_of_directions():
    p_values = [0.01, 0.02, 0.03, 0.5, math.nan]
    family = pd.DataFrame(
        {"tuned": "a", "metric": "subspace_overlap", "side": "left", "index": -1, "k": 4, "p_value": p_values}
    ).assign(matrix=list("ABCDE"))
    other = family.assign(side="right", p_value=[0.04] * 5)
    fewer = family.assign(k=2, p_value=[1.0] * 5)
    table = with_q_values(pd.concat([family, other, fewer], ignore_index=True))
    np.testing.assert_allclose(table["q_value"][:4], stats.false_discovery_control(p_values[:4]))
    assert math.isnan(table["q_value"][4])
    assert table["q_value"][5:10].tolist() == pytest.approx([0.04] * 5)


def test_the_full_number_of_each_matrix_is_one_family():
    rows = {"tuned": "a", "metric": "subspace_overlap", "side": "left", "index": -1}
    table = pd.DataFrame([{**rows, "matrix": name, "k": k, "p_value": 0.01 * k} for name, k in (("A", 3), ("B", 5))])
    expected = stats.false_discovery_control([0.03, 0.05])
    assert with_q_values(table)["q_value"].tolist() == pytest.approx(list(expected))


@pytest.mark.parametrize("overlap", [0.0, 0.02, 0.2, 0.7, 1.0])
def test_one_direction_has_the_exact_law_of_a_haar_random_one(overlap):
    law = stats.beta(0.5, 6.5)
    fit = against_haar(overlap, 14, 1)
    assert (fit.null_mean, fit.null_std) == pytest.approx((law.mean(), law.std()))
    assert fit.z == pytest.approx((overlap - law.mean()) / law.std())
    assert fit.p_value == pytest.approx(2 * min(law.cdf(overlap), law.sf(overlap)))


def test_p_values_against_haar_are_uniform_for_haar_random_subspaces():
    rng = np.random.default_rng(0)
    frames = np.linalg.qr(rng.normal(size=(4000, 9, 3)))[0]
    overlaps = np.square(frames[:, :3]).sum((1, 2)) / 3
    fits = [against_haar(overlap, 9, 3) for overlap in overlaps]
    assert np.mean(overlaps) == pytest.approx(fits[0].null_mean, rel=0.02)
    assert np.std(overlaps) == pytest.approx(fits[0].null_std, rel=0.05)
    assert stats.kstest([fit.p_value for fit in fits], "uniform").pvalue > 0.01


@pytest.mark.parametrize("outside", [-1e-9, 1 + 1e-9])
def test_an_overlap_that_rounding_puts_out_of_range_has_a_p_value(outside):
    assert against_haar(outside, 14, 2).p_value == pytest.approx(0, abs=1e-9)


def test_all_directions_overlap_whatever_they_are():
    fit = against_haar(1.0, 5, 5)
    assert (fit.null_mean, fit.null_std) == (1.0, 0.0)
    assert math.isnan(fit.z)
    assert math.isnan(fit.p_value)


@pytest.mark.parametrize(
    ("cosine", "z", "p_value"), [(0.4, 4.0, 1 / 16), (-0.4, -4.0, 1 / 16), (0.05, 0.5, 1), (0, 0, 1)]
)
def test_unrelated_updates_have_a_cosine_of_zero_with_chebyshevs_bound(cosine, z, p_value):
    fit = against_unrelated(cosine, (20, 5))
    assert (fit.null_mean, fit.null_std, fit.z, fit.p_value) == pytest.approx((0, 0.1, z, p_value))


@pytest.mark.parametrize("size", [2, 3, 12])
def test_the_jackknife_error_of_a_mean_is_its_standard_error(size):
    values = np.random.default_rng(size).normal(size=size)
    without_each = [np.delete(values, i).mean() for i in range(size)]
    assert jackknife_error(without_each) == pytest.approx(stats.sem(values))


@pytest.mark.parametrize("values", [[], [1.0]])
def test_the_jackknife_needs_two_units(values):
    assert math.isnan(jackknife_error(values))


def test_pairs_of_one_odd_checkpoint_are_not_independent_evidence():
    """One of four checkpoints is odd, so half of the six pairs are: the error is that of the checkpoints' jackknife."""
    names = "abcd"
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    odd = {"d": 1.0}
    effects = pd.DataFrame(
        [
            {"tuned": a + b, "tuned_a": a, "tuned_b": b, "layer": layer, "effect": odd.get(a, 0) + odd.get(b, 0)}
            for a, b in pairs
            for layer in range(3)
        ]
    )
    found = pair_interval(effects, seed=0)
    without = [np.mean([odd.get(a, 0) + odd.get(b, 0) for a, b in pairs if x not in (a, b)]) for x in names]
    error = math.sqrt(3 / 4 * np.square(np.array(without) - np.mean(without)).sum())
    reach = stats.t.ppf(0.975, 3) * error
    assert (found.estimate, found.low, found.high) == pytest.approx((0.5, 0.5 - reach, 0.5 + reach))
    assert found.p_value == pytest.approx(2 * stats.t.sf(0.5 / error, 3))
