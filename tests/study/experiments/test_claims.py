"""From intervals to verdicts on equality, and what a family makes of its claims."""

import math

import pytest

from spectralbasis.study.claims import as_family, conclude, conclude_equal
from spectralbasis.study.estimates import Interval


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


def test_a_family_keeps_verdicts_that_its_size_does_not_explain():
    def claim(name, p_value):
        found = Interval(1.0, 0.1, 1.9, p_value)
        return conclude(name, "One is above the other.", found, unit="score", would_change="Other numbers.", runs=12)

    single = [claim("clear", 0.004), claim("close", 0.03), claim("close too", 0.04), claim("untested", math.nan)]
    assert {one.verdict for one in single} == {"supported"}
    family = {one.name: one for one in as_family(iter(single))}
    assert [one.p_value for one in family.values()][:3] == pytest.approx([0.012, 0.06, 0.06])
    assert {name: one.verdict for name, one in family.items()} == {
        "clear": "supported", "close": "undecided", "close too": "undecided", "untested": "undecided",
    }  # fmt: skip


def test_what_rounding_leaves_of_nothing_is_zero():
    found = Interval(-1e-17, -0.2, 0.2, 1.0)
    claim = conclude("a above b", "One is above the other.", found, unit="score", would_change="Numbers.", runs=12)
    assert f"{claim.effect:+g}" == "+0"
