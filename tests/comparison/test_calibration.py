"""Where the null is true, `compare` finds what chance finds: p-values are uniform, false findings keep their rate."""

import pytest
from scipy import stats

from spectralbasis import compare
from tests.comparison.pairs import chance_pairs

MEASURES = [
    ("subspace_overlap", "left"),
    ("subspace_overlap", "right"),
    ("coverage_core", "both"),
    ("coverage_left", "left"),
]


@pytest.fixture(scope="module", params=[pytest.param(0.05, marks=pytest.mark.slow), 0.5])
def table(request):
    base, tuned = chance_pairs(300, request.param)
    return compare(base, [tuned], leading=4, draws=5).table


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "side"), MEASURES)
def test_p_values_of_matrices_are_uniform(table, metric, side):
    p_values = table[(table.metric == metric) & (table.side == side) & (table.k == 4)]["p_value"]
    assert len(p_values) == 300
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_correction_over_matrices_leaves_next_to_nothing(table):
    headline = table[(table.k == 4) & table.metric.isin([metric for metric, _ in MEASURES])]
    assert (headline["q_value"] < 0.05).mean() < 0.01


@pytest.mark.slow
def test_verdicts_are_rarely_wrong():
    trials, wrong = 60, {"stability": 0, "coverage": 0}
    for trial in range(trials):
        base, tuned = chance_pairs(12, 0.3, per_layer=3, seed=trial)
        summary = compare(base, [tuned], leading=4, draws=3, seed=trial).summary()
        for claim in wrong:
            wrong[claim] += summary[claim]["verdict"] != "undecided"
    for count in wrong.values():
        assert stats.binomtest(count, trials, 0.05, alternative="greater").pvalue > 0.01
