"""From intervals to verdicts on equality."""

import math

import pytest

from spectralbasis.study.experiments.claims import conclude_equal
from spectralbasis.study.measures.statistics import Interval


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.004, 0.009, "supported"),
        (0.002, 0.009, "supported"),
        (-0.004, 0.011, "undecided"),
        (-0.02, 0.02, "undecided"),
        (0.011, 0.02, "contradicted"),
        (-0.03, -0.012, "contradicted"),
        (math.nan, math.nan, "undecided"),
    ],
)
def test_equality_needs_the_whole_interval_inside(low, high, verdict):
    found = Interval((low + high) / 2, low, high, 0.3)
    claim = conclude_equal("a equals b", "They differ by less.", found, within=0.01, unit="score", runs=12)
    assert claim.verdict == verdict
    assert math.isnan(claim.p_value)
