"""Experiments and their conclusions: claims with effects and verdicts, tables and figures.

Also contests between ways to tune. All choose learning rates by one rule, on examples other than those for the score.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from spectralbasis.comparison.statistics import Interval, Verdict, verdict_of
from spectralbasis.study.estimates import holm, paired_comparison
from spectralbasis.study.runs import Results, Run
from spectralbasis.study.subjects import Subject

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


@dataclass(frozen=True)
class Contrast:
    """One arm, or kind of arm, against another.

    Args:
        name: of the claim.
        text: the claim, true where `better` scores above `worse` by more than minus the margin.
        better, worse: values of the compared column.
        would_change: what would have to be seen for another verdict.
        margin: how far below still counts as no worse.
    """

    name: str
    text: str
    better: str
    worse: str
    would_change: str
    margin: float = 0.0


def differences(scores: pd.DataFrame, column: str, better: str, worse: str, by: Sequence[str]) -> pd.DataFrame:
    """Pairs of scores that differ in `column` alone: the columns of `by`, `better` and `worse`."""
    wide = scores[scores[column].isin([better, worse])].pivot_table(index=list(by), columns=column, values="score")
    for name in (better, worse):
        if name not in wide:
            wide[name] = np.nan
    pairs = wide.dropna(subset=[better, worse]).reset_index()
    return pairs.rename(columns={better: "better", worse: "worse"})


def compare_pairs(pairs: pd.DataFrame) -> Interval:
    """The mean difference; tasks of a subject are the units, since seeds and cells of one task are not independent."""
    return paired_comparison(pairs["better"], pairs["worse"], pairs["subject"] + " / " + pairs["task"])


def conclude_family(
    contrasts: Sequence[Contrast], scores: pd.DataFrame, column: str, by: Sequence[str], unit: str = "score"
) -> list[Claim]:
    """A claim for each contrast, with Holm's p-values over all of them.

    Args:
        contrasts: what is compared.
        scores: with the columns `subject`, `task`, `score`, `column` and those of `by`.
        column: whose values are compared.
        by: what pairs have in common.
        unit: of the effects.

    Returns:
        Claims whose p-values are adjusted; those that are not below 0.05 then are undecided, except that a margin is
        judged by the interval alone.
    """
    claims = []
    for one in contrasts:
        pairs = differences(scores, column, one.better, one.worse, by)
        found = compare_pairs(pairs)
        shifted = replace(found, low=found.low + one.margin, high=found.high + one.margin)
        judged = conclude(one.name, one.text, shifted, unit=unit, would_change=one.would_change, runs=2 * len(pairs))
        claims.append(replace(judged, low=found.low, high=found.high))
    return [
        replace(judged, verdict=claim.verdict) if contrast.margin else judged
        for contrast, claim, judged in zip(contrasts, claims, as_family(claims), strict=True)
    ]


def conclude_equality(
    contrasts: Sequence[Contrast], scores: pd.DataFrame, column: str, by: Sequence[str], within: float
) -> list[Claim]:
    """For each contrast, the claim that its arms' mean scores differ by less than `within`; see `conclude_equal`."""
    claims = []
    for one in contrasts:
        pairs = differences(scores, column, one.better, one.worse, by)
        name = f"{one.better} equals {one.worse}"
        text = f"The mean scores of `{one.better}` and `{one.worse}` differ by less than {within:g}."
        found = compare_pairs(pairs)
        claims.append(conclude_equal(name, text, found, within=within, unit="score", runs=2 * len(pairs)))
    return claims


