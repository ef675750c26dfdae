"""Claims say one of three things, and numbers that do not exist are not made up."""

import math

import pytest

from spectralbasis.study.claims import Claim


def claim(**changes) -> Claim:
    fields = {
        "name": "a", "text": "A is above B.", "verdict": "supported", "effect": 0.25, "low": 0.125, "high": 0.5,
        "p_value": 0.01, "unit": "accuracy", "would_change": "More seeds.", "runs": 3,
        "units": "1 task",
    }  # fmt: skip
    return Claim(**fields | changes)


def test_only_three_verdicts_exist():
    with pytest.raises(ValueError, match="expected one of supported, contradicted, undecided"):
        claim(verdict="true")


def test_absent_numbers_are_none_in_json():
    assert claim(effect=math.nan, low=-math.inf).to_dict()["effect"] is None
    assert claim(effect=math.nan, low=-math.inf).to_dict()["low"] is None
    assert claim().to_dict()["effect"] == 0.25
