"""The permutation test over task labels: exact where it can be enumerated, calibrated, sampled where it cannot."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from spectralbasis.comparison import statistics
from spectralbasis.comparison.sharing import sharing_findings
from spectralbasis.comparison.statistics import arrangements, hierarchical_interval, pair_interval, permutation_test


def symmetric(size, seed=0):
    values = np.random.default_rng(seed).normal(size=(size, size))
    return values + values.T


def test_two_tasks_of_two_seeds_can_reach_a_third_at_best():
    excess = np.zeros((4, 4))
    excess[0, 1] = excess[1, 0] = 3
    excess[2, 3] = excess[3, 2] = 2
    found = permutation_test(excess, ["a", "a", "b", "b"], seed=0)
    assert (found.statistic, found.same_task, found.different_tasks) == (2.5, 2.5, 0)
    assert (found.p_value, found.arrangements, found.exact) == (pytest.approx(1 / 3), 6, True)
    assert permutation_test(excess, ["a", "b", "a", "b"], seed=0).p_value == 1


def test_the_p_value_is_that_of_all_permutations():
    excess, tasks = symmetric(5), ["a", "a", "b", "b", "c"]

    def statistic(order):
        same, other = [], []
        for i, j in itertools.combinations(range(5), 2):
            (same if order[i] == order[j] else other).append(excess[i, j])
        return np.mean(same) - np.mean(other)

    chance = [statistic(order) for order in itertools.permutations(tasks)]
    expected = np.mean(np.array(chance) >= statistic(tasks) - 1e-12)
    assert permutation_test(excess, tasks, seed=0).p_value == pytest.approx(expected)


def test_p_values_are_uniform_over_what_they_can_be_where_labels_mean_nothing():
    tasks = list("aabbcc")
    ranks = [round(15 * permutation_test(symmetric(6, seed), tasks, 0).p_value) for seed in range(600)]
    counts = np.bincount(ranks, minlength=16)[1:]
    assert stats.chisquare(counts).pvalue > 0.01


def test_sampling_comes_close_to_enumeration(monkeypatch):
    excess, tasks = symmetric(7), list("aaabbbc")
    exact = permutation_test(excess, tasks, seed=0)
    monkeypatch.setattr(statistics, "MOST_ENUMERATED", 10)
    sampled = permutation_test(excess, tasks, seed=0)
    assert (exact.exact, sampled.exact, sampled.arrangements) == (True, False, statistics.SAMPLED)
    assert sampled.p_value == pytest.approx(exact.p_value, abs=0.02)
    assert sampled.p_value > 0


@pytest.mark.parametrize("tasks", ["aaa", "abc"])
def test_pairs_of_one_kind_leave_nothing_to_test(tasks):
    assert permutation_test(symmetric(3), list(tasks), seed=0) is None


def rows(effects, seed=0):
    """`sharing.parquet` of overlaps with the given excess for each pair, four layers, and a little noise."""
    rng = np.random.default_rng(seed)
    size = len(effects)
    return pd.DataFrame(
        [
            {"tuned_a": f"t{i}", "tuned_b": f"t{j}", "matrix": f"{layer}.dense", "layer": layer, "k": 4}
            | {"metric": "subspace_overlap", "side": side, "null_mean": 0.5, "base_overlap_a": 0.8}
            | {"value": 0.5 + effects[i, j] + 0.001 * rng.normal(), "base_overlap_b": 0.8}
            for i, j in itertools.combinations(range(size), 2)
            for layer in range(4)
            for side in ("left", "right")
        ]
    )


def test_tasks_are_compared_between_and_their_seeds_are_the_ceiling():
    tasks = {"t0": "a", "t1": "a", "t2": "b", "t3": "b"}
    same = np.array([[a == b for b in tasks.values()] for a in tasks.values()])
    found = sharing_findings(rows(np.where(same, 0.3, 0.1)), tasks, (), seed=0)
    assert found["over"] == "different tasks"
    assert found["effect"] == pytest.approx(0.1, abs=0.001)
    assert found["ceiling"]["effect"] == pytest.approx(0.3, abs=0.001)
    assert found["permutation"]["statistic"] == pytest.approx(0.2, abs=0.001)
    assert found["permutation"]["p_value"] == pytest.approx(1 / 3)
    assert [pair["same_task"] for pair in found["pairs"]] == [True, False, False, False, False, True]
    plain = sharing_findings(rows(np.where(same, 0.3, 0.1)), {}, (), seed=0)
    assert (plain["over"], plain["ceiling"], plain["permutation"]) == ("all", None, None)
    assert plain["effect"] == pytest.approx(1 / 6, abs=0.001)


def test_earlier_steps_of_a_run_are_no_evidence_for_sharing():
    effects = np.full((3, 3), 0.1)
    effects[0, 1] = effects[1, 0] = 0.4
    found = sharing_findings(rows(effects), {}, {"t0"}, seed=0)
    assert (found["over"], found["note"]) == ("all", "")
    assert found["effect"] == pytest.approx(0.1, abs=0.001)
    assert len(found["pairs"]) == 3
    alone = sharing_findings(rows(effects[:2, :2]), {}, {"t0"}, seed=0)
    assert alone["over"] == "one run"
    assert "one training run" in alone["note"]


def test_pairs_with_a_checkpoint_in_common_are_no_independent_evidence():
    """Each checkpoint has its own effect, which all its pairs inherit: pairs as such give far too narrow intervals."""
    rng = np.random.default_rng(0)
    trials, found = 120, {pair_interval: 0, hierarchical_interval: 0}
    for trial in range(trials):
        own = rng.normal(size=5)
        effects = pd.DataFrame(
            [
                {"tuned": f"{i}-{j}", "tuned_a": i, "tuned_b": j, "layer": layer}
                | {"effect": own[i] + own[j] + 0.3 * rng.normal()}
                for i, j in itertools.combinations(range(5), 2)
                for layer in range(3)
            ]
        )
        for interval in found:
            found[interval] += interval(effects, trial).p_value < 0.05
    assert stats.binomtest(found[pair_interval], trials, 0.05, alternative="greater").pvalue > 0.01
    assert found[hierarchical_interval] > 0.2 * trials


def test_one_pair_is_judged_by_its_layers():
    effects = pd.DataFrame({"tuned": 0, "tuned_a": "a", "tuned_b": "b", "layer": range(8), "effect": np.arange(8.0)})
    assert pair_interval(effects, 0) == hierarchical_interval(effects, 0)


def test_sampled_arrangements_begin_with_the_given_one_and_keep_every_label(monkeypatch):
    monkeypatch.setattr(statistics, "MOST_ENUMERATED", 10)
    given = list("aabbbcd")
    orders, exact = arrangements(given, seed=0)
    assert not exact
    assert orders[0].tolist() == given
    assert {tuple(sorted(order)) for order in orders.tolist()} == {tuple(given)}
    assert len({tuple(order) for order in orders.tolist()}) > 300  # of the 420 that there are
    assert np.array_equal(orders, arrangements(given, seed=0)[0])
    assert not np.array_equal(orders, arrangements(given, seed=1)[0])


def test_as_many_arrangements_as_may_be_enumerated_are(monkeypatch):
    monkeypatch.setattr(statistics, "MOST_ENUMERATED", 12)
    orders, exact = arrangements(list("aabc"), seed=0)
    assert exact
    assert {tuple(order) for order in orders.tolist()} == set(itertools.permutations("aabc"))
