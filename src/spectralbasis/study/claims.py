"""Experiments and their conclusions: claims with effects and verdicts, tables and figures."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import pandas as pd
import plotly.graph_objects as go

from spectralbasis.comparison.statistics import Interval, Verdict, verdict_of
from spectralbasis.report.study_page import STATED, Stated, two_digits
from spectralbasis.study.estimates import holm
from spectralbasis.study.runs import Results, Run

VERDICTS = get_args(Verdict)
MOST_PRIMARY = 3
CHOSEN_AFTER = "Which claims are primary was decided after the scores were seen."


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
        units: what the interval is over, as a number and what they are, such as `7 tasks of 2 models`.
        margin: how far from zero the effect may be without harm to the claim, in `unit`.
        stated: whether it was asked before its scores were seen, a key of `STATED`.
        primary: whether the experiment is about it; all others are exploration.
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
    units: str
    margin: float = 0.0
    stated: Stated = "before"
    primary: bool = False

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict={self.verdict!r} of {self.name}; expected one of {', '.join(VERDICTS)}")
        if self.stated not in STATED:
            raise ValueError(f"stated={self.stated!r} of {self.name}; expected one of {', '.join(STATED)}")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; None where a number does not exist."""
        return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in asdict(self).items()}

    def tell(self, supported: str, contradicted: str, undecided: str) -> str:
        """The sentence of its verdict, with `{effect}` (its unit and 95 % interval too) and `{units}` filled in.

        Example:
            >>> claim = Claim("a", "A exceeds B.", "supported", 0.0251, 0.0104, 0.0398, 0.01, "score", "", 8, "4 tasks")
            >>> claim.tell("A exceeds B: {effect}; {units}.", "", "")
            'A exceeds B: +0.025 score (+0.010 to +0.040); 4 tasks.'
        """
        said = {"supported": supported, "contradicted": contradicted, "undecided": undecided}[self.verdict]
        if not math.isfinite(self.effect):
            return "No finished run answers this yet."
        interval = "no interval exists"
        if math.isfinite(self.low):
            interval = f"{two_digits(self.low)} to {two_digits(self.high)}"
            if self.verdict == "undecided" and not self.margin and not self.low <= 0 <= self.high:
                interval += f", adjusted p = {self.p_value:.2g}"
        return said.format(effect=f"{two_digits(self.effect)} {self.unit} ({interval})", units=self.units)


@dataclass(frozen=True)
class Experiment:
    """One experiment of the study; help, errors and pages come from this record.

    Args:
        name: what `study` calls it.
        question: that it answers.
        presets: name → settings of a type of its own: how much of everything.
        plan: the runs wanted, in order of preference, as far as what is known tells; needs need not be listed.
        analyse: what the finished runs show.
        title: of its page; its name where it has none.
    """

    name: str
    question: str
    presets: Mapping[str, Any]
    plan: Callable[[Any, Results], list[Run]]
    analyse: Callable[[Any, Results], "Findings"]
    title: str = ""


@dataclass(frozen=True)
class Findings:
    """All that an experiment shows.

    Args:
        claims: the primary ones, at most `MOST_PRIMARY`, and those that explore.
        tables: small ones, by title.
        figures: by title; the first is the figure of the experiment.
        note: how to read them.
        answer: to the experiment's question, one sentence with its number; made from the claims, see `Claim.tell`.
    """

    claims: Sequence[Claim] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, go.Figure] = field(default_factory=dict)
    note: str = ""
    answer: str = ""

    def __post_init__(self) -> None:
        primary = [claim.name for claim in self.claims if claim.primary]
        if len(primary) > MOST_PRIMARY:
            raise ValueError(f"{len(primary)} primary claims ({', '.join(primary)}); expected at most {MOST_PRIMARY}")


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
    axes = {f"{axis}axis": {"title": title, "automargin": True} for axis, title in (("x", x), ("y", y))}
    for axis in log:
        axes[f"{axis}axis"]["type"] = "log"
    return figure.update_layout(**axes)


LEVEL = 0.05
ROUNDING = 1e-12
"""Effects below are what rounding leaves of nothing, in any unit used here."""


def conclude(
    name: str,
    text: str,
    found: Interval,
    *,
    unit: str,
    would_change: str,
    runs: int,
    units: str,
    margin: float = 0.0,
    stated: Stated = "before",
) -> Claim:
    """The claim that an effect is above `-margin`: supported where the whole interval is, contradicted where none is.

    Without finished runs, or with an interval that a single group cannot give, it is undecided.
    """
    known = runs and not math.isnan(found.low)
    verdict = verdict_of(found.low + margin, found.high + margin) if known else "undecided"
    return _claim(name, text, verdict, found, unit, would_change, runs, units, margin, stated)


def conclude_equal(
    name: str,
    text: str,
    found: Interval,
    *,
    within: float,
    unit: str,
    runs: int,
    units: str,
    stated: Stated = "before",
) -> Claim:
    """The claim that an effect is smaller than `within`, either way, as equivalence is tested (Schuirmann, 1987).

    Supported where the whole interval is within, contradicted where it is wholly without, undecided where it is not
    known or crosses a limit. At 95 %, that is a level of 2.5 % for each side; the p-value, which is of no effect at
    all, is left out.
    """
    inside = found.low > -within and found.high < within
    outside = found.low > within or found.high < -within
    verdict = "supported" if inside else "contradicted" if outside else "undecided"
    change = f"An interval of the difference that leaves the range from -{within:g} to +{within:g}."
    return _claim(name, text, verdict, replace(found, p_value=math.nan), unit, change, runs, units, within, stated)


def as_family(claims: Iterable[Claim]) -> list[Claim]:
    """Claims that ask one question in several ways, with Holm's p-values; a verdict needs one below 0.05.

    A claim with a margin is judged by its interval alone, as its p-value is of no effect at all.
    """
    given = list(claims)
    adjusted = [float(p) for p in holm([claim.p_value for claim in given])]
    return [
        replace(claim, p_value=p, verdict=claim.verdict if p < LEVEL or claim.margin else "undecided")
        for claim, p in zip(given, adjusted, strict=True)
    ]


def marked(claims: Iterable[Claim], *primary: str) -> list[Claim]:
    """The claims with those of these names as the primary ones, which come first, in this order.

    Raises:
        ValueError: no claim has one of the names.
    """
    given = {claim.name: claim for claim in claims}
    absent = [name for name in primary if name not in given]
    if absent:
        raise ValueError(f"no claim is named {absent[0]!r}; the names are {', '.join(given)}")
    first = [replace(given[name], primary=True) for name in primary]
    return [*first, *(claim for name, claim in given.items() if name not in primary)]


def counted(number: int, one: str, several: str = "") -> str:
    """A number and what it counts.

    Example:
        >>> counted(1, "task"), counted(7, "task"), counted(2, "study", "studies")
        ('1 task', '7 tasks', '2 studies')
    """
    return f"{number} {one if number == 1 else several or one + 's'}"


def task_units(rows: pd.DataFrame, model: str = "model") -> str:
    """How many tasks of how many models some rows are of, from their columns `task` and `model`."""
    if rows.empty:
        return counted(0, "task")
    tasks, models = len(rows[[model, "task"]].drop_duplicates()), rows[model].nunique()
    return f"{counted(tasks, 'task')} of {counted(models, 'model')}"


def _claim(
    name: str,
    text: str,
    verdict: str,
    found: Interval,
    unit: str,
    would_change: str,
    runs: int,
    units: str,
    margin: float,
    stated: Stated,
) -> Claim:
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
        units=units,
        margin=margin,
        stated=stated,
    )
