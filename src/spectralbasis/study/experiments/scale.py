"""Does pretraining on more diverse data, at equal numbers of updates, make the leading directions more stable?"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from spectralbasis.comparison.statistics import Interval
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
from spectralbasis.study.estimates import holm, jonckheere, mean_interval, slope_with_interval
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
    "Do models pretrained on more diverse data (more examples, in as many updates) keep their leading singular "
    "directions better when they are finetuned on shifted data and on another task: at equal steps, and where they "
    "have moved equally far?"
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
    """Slopes on the number of examples, pooled and for each lineage and move, and the tables they are taken from."""
    runs = list(_runs(settings))
    steps, finished = measured_steps(runs, results)
    pretraining = pretraining_scores(_pretrainings(settings), results)
    shown = {} if pretraining.empty else {"Pretraining": pretraining}
    if not finished:
        return Findings(_claims({}), shown, note="No finetuning is finished yet.")
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
    claims = _claims(views)
    return Findings(claims, shown, _figures(views), note, _answer(claims))


ASKED = (
    ("at equal steps", STABILITY),
    ("at equal steps", EXCESS),
    ("at equal ‖ΔW‖", STABILITY),
    ("at equal ‖ΔW‖", EXCESS),
    ("at equal steps", NORM),
)
"""The first two are primary."""
TEXTS = {
    STABILITY: ("more data, more stable", "better a model keeps its leading directions"),
    EXCESS: ("more data, more held", "more it avoids of the rotation that a scrambled update would bring"),
    NORM: ("more data, farther", "farther a model moves"),
}


def _claims(views: Mapping[str, pd.DataFrame]) -> list[Claim]:
    """A slope for each question, pooled over lineages and moves."""
    claims = as_family(_claim(view, value, views) for view, value in ASKED)
    return marked(claims, *(claim.name for claim in claims[:2]))


def _claim(view: str, value: str, views: Mapping[str, pd.DataFrame]) -> Claim:
    rows = views.get(view, pd.DataFrame(columns=[*RUN, STABILITY, EXCESS, NORM]))
    slopes = pooled_slopes(rows, value)
    name, does = TEXTS[value]
    models, seeds = (slopes[name].nunique() for name in ("lineage", "seed"))
    return conclude(
        f"{name}, {view}",
        f"The more diverse the data of pretraining, at as many updates, the {does} when it is finetuned, {view}.",
        mean_interval(slopes["slope"]),
        unit=UNITS[value],
        would_change="A slope of the other sign, or one whose interval leaves out zero; also other architectures, as "
        "the interval is about seeds of these.",
        runs=len(rows),
        units=f"{counted(len(slopes), 'unit')}: {counted(models, 'architecture')} × {counted(seeds, 'seed')}",
        stated="after",
    )


def pooled_slopes(rows: pd.DataFrame, value: str) -> pd.DataFrame:
    """The slope on log10(examples) of each lineage and seed, the mean over its moves: `lineage, seed, slope`.

    Sizes and moves of one seed start from the same random weights, so that they are no units of their own.
    """
    return task_slopes(rows, value).groupby(["lineage", "seed"], sort=False)["slope"].mean().reset_index()


def task_slopes(rows: pd.DataFrame, value: str, on: str = "examples") -> pd.DataFrame:
    """The slope on log10 of the column `on` of each task of each lineage and seed that has two values of it:
    `lineage, seed, task, slope`."""
    labels = ["lineage", "seed", "task"]
    known = rows.dropna(subset=[value])
    slopes = [
        (*names, slope_with_interval(one[on], one[value], one["seed"]).estimate)
        for names, one in known.groupby(labels, sort=False)
    ]
    return pd.DataFrame(slopes, columns=[*labels, "slope"]).dropna().reset_index(drop=True)


def _answer(claims: Sequence[Claim]) -> str:
    stable, held = claims[:2]
    return stable.tell(
        "With more diverse data the overlap grows at equal steps, {effect}",
        "With more diverse data the overlap falls at equal steps, {effect}",
        "Whether more diverse data changes the overlap at equal steps is undecided, {effect}",
    ) + held.tell(
        ", and the rotation avoided grows too, {effect} over {units}.",
        ", and less of the null's rotation is avoided, {effect} over {units}.",
        ", and beside the null no trend is seen, {effect} over {units}.",
    )


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
    trends = pd.concat(table, ignore_index=True)
    return trends.assign(**{"p, Holm": holm(trends["p"])})


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


def _pretrainings(settings: Settings) -> Iterator[LabelledRun]:
    for lineage in settings.lineages:
        for size in lineage.sizes:
            for seed in settings.seeds:
                if isinstance(run := lineage.pretrained(size, seed), Run):
                    labels = {"lineage": lineage.name, "task": lineage.pretraining["task"], "examples": size}
                    yield LabelledRun(run, labels)


def pretraining_scores(runs: Iterable[LabelledRun], results: Results) -> pd.DataFrame:
    """How well pretrained models do at what they were pretrained on: the mean over finished runs of equal labels."""
    rows = [
        {**one.labels, "metric": record.result["metric"], "score": record.result["score"]}
        for one in runs
        if (record := results.get(one.run)) is not None
    ]
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows)
    groups = table.groupby([name for name in table if name != "score"], sort=False)["score"]
    return groups.agg(score="mean", seeds="count").reset_index()


def _figures(views: Mapping[str, pd.DataFrame]) -> dict[str, go.Figure]:
    titles = {STABILITY: "Stability by examples", EXCESS: "Rotation avoided by examples"}
    return {
        f"{title}, {view}": trend_figure(rows, value, "examples", "pretraining examples")
        for value, title in titles.items()
        for view, rows in views.items()
    }


def trend_figure(view: pd.DataFrame, value: str, on: str, title: str) -> go.Figure:
    """The means of a quantity over seeds, a line for each lineage and task, along the column `on`."""
    means = (
        (f"{lineage} to {task}", rows.groupby(on)[value].mean())
        for (lineage, task), rows in view.groupby(["lineage", "task"], sort=False)
    )
    traces = (
        {"x": mean.index, "y": mean, "mode": "lines+markers", "name": name, "marker": {"size": 6}}
        for name, mean in means
    )
    return scatter_figure(traces, title, value, log="x")


def _note(settings: Settings) -> str:
    return (
        "Sizes of one seed share their initial weights, and smaller ones are parts of larger ones; pretraining takes "
        "as many updates at every size, so that sizes differ in the diversity of the data and not in the amount of "
        "training. Equal ‖ΔW‖ is the largest mean ‖ΔW‖/‖W0‖ that every model of a lineage reached on a task, "
        "interpolated along the measured steps. Intervals of claims: Student's t over architectures and seeds, whose "
        "moves were averaged. The table of trends explores each lineage and move: a bootstrap over seeds, each with "
        "its own level, and p-values beside those of Holm's method over the table. The pooled claims replace sixteen "
        "of single moves, which had 2 degrees of freedom each, after the scores were seen."
    )


EXPERIMENT = Experiment(
    "scale", QUESTION, PRESETS, plan, analyse, "Does more diverse pretraining data make directions more stable?"
)
