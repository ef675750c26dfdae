"""Does pretraining on more data, at equal numbers of updates, make the leading singular directions more stable?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from spectralbasis.comparison.statistics import Interval
from spectralbasis.study.claims import Claim, Experiment, Findings, as_family, conclude, scatter_figure
from spectralbasis.study.estimates import jonckheere, slope_with_interval
from spectralbasis.study.runs import Results, Run
from spectralbasis.study.subjects import (
    BERT,
    EXCESS,
    NORM,
    ROBERTA_LINEAGE,
    STABILITY,
    TINY,
    VIT,
    LabelledRun,
    Lineage,
    at_equal_norm,
    at_last_step,
    measured_steps,
)

QUESTION = (
    "Do models pretrained on more data, with as many updates, keep their leading singular directions better when they "
    "are finetuned on shifted data and on another task: at equal steps, and where they have moved equally far?"
)


@dataclass(frozen=True)
class Settings:
    """Which lineages are finetuned, and what is measured on the way.

    Args:
        lineages: architectures with their sizes of pretraining and their moves.
        seeds: of initial weights, pretraining and finetuning at once.
        measured: settings of `TrajectoryCallback`, and `shares` of all steps after which it measures.
    """

    lineages: tuple[Lineage, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    measured: Mapping[str, Any] = field(
        default_factory=lambda: {"leading": 16, "draws": 2, "shares": (0.05, 0.15, 0.4, 1.0)}
    )


PRESETS = {
    "quick": Settings((TINY,), (0, 1), {"leading": 4, "draws": 2, "shares": (1 / 3, 1.0)}),
    "cpu": Settings((VIT, BERT)),
    "paper": Settings(
        (VIT, BERT, ROBERTA_LINEAGE), measured={"leading": 64, "draws": 5, "shares": (0.02, 0.05, 0.15, 0.4, 1.0)}
    ),
}

ARM = ["lineage", "task", "move"]
RUN = [*ARM, "examples", "seed"]
UNITS = {
    STABILITY: "overlap per decade of examples",
    EXCESS: "halvings of the null's rotation per decade of examples",
    NORM: "‖ΔW‖/‖W0‖ per decade of examples",
}


def plan(settings: Settings, results: Results) -> list[Run]:
    """Every size of pretraining, moved to every task, one seed of everything after another."""
    return [one.run for one in _runs(settings)]


def _runs(settings: Settings) -> Iterator[LabelledRun]:
    for seed in settings.seeds:
        for lineage in settings.lineages:
            for task, move in lineage.moves.items():
                for size in lineage.sizes:
                    run = lineage.finetune(lineage.pretrained(size, seed), task, seed, settings.measured)
                    yield LabelledRun(run, dict(zip(RUN, (lineage.name, task, move, size, seed), strict=True)))


def analyse(settings: Settings, results: Results) -> Findings:
    """Slopes on the number of examples for each lineage and move, and the tables that they are taken from."""
    runs = list(_runs(settings))
    steps, finished = measured_steps(runs, results)
    pretraining = _pretraining(settings, results)
    shown = {} if pretraining.empty else {"Pretraining": pretraining}
    if not finished:
        return Findings(_claims(settings, {}), shown, note="No finetuning is finished yet.")
    views = {
        "at equal steps": at_last_step(steps, RUN),
        "at equal ‖ΔW‖": at_equal_norm(steps, RUN, ARM),
    }
    shown |= {
        "Finetuning": _means(views["at equal steps"], ["score", "overlap_null", "matched_cosine", "core_gain"]),
        "Finetuning, at equal ‖ΔW‖": _means(views["at equal ‖ΔW‖"], []),
        "Trends": _trends(views),
    }
    note = f"{finished} of {len(runs)} finetunings are finished. {_note(settings)}"
    return Findings(_claims(settings, views), shown, _figures(views), note)


def _claims(settings: Settings, views: Mapping[str, pd.DataFrame]) -> list[Claim]:
    """Four claims on stability, a family over all lineages and moves, and one on the distance, another."""
    moves = [(lineage.name, task, move) for lineage in settings.lineages for task, move in lineage.moves.items()]

    def family(asked: list[tuple[str, str]]) -> list[Claim]:
        return as_family(
            _claim(lineage, task, move, view, value, views) for lineage, task, move in moves for view, value in asked
        )

    stable = [(view, value) for view in ("at equal steps", "at equal ‖ΔW‖") for value in (STABILITY, EXCESS)]
    return [*family(stable), *family([("at equal steps", NORM)])]


TEXTS = {
    STABILITY: ("more data, more stable", "better it keeps its leading directions"),
    EXCESS: ("more data, more held", "more it avoids of the rotation that a scrambled update would bring"),
    NORM: ("more data, farther", "farther it moves"),
}


def _claim(lineage: str, task: str, move: str, view: str, value: str, views: Mapping[str, pd.DataFrame]) -> Claim:
    rows = views.get(view, pd.DataFrame(columns=[*RUN, STABILITY, EXCESS, NORM]))
    rows = rows[(rows["lineage"] == lineage) & (rows["task"] == task)]
    name, does = TEXTS[value]
    return conclude(
        f"{lineage} to {task}, {view}: {name}",
        f"The more data {lineage} was pretrained on, the {does} when it is finetuned on {task} ({move}), "
        f"{view}.",
        _slope(rows, value),
        unit=UNITS[value],
        would_change="A slope of the other sign, or one whose interval over seeds leaves out zero.",
        runs=len(rows),
    )  # fmt: skip


def _slope(rows: pd.DataFrame, value: str) -> Interval:
    return slope_with_interval(rows["examples"], rows[value], rows["seed"])


def _trends(views: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Slope and Jonckheere's test of each quantity, for each lineage and move."""
    table = []
    for name, view in views.items():
        for value in (STABILITY, EXCESS, NORM):
            if view is views["at equal steps"] or value != NORM:  # equal distances have no trend
                trends = view.groupby(ARM, sort=False).apply(_trend, value).reset_index()
                table.append(trends.assign(compared=name, quantity=value))
    return pd.concat(table, ignore_index=True)


