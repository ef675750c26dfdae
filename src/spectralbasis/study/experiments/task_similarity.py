"""Does likeness of two tasks' weights predict that the adapter of one is a good start for the other?"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from spectralbasis.comparison.statistics import Interval
from spectralbasis.report.study_page import two_digits
from spectralbasis.study.claims import (
    Claim,
    Experiment,
    Findings,
    as_family,
    conclude,
    counted,
    marked,
    scatter_figure,
)
from spectralbasis.study.contests import COEFFICIENTS
from spectralbasis.study.estimates import jackknife_interval, mantel_correlation, rank_correlation, within
from spectralbasis.study.experiments import task_sharing
from spectralbasis.study.runs import Results, Run
from spectralbasis.study.subjects import MINILM, MINILM_LONGER, ROBERTA, TINY_VIT, VIT_B16, Subject

QUESTION = (
    "Does the overlap of two tasks' leading directions, or the cosine of their trained coefficients, predict how good "
    "a start the adapter of one task is for the other?"
)

Floats = NDArray[np.float64]
CORE = {**COEFFICIENTS, "coefficients": "core", "leading": 16, "learning_rate": 1e-2}


@dataclass(frozen=True)
class Settings:
    """Which adapters are trained, and from which start.

    Args:
        sharing: its comparisons of fully finetuned models are taken over, at the first of its learning rates; so are
            its models, tasks and seeds.
        adapter: settings of the adapters.
        steps: how long each is trained from the start of another, and from nothing beside it.
    """

    sharing: task_sharing.Settings
    adapter: Mapping[str, Any] = field(default_factory=lambda: CORE)
    steps: int = 40


def _of(preset: str, *subjects: Subject, **finetuning: Any) -> task_sharing.Settings:
    settings = task_sharing.PRESETS[preset]
    return replace(settings, finetuning=replace(settings.finetuning, subjects=subjects, **finetuning), rates=(1,))


PRESETS = {
    "quick": Settings(
        _of("quick", TINY_VIT, seeds=(0,)),
        {**COEFFICIENTS, "coefficients": "diagonal", "leading": 8, "learning_rate": 2e-2},
        steps=4,
    ),
    "cpu": Settings(_of("cpu", MINILM), {**CORE, **MINILM_LONGER.settings}),
    "paper": Settings(_of("paper", ROBERTA, VIT_B16), steps=200),
}

PREDICTORS = {
    "overlap of leading directions": "the overlap of the leading directions of two fully finetuned models",
    "cosine of updates": "the cosine of the updates of two fully finetuned models",
    "cosine of coefficients": "the cosine of the coefficients of two adapters",
}


@dataclass(frozen=True)
class _Arms:
    """The runs of one model and one seed."""

    adapters: dict[str, Run]
    fresh: dict[str, Run]
    moved: dict[tuple[str, str], Run]
    likeness: Run


def plan(settings: Settings, results: Results) -> list[Run]:
    """An adapter for each task, each of the others' started from it, and what the weights say."""
    runs: list[Run] = []
    for subject, comparison in _comparisons(settings):
        for seed in settings.sharing.finetuning.seeds:
            arms = _arms(settings, subject, seed)
            runs += [*arms.adapters.values(), *arms.fresh.values(), *arms.moved.values(), arms.likeness]
        runs.append(comparison)
    return runs


def _comparisons(settings: Settings) -> Iterator[tuple[Subject, Run]]:
    for subject in settings.sharing.finetuning.subjects:
        rate = subject.learning_rates[settings.sharing.rates[0]]
        yield subject, task_sharing.comparison(settings.sharing, subject, rate)


def _arms(settings: Settings, subject: Subject, seed: int) -> _Arms:
    tasks = subject.tasks
    short = {**settings.adapter, "steps": settings.steps}
    adapters = {task: subject.tune(task, seed, **settings.adapter) for task in tasks}
    needs = {f"adapter_{number}": adapters[task] for number, task in enumerate(tasks)}
    return _Arms(
        adapters,
        {task: subject.tune(task, seed, **short) for task in tasks},
        {(a, b): subject.tune(b, seed, needs={"start": adapters[a]}, **short) for a in tasks for b in tasks if a != b},
        Run("similarity", {"tasks": list(tasks)}, 0, needs),
    )


