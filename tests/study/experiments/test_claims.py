"""From intervals to verdicts on equality, and what a family makes of its claims."""

import math

import pytest

from spectralbasis.study.claims import Findings, as_family, conclude, conclude_equal, marked
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
    claim = conclude_equal(
        "a equals b", "They differ by less.", found, within=0.01, unit="score", runs=12, units="4 tasks"
    )
    assert claim.verdict == verdict
    assert math.isnan(claim.p_value)


def test_a_family_keeps_verdicts_that_its_size_does_not_explain():
    def claim(name, p_value):
        found = Interval(1.0, 0.1, 1.9, p_value)
        return conclude(
            name, "One is above the other.", found, unit="score", would_change="Other.", runs=12, units="4 tasks"
        )

    single = [claim("clear", 0.004), claim("close", 0.03), claim("close too", 0.04), claim("untested", math.nan)]
    assert {one.verdict for one in single} == {"supported"}
    family = {one.name: one for one in as_family(iter(single))}
    assert [one.p_value for one in family.values()][:3] == pytest.approx([0.012, 0.06, 0.06])
    assert {name: one.verdict for name, one in family.items()} == {
        "clear": "supported", "close": "undecided", "close too": "undecided", "untested": "undecided",
    }  # fmt: skip


def test_what_rounding_leaves_of_nothing_is_zero():
    found = Interval(-1e-17, -0.2, 0.2, 1.0)
    claim = conclude(
        "a above b", "One is above the other.", found, unit="score", would_change="N.", runs=12, units="4 tasks"
    )
    assert f"{claim.effect:+g}" == "+0"


def above(name, low, high, **more):
    found = Interval((low + high) / 2, low, high, 0.3)
    return conclude(name, "One is above the other.", found, unit="score", would_change="More.", runs=12,
                    units="4 tasks", **more)  # fmt: skip


def test_a_margin_is_judged_by_the_interval_alone():
    assert above("a", -0.009, 0.02, margin=0.01).verdict == "supported"
    assert above("a", -0.03, -0.011, margin=0.01).verdict == "contradicted"
    assert above("a", -0.02, 0.01, margin=0.01).verdict == "undecided"
    family = as_family([above("a", -0.009, 0.02, margin=0.01), above("b", 0.1, 0.2)])
    assert [claim.verdict for claim in family] == ["supported", "undecided"]


def test_primary_claims_come_first_and_are_few():
    claims = [above(name, 0.1, 0.2) for name in "abcde"]
    found = marked(claims, "c", "a")
    assert [(claim.name, claim.primary) for claim in found] == [
        ("c", True), ("a", True), ("b", False), ("d", False), ("e", False),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"no claim is named 'x'; the names are a, b, c, d, e"):
        marked(claims, "x")
    with pytest.raises(ValueError, match=r"4 primary claims \(a, b, c, d\); expected at most 3"):
        Findings(marked(claims, *"abcd"))


def test_a_claim_says_when_it_was_stated():
    assert above("a", 0.1, 0.2, stated="after").stated == "after"
    with pytest.raises(ValueError, match="stated='later' of a; expected one of before, changed, after"):
        above("a", 0.1, 0.2, stated="later")


def test_the_sentence_is_that_of_the_verdict():
    said = ("more, {effect}; {units}", "less, {effect}", "perhaps, {effect}")
    assert above("a", 0.1, 0.2).tell(*said) == "more, +0.15 score (+0.10 to +0.20); 4 tasks"
    assert above("a", -0.2, -0.1).tell(*said) == "less, -0.15 score (-0.20 to -0.10)"
    lonely = conclude("a", "A.", Interval(0.5, *[math.nan] * 3), unit="score", would_change="", runs=1, units="1 task")
    assert lonely.tell(*said) == "perhaps, +0.50 score (no interval exists)"
    nothing = conclude("a", "A.", Interval(*[math.nan] * 4), unit="score", would_change="", runs=0, units="0 tasks")
    assert nothing.tell(*said) == "No finished run answers this yet."


def test_an_interval_beside_zero_that_is_undecided_says_why():
    (claim, *_) = as_family([above("a", 0.1, 0.2), above("b", 0.1, 0.2)])
    assert claim.tell("", "", "perhaps, {effect}") == "perhaps, +0.15 score (+0.10 to +0.20, adjusted p = 0.6)"
