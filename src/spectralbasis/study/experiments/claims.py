"""From intervals to claims, and to families of claims."""

import math
from collections.abc import Iterable
from dataclasses import replace

from spectralbasis.comparison.statistics import Interval, verdict_of
from spectralbasis.study.measures.statistics import holm
from spectralbasis.study.verdicts import Claim

LEVEL = 0.05
ROUNDING = 1e-12
"""Effects below are what rounding leaves of nothing, in any unit used here."""


def conclude(name: str, text: str, found: Interval, *, unit: str, would_change: str, runs: int) -> Claim:
    """The claim that an effect is above zero: supported where the whole interval is, contradicted where it is below.

    Without finished runs, or with an interval that a single group cannot give, it is undecided.
    """
    verdict = verdict_of(found.low, found.high) if runs and not math.isnan(found.low) else "undecided"
    return _claim(name, text, verdict, found, unit, would_change, runs)


def conclude_equal(name: str, text: str, found: Interval, *, within: float, unit: str, runs: int) -> Claim:
    """The claim that an effect is smaller than `within`, either way, as equivalence is tested (Schuirmann, 1987).

    Supported where the whole interval is within, contradicted where it is wholly without, undecided where it is not
    known or crosses a limit. At 95 %, that is a level of 2.5 % for each side; the p-value, which speaks of no effect at
    all, is left out.
    """
    inside = found.low > -within and found.high < within
    outside = found.low > within or found.high < -within
    verdict = "supported" if inside else "contradicted" if outside else "undecided"
    change = f"An interval of the difference that leaves the range from -{within:g} to +{within:g}."
    return _claim(name, text, verdict, replace(found, p_value=math.nan), unit, change, runs)


def as_family(claims: Iterable[Claim]) -> list[Claim]:
    """Claims that ask one question in several ways, with Holm's p-values; a verdict needs one below 0.05."""
    given = list(claims)
    adjusted = [float(p) for p in holm([claim.p_value for claim in given])]
    return [
        replace(claim, p_value=p, verdict=claim.verdict if p < LEVEL else "undecided")
        for claim, p in zip(given, adjusted, strict=True)
    ]


def _claim(name: str, text: str, verdict: str, found: Interval, unit: str, would_change: str, runs: int) -> Claim:
    return Claim(
        name=name,
        text=text,
        verdict=verdict,
        effect=0.0 if abs(found.estimate) < ROUNDING else found.estimate,
        low=found.low,
        high=found.high,
        p_value=found.p_value,
        unit=unit,
        would_change=would_change,
        runs=runs,
    )