Needs = Callable[[Subject, str], Mapping[str, Run]]
COEFFICIENTS = {"method": "spectral", "scaling": "absolute"}
"""Settings of all arms that train spectral coefficients; their learning rates are meant in this unit."""
FURTHER_RATES = 3
"""How many rates an arm may try beyond its own, as long as the best is the first or the last."""
COLUMNS = ("subject", "arm", "task", "seed", "learning_rate", "score", "backbone", "head", "model", "seconds_per_step",
           "precision", "adapter_bytes")  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to tune.

    Args:
        name: in tables.
        settings: of `tune`: the method and its options.
        learning_rates: among which it chooses, from small to large; while the best is the first or the last, the next
            of the series is tried too.
        needs: what it needs for a subject and a task, such as a basis.
    """

    name: str
    settings: Mapping[str, Any]
    learning_rates: tuple[float, ...]
    needs: Needs = lambda subject, task: {}

    def run(self, subject: Subject, task: str, learning_rate: float, seed: int) -> Run:
        """One tuning."""
        settings = {**self.settings, "learning_rate": learning_rate}
        return subject.tune(task, seed, needs=self.needs(subject, task), **settings)


@dataclass(frozen=True)
class Contest:
    """Arms that are compared on one subject.

    Args:
        subject: the model and its tasks.
        arms: what is compared.
        selection_tasks: on whose selection halves, with the first seed, the learning rates are chosen.
        seeds: of the runs that count.
    """

    subject: Subject
    arms: tuple[Arm, ...]
    selection_tasks: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def size(self) -> int:
        """Number of runs that count, whether their rates are known yet or not."""
        return len(self.arms) * len(self.subject.tasks) * len(self.seeds)

    def plan(self, results: Results) -> list[Run]:
        """All trials of learning rates, then the runs that count of those arms whose rate is known."""
        trials = []
        for arm in self.arms:
            rates = self.tried_rates(arm, results)
            if len(rates) > 1:
                trials += [run for rate in rates for run in self._at(arm, rate)]
        return trials + [run for _, run in self.counted(results)]

    def counted(self, results: Results) -> Iterator[tuple[dict[str, Any], Run]]:
        """The runs at chosen rates, with their labels in tables, one seed of everything after another."""
        rates = {arm.name: self.chosen_rate(arm, results) for arm in self.arms}
        for seed in self.seeds:
            for arm in self.arms:
                rate = rates[arm.name]
                for task in self.subject.tasks if rate is not None else ():
                    labels = {"subject": self.subject.name, "arm": arm.name, "task": task, "seed": seed}
                    yield {**labels, "learning_rate": rate}, arm.run(self.subject, task, rate or 0.0, seed)

    def chosen_rate(self, arm: Arm, results: Results) -> float | None:
        """The rate of the best mean score on the selection halves; None until all trials are done or have failed.

        A task on which every rate failed, such as one whose data are absent, has no say.
        """
        return self._best(arm, self.tried_rates(arm, results), results)

    def tried_rates(self, arm: Arm, results: Results) -> tuple[float, ...]:
        """The arm's rates, from small to large, and up to `FURTHER_RATES` more while the best is at an end."""
        rates = arm.learning_rates
        while 1 < len(rates) < len(arm.learning_rates) + FURTHER_RATES:
            best = self._best(arm, rates, results)
            if best == rates[-1]:
                rates = (*rates, _next_rate(rates[-2], best))
            elif best == rates[0]:
                rates = (_next_rate(rates[1], best), *rates)
            else:
                break
        return rates

    def _best(self, arm: Arm, rates: tuple[float, ...], results: Results) -> float | None:
        if len(rates) == 1:
            return rates[0]
        found = np.array([[_selection_score(run, results) for run in self._at(arm, rate)] for rate in rates])
        usable = found[:, np.isfinite(found).any(axis=0)]
        if np.isnan(found).any() or not usable.size:
            return None
        return rates[int(usable.mean(axis=1).argmax())]

    def scores(self, results: Results) -> pd.DataFrame:
        """A row, with the columns `COLUMNS`, for each finished run that counts."""
        rows = []
        for labels, run in self.counted(results):
            record = results.get(run)
            if record is not None:
                rows.append({**labels, **_facts(record.result)})
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def _at(self, arm: Arm, rate: float) -> list[Run]:
        return [arm.run(self.subject, task, rate, self.seeds[0]) for task in self.selection_tasks]


def _next_rate(before: float, last: float) -> float:
    """The next of a geometric series, with one digit, as rates are written."""
    return float(f"{last * last / before:.0e}")


def _selection_score(run: Run, results: Results) -> float:
    """NaN where the run is not done; a run that failed, as diverged ones do, is worse than all others."""
    record = results.get(run)
    if record is not None:
        return float(record.result["selection_score"])
    return math.nan if results.error(run) is None else -math.inf


def _facts(result: Mapping[str, Any]) -> dict[str, Any]:
    named = {"backbone": "parameters_backbone", "head": "parameters_head", "model": "parameters_model"}
    same = ("score", "seconds_per_step", "adapter_bytes", "precision")
    return {**{name: result[key] for name, key in named.items()}, **{name: result[name] for name in same}}