def _trend(rows: pd.DataFrame, value: str) -> pd.Series:
    slope = _slope(rows, value)
    trend = jonckheere([group[value] for _, group in rows.groupby("examples")])
    found = {"slope": slope.estimate, "low": slope.low, "high": slope.high, "p": slope.p_value}
    return pd.Series({**found, "Jonckheere p": trend.p_value, "runs": int(rows[value].count())})


def _means(view: pd.DataFrame, more: Sequence[str]) -> pd.DataFrame:
    """Means over seeds."""
    groups = view.groupby([*ARM, "examples"], sort=False)
    shown = [STABILITY, EXCESS, NORM, *(name for name in more if name in view)]
    return groups[shown].mean().assign(seeds=groups[STABILITY].count()).reset_index()


def _pretraining(settings: Settings, results: Results) -> pd.DataFrame:
    """How well the pretrained models do at what they were pretrained on."""
    rows = []
    for lineage in settings.lineages:
        for size in lineage.sizes:
            runs = [run for seed in settings.seeds if isinstance(run := lineage.pretrained(size, seed), Run)]
            records = [record for run in runs if (record := results.get(run)) is not None]
            if records:
                scores = [record.result["score"] for record in records]
                labels = {"lineage": lineage.name, "task": lineage.pretraining["task"], "examples": size}
                score = sum(scores) / len(scores)
                rows.append({**labels, "metric": records[0].result["metric"], "score": score, "seeds": len(scores)})
    return pd.DataFrame(rows)


def _figures(views: Mapping[str, pd.DataFrame]) -> dict[str, go.Figure]:
    titles = {STABILITY: "Stability by examples", EXCESS: "Rotation avoided by examples"}
    return {f"{title}, {view}": _figure(rows, value) for value, title in titles.items() for view, rows in views.items()}


def _figure(view: pd.DataFrame, value: str) -> go.Figure:
    means = (
        (f"{lineage} to {task}", rows.groupby("examples")[value].mean())
        for (lineage, task, _), rows in view.groupby(ARM, sort=False)
    )
    traces = (
        {"x": mean.index, "y": mean, "mode": "lines+markers", "name": name, "marker": {"size": 6}}
        for name, mean in means
    )
    return scatter_figure(traces, "pretraining examples", value, log="x")


def _note(settings: Settings) -> str:
    return (
        "Sizes of one seed share their initial weights, and smaller ones are parts of larger ones; pretraining takes "
        "as many updates at every size. Equal ‖ΔW‖ is the largest mean ‖ΔW‖/‖W0‖ that every model of a lineage reached "
        "on a task, interpolated along the measured steps. Intervals: a bootstrap over seeds, each with its own level; "
        "p-values are not adjusted for the number of claims."
    )


EXPERIMENT = Experiment("scale", QUESTION, PRESETS, plan, analyse)
