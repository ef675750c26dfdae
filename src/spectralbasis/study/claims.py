"""Experiments and their conclusions: claims with effects and verdicts, tables and figures."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import pandas as pd
import plotly.graph_objects as go

from spectralbasis.comparison.statistics import Interval, Verdict, verdict_of
from spectralbasis.study.estimates import holm
from spectralbasis.study.runs import Results, Run

VERDICTS = get_args(Verdict)


@dataclass(frozen=True)
class Claim:
    """One claim with its verdict.

    Args:
        name: short and stable, such as `leading above scrambled`.
        text: the claim as a sentence that could be false.
        verdict: one of `VERDICTS`.
        effect: what was observed, in `unit`; NaN where nothing was.
        low: lower end of its 95 % interval.
        high: upper end of its 95 % interval.
        p_value: two-sided, against no effect.
        unit: of the effect, such as `accuracy` or `share of the update`.
        would_change: what would have to be observed for another verdict.
        runs: how many finished runs it rests on.
    """

    name: str
    text: str
    verdict: str
    effect: float
    low: float
    high: float
    p_value: float
    unit: str
    would_change: str
    runs: int

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict={self.verdict!r} of {self.name}; expected one of {', '.join(VERDICTS)}")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; None where a number does not exist."""
        return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in asdict(self).items()}


@dataclass(frozen=True)
class Experiment:
    """One experiment of the study; help, errors and pages come from this record.

    Args:
        name: what `study` calls it.
        question: that it answers.
        presets: name → settings of a type of its own: how much of everything.
        plan: the runs wanted, in order of preference, as far as what is known tells; needs need not be listed.
        analyse: what the finished runs show.
    """

    name: str
    question: str
    presets: Mapping[str, Any]
    plan: Callable[[Any, Results], list[Run]]
    analyse: Callable[[Any, Results], "Findings"]


@dataclass(frozen=True)
class Findings:
    """All that an experiment shows: its claims, small tables by title, figures by title, and a note."""

    claims: Sequence[Claim] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, go.Figure] = field(default_factory=dict)
    note: str = ""


def scatter_figure(traces: Iterable[Mapping[str, Any]], x: str, y: str, *, log: str = "") -> go.Figure:
    """Points in a plane.

    Args:
        traces: of Plotly's `scatter`, with markers alone where nothing else is said.
        x, y: titles of the axes.
        log: the axes that are logarithmic, such as "xy".
    """
    figure = go.Figure()
    for trace in traces:
        figure.add_scatter(**{"mode": "markers", **trace})
    axes = {f"{axis}axis": {"title": title} for axis, title in (("x", x), ("y", y))}
    for axis in log:
        axes[f"{axis}axis"]["type"] = "log"
    return figure.update_layout(**axes)


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
    known or crosses a limit. At 95 %, that is a level of 2.5 % for each side; the p-value, which is of no effect at
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
