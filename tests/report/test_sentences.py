"""The prose says what the numbers say, and no more."""

import math

import pytest

from spectralbasis.report import sentences
from spectralbasis.report.sentences import Finding
from tests.report.results import finding


def read(claim, *numbers, **changes) -> Finding:
    return Finding.read(claim, finding(*numbers) | changes)


SUPPORTED = (0.912, 0.883, 0.021, 0.038, 0.0004, "supported")


def test_a_supported_stability_names_every_number():
    text = " ".join(sentences.explain(read("stability", *SUPPORTED), "37 matrices"))
    for expected in ("0.9120", "37 matrices", "0.8830", "+0.0290", "+0.0210 to +0.0380", "p\u00a0<\u00a00.001"):
        assert expected in text
    assert "turned 25\u00a0% less than by chance" in text


def test_a_contradicted_stability_says_that_the_directions_gave_way():
    text = " ".join(sentences.explain(read("stability", 0.85, 0.9, -0.06, -0.04, 0.01, "contradicted"), "3 matrices"))
    assert "−0.0500" in text
    assert "p\u00a0=\u00a00.01" in text
    assert "turned 50\u00a0% more than by chance" in text


def test_an_undecided_stability_claims_nothing_either_way():
    text = " ".join(sentences.explain(read("stability", 0.98, 0.9797, -0.001, 0.002, 0.6, "undecided"), "3 matrices"))
    assert "does not differ measurably from that of any update of this size" in text


def test_coverage_is_spoken_of_in_percent_and_as_a_multiple_of_chance():
    text = " ".join(sentences.explain(read("coverage", 0.061, 0.0278, 0.024, 0.043, 0.0004, "supported"), "3 matrices"))
    assert "6.10\u00a0%" in text
    assert "+3.32 percentage points" in text
    assert "2.2 times as much as expected by chance" in text


@pytest.mark.parametrize("claim", sentences.CLAIMS)
def test_without_a_null_no_claim_is_judged(claim):
    lone = read(claim, 0.9, None, None, None, None, "undecided")
    text = " ".join(sentences.explain(lone, "3 matrices"))
    assert "cannot be judged" in text
    assert "chance." not in sentences.reading(lone)
    assert sentences.interval(lone) == "–"
    assert "There is no null" in sentences.headline(lone, lone)


def test_an_effect_without_interval_or_p_makes_no_claim_to_either():
    text = " ".join(sentences.explain(read("stability", 0.9, 0.8, None, None, None, "undecided"), "1 matrix"))
    assert "+0.1000." in text
    assert "interval" not in text
    assert "p\u00a0" not in text


@pytest.mark.parametrize(
    ("stability", "coverage", "link"), [("supported", "contradicted", "but"), ("supported",) * 2 + ("and",)]
)
def test_the_headline_joins_both_verdicts(stability, coverage, link):
    numbers = (0.5, 0.4, 0.05, 0.15, 0.01)
    text = sentences.headline(read("stability", *numbers, stability), read("coverage", *numbers, coverage))
    assert f", {link} " in text
    assert ("less of the update than expected" in text) == (coverage == "contradicted")


@pytest.mark.parametrize(("p", "text"), [(0.0, "<\u00a00.001"), (0.0421, "0.042"), (1.0, "1"), (None, "–")])
def test_a_p_value_is_never_written_as_zero(p, text):
    assert sentences.p_value(p) == text


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "much", []])
def test_what_is_no_finite_number_is_absent(value):
    assert sentences.number(value) is None


def test_a_small_effect_keeps_its_digits():
    assert sentences.difference("stability", 0.000012) == "+0.000012"
    assert sentences.difference("coverage", -0.00004) == "−0.004"