def analyse(settings: Settings, results: Results) -> Findings:
    """For each model the rank correlation of likeness with what a start gains, pairs of tasks permuted by tasks."""
    claims: list[Claim] = []
    tables: list[pd.DataFrame] = []
    without: list[pd.DataFrame] = []
    for subject, comparison in _comparisons(settings):
        arms = [_arms(settings, subject, seed) for seed in settings.sharing.finetuning.seeds]
        gains = _mean([_gains(subject, one, results) for one in arms], subject)
        likeness = {
            "overlap of leading directions": _from_pairs(subject, comparison, results, "value"),
            "cosine of updates": _from_pairs(subject, comparison, results, "update_cosine"),
            "cosine of coefficients": _mean([_cosines(one, results) for one in arms], subject),
        }
        done = sum(results.get(run) is not None for one in arms for run in one.moved.values())
        claims += [_claim(subject, name, found, gains, done) for name, found in likeness.items()]
        tables.append(_table(subject, gains, likeness))
        without += [_without_each_pair(subject, name, found, gains) for name, found in likeness.items()]
    shown = pd.concat(tables, ignore_index=True)
    fewer = pd.concat(without, ignore_index=True)
    claims = marked(as_family(claims), *(claim.name for claim in claims[: len(PREDICTORS)]))
    return Findings(
        claims,
        {"Correlations without one pair of tasks": fewer, "Pairs of tasks": shown},
        {"Likeness and gain": _figure(shown)},
        _note(settings),
        _answer(claims, fewer),
    )


def _answer(claims: Sequence[Claim], fewer: pd.DataFrame) -> str:
    claim = claims[0]
    said = claim.tell(
        "The overlap of leading directions tells which adapter is a good start, {effect} over {units}",
        "The overlap of leading directions tells the contrary of which adapter is a good start, {effect} over {units}",
        "Whether overlap tells which adapter is a good start is undecided, {effect} over {units}",
    )
    row = fewer[fewer["claim"] == claim.name].iloc[0]
    if not math.isfinite(row["lowest"]):
        return said
    return f"{said}; without one pair of tasks {two_digits(row['lowest'])} to {two_digits(row['highest'])}."


def _gains(subject: Subject, arms: _Arms, results: Results) -> Floats | None:
    """Score of each task (columns) from the start of each other (rows), less that from nothing; None without any."""
    tasks = subject.tasks
    gains = np.full((len(tasks), len(tasks)), math.nan)
    for (a, b), run in arms.moved.items():
        gains[tasks.index(a), tasks.index(b)] = _score(results, run) - _score(results, arms.fresh[b])
    return None if np.isnan(gains).all() else gains


def _score(results: Results, run: Run) -> float:
    """On all held-out examples: nothing is chosen here, so that the half to choose by counts too."""
    record = results.get(run)
    return math.nan if record is None else (record.result["score"] + record.result["selection_score"]) / 2


def _cosines(arms: _Arms, results: Results) -> Floats | None:
    record = results.get(arms.likeness)
    return None if record is None else np.array(record.result["cosines"])


def _from_pairs(subject: Subject, comparison: Run, results: Results, column: str) -> Floats:
    """A measurement of pairs of finetuned models as a table over tasks, averaged over seeds."""
    tasks = subject.tasks
    table = np.full((len(tasks), len(tasks)), math.nan)
    record = results.get(comparison)
    if record is not None:
        means = record.measurements.groupby(["task_a", "task_b"])[column].mean().reset_index()
        for a, b, value in means.itertuples(index=False):
            table[tasks.index(a), tasks.index(b)] = table[tasks.index(b), tasks.index(a)] = value
    return table


def _mean(found: list[Floats | None], subject: Subject) -> Floats:
    known = [one for one in found if one is not None]
    return np.mean(known, axis=0) if known else np.full((len(subject.tasks),) * 2, math.nan)


