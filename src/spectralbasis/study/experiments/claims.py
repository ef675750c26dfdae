"""From an interval to a claim."""

import math

from spectralbasis.comparison.statistics import Interval, verdict_of
from spectralbasis.study.verdicts import Claim


def conclude(name: str, text: str, found: Interval, *, unit: str, would_change: str, runs: int) -> Claim:
    """The claim that an effect is above zero: supported where the whole interval is, contradicted where it is below.

    Without finished runs, or with an interval that a single group cannot give, it is undecided.
    """
    verdict = verdict_of(found.low, found.high) if runs and not math.isnan(found.low) else "undecided"
    return Claim(
        name=name,
        text=text,
        verdict=verdict,
        effect=found.estimate,
        low=found.low,
        high=found.high,
        p_value=found.p_value,
        unit=unit,
        would_change=would_change,
        runs=runs,
    )