def _by_target(gains: Floats) -> Floats:
    """Less the mean of each column: some tasks gain from every start."""
    away = np.where(np.eye(len(gains), dtype=bool), math.nan, gains)
    counts = np.isfinite(away).sum(0)
    return gains - np.nansum(away, axis=0) / np.where(counts > 0, counts, 1)


def _claim(subject: Subject, name: str, likeness: Floats, gains: Floats, runs: int) -> Claim:
    found = mantel_correlation(likeness, _by_target(gains))
    interval = jackknife_interval(found.rho, _without_each(likeness, gains))
    return conclude(
        _name(subject, name),
        f"Among the tasks of {subject.name}, {PREDICTORS[name]} says how much the adapter of the one helps as a start "
        "for the other.",
        within(Interval(found.rho, interval.low, interval.high, found.p_value)),
        unit="Spearman's rho over ordered pairs of tasks",
        would_change="A correlation around zero or below, or one that rests on a single task.",
        runs=runs,
        units=f"{counted(len(gains), 'task')} ({counted(len(gains) * (len(gains) - 1), 'ordered pair')})",
        stated="changed",
    )


def _without_each_pair(subject: Subject, name: str, likeness: Floats, gains: Floats) -> pd.DataFrame:
    """The correlation with all ordered pairs of tasks, and the extremes without one of them, a row."""
    own = _by_target(gains)
    off = ~np.eye(len(own), dtype=bool)
    without = {}
    for i, j in zip(*np.nonzero(off), strict=True):
        kept = off.copy()
        kept[i, j] = False
        without[f"{subject.tasks[i]} → {subject.tasks[j]}"] = rank_correlation(likeness[kept], own[kept])
    rhos = pd.Series(without)
    known = rhos.notna().any()
    row = {
        "claim": _name(subject, name), "rho": rank_correlation(likeness[off], own[off]),
        "lowest": rhos.min(), "without the pair": rhos.idxmin() if known else "",
        "highest": rhos.max(), "without the pair ": rhos.idxmax() if known else "",
    }  # fmt: skip
    return pd.DataFrame([row])


def _name(subject: Subject, name: str) -> str:
    return f"{subject.name}: {name} predicts transfer"


def _without_each(likeness: Floats, gains: Floats) -> list[float]:
    """The correlation without each task."""
    rhos = []
    for task in range(len(gains)):
        fewer = [np.delete(np.delete(table, task, 0), task, 1) for table in (likeness, gains)]
        rhos.append(mantel_correlation(fewer[0], _by_target(fewer[1])).rho)
    return rhos


def _table(subject: Subject, gains: Floats, likeness: Mapping[str, Floats]) -> pd.DataFrame:
    rows = [
        {"model": subject.name, "start": a, "task": b, "gain": gains[i, j], "gain less the task's mean": own[i, j]}
        | {name: found[i, j] for name, found in likeness.items()}
        for own in [_by_target(gains)]
        for i, a in enumerate(subject.tasks)
        for j, b in enumerate(subject.tasks)
        if a != b
    ]
    return pd.DataFrame(rows)


def _figure(table: pd.DataFrame) -> go.Figure:
    text, gain = table["start"] + " → " + table["task"], table["gain less the task's mean"]
    traces = ({"x": table[name], "y": gain, "name": name, "text": text} for name in PREDICTORS)
    return scatter_figure(traces, "likeness", "gain of score, less the task's mean")


def _note(settings: Settings) -> str:
    return (
        f"Adapters: {', '.join(f'{name} {value}' for name, value in settings.adapter.items())}. A start's gain is the "
        f"score after {settings.steps} steps from the other task's adapter, with a fresh head, less that from nothing, "
        "averaged over seeds; of each task the mean gain is taken off. p-values permute tasks, as pairs with a task in "
        "common are not independent (Mantel); intervals: a jackknife over tasks."
    )


EXPERIMENT = Experiment(
    "similarity", QUESTION, PRESETS, plan, analyse, "Does overlap tell which adapter is a good start for another task?"
)
