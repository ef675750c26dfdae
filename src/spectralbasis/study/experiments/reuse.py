"""Does finetuning that spares the leading core, or keeps to it, leave a model that coefficients tune better?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go

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
from spectralbasis.study.estimates import paired_comparison
from spectralbasis.study.runs import Results, Run
from spectralbasis.study.subjects import ROBERTA, SMALL_VIT, TINY_VIT, VIT_B16, Subject

QUESTION = (
    "Does a first finetuning that holds the core of the leading directions, or concentrates its update there, leave a "
    "model on which spectral coefficients learn a second task better, and forget the first less?"
)

FREE = "free"
PENALTIES = {"holds the core": "core", "keeps to the core": "outside", "stays near the base": "whole"}
"""What the first finetuning does → the part of its update that is penalised; the last is the control."""


@dataclass(frozen=True)
class Settings:
    """What is finetuned twice.

    Args:
        subjects: models with their tasks; every task is the first once, before each of the others.
        strengths: of the penalty, in the order of `PENALTIES`; the last two are such that both make steps about as
            large and cost the first task little.
        rate: which of a subject's learning rates the first finetuning takes, by number.
        leading: directions of the core.
        adapter: settings of the second tuning; its learning rate is the one that `ablation` chose for such a core.
        seeds: of both.
    """

    subjects: tuple[Subject, ...]
    strengths: tuple[float, float, float] = (0.3, 0.01, 0.01)
    rate: int = 1
    leading: int = 16
    adapter: Mapping[str, Any] = field(
        default_factory=lambda: {**COEFFICIENTS, "coefficients": "core", "leading": 16, "learning_rate": 3e-2}
    )
    seeds: tuple[int, ...] = (0, 1, 2)


PRESETS = {
    "quick": Settings(
        (replace(TINY_VIT, tasks=("digits-parity", "digits-rotated")),),
        leading=4,
        adapter={**COEFFICIENTS, "coefficients": "core", "leading": 4, "learning_rate": 3e-2},
        seeds=(0,),
    ),
    "cpu": Settings((SMALL_VIT,)),
    "paper": Settings((ROBERTA, VIT_B16)),
}

ARM = ["model", "first", "second", "seed"]
SECOND, FIRST, KEPT = "second task", "first task", "first task, kept"


def plan(settings: Settings, results: Results) -> list[Run]:
    """First finetunings, free and penalised; coefficients of each other task on top; what of the first is left."""
    return [run for _, runs in _chains(settings) for run in runs]


def _chains(settings: Settings) -> Iterator[tuple[dict[str, Any], tuple[Run, Run, Run]]]:
    """The labels of a chain, and its three runs."""
    for seed in settings.seeds:
        for subject in settings.subjects:
            for first, second in ((a, b) for a in subject.tasks for b in subject.tasks if a != b):
                for way in (FREE, *PENALTIES):
                    labels = dict(zip([*ARM, "way"], (subject.name, first, second, seed, way), strict=True))
                    yield labels, _chain(settings, subject, first, second, seed, way)


def _chain(settings: Settings, subject: Subject, first: str, second: str, seed: int, way: str) -> tuple[Run, Run, Run]:
    rate = subject.learning_rates[settings.rate]
    penalty: dict[str, Any] = {}
    if way != FREE:
        strength = settings.strengths[list(PENALTIES).index(way)]
        penalty = {"penalty": {"part": PENALTIES[way], "strength": strength, "leading": settings.leading}}
    last = subject.settings["steps"]
    measure = {"steps": [last], "leading": settings.leading, "draws": 0}
    tuned = subject.tune(first, seed, method="full", learning_rate=rate, measure=measure, **penalty)
    adapter = replace(subject, model=tuned).tune(second, seed, **settings.adapter)
    wanted = {"task": first, "second_task": second, "max_length": subject.settings.get("max_length", 64)}
    return tuned, adapter, Run("retention", wanted, 0, {"model": tuned, "adapter": adapter})


def analyse(settings: Settings, results: Results) -> Findings:
    """Each way of the first finetuning against the free one and against the control, paired by tasks and seeds."""
    rows = [
        {**labels, **_facts(results, *runs)}
        for labels, runs in _chains(settings)
        if all(results.get(run) is not None for run in runs)
    ]
    table = pd.DataFrame(rows, columns=[*ARM, "way", SECOND, FIRST, KEPT, "forgotten", "norm", "core share"])
    numbers = [SECOND, FIRST, KEPT, "forgotten", "norm", "core share"]
    groups = table.groupby(["model", "way"], sort=False)
    pairs = table.groupby(["model", "first", "second", "way"], sort=False)
    claims = as_family(_claim(table, contrast) for contrast in CONTRASTS)
    claims = marked(claims, *(claims[number].name for number in PRIMARY))
    return Findings(
        claims,
        {
            "Ways of the first finetuning": groups[numbers].mean().assign(runs=groups.size()).reset_index(),
            "Pairs of tasks": pairs[numbers].mean().reset_index(),
        },
        {"Second task and forgetting": _figure(table)} if rows else {},
        _note(settings),
        _answer(claims),
    )


def _answer(claims: Sequence[Claim]) -> str:
    holds, keeps = claims[:2]
    return holds.tell(
        "A second task is learned better after a first finetuning that holds the core, {effect}",
        "A second task is learned worse after a first finetuning that holds the core, {effect}",
        "Whether a first finetuning that holds the core helps a second task is undecided, {effect}",
    ) + keeps.tell(
        ", and better after one that keeps to the core, {effect} over {units}.",
        ", and worse after one that keeps to the core, {effect} over {units}.",
        "; so is one that keeps to the core, {effect} over {units}.",
    )


def _facts(results: Results, tuned: Run, adapter: Run, kept: Run) -> dict[str, float]:
    """Scores on all held-out examples, as nothing is chosen here; the size of the first update, and its core share."""
    first, second, left = (found for run in (tuned, adapter, kept) if (found := results.get(run)))
    measured = first.measurements.groupby("metric")["value"].mean()
    before, after = left.result["before"], left.result["after"]
    return {
        SECOND: (second.result["score"] + second.result["selection_score"]) / 2, FIRST: before, KEPT: after,
        "forgotten": before - after, "norm": measured["update_norm_relative"], "core share": measured["coverage_core"],
    }  # fmt: skip


@dataclass(frozen=True)
class _Contrast:
    """A way of the first finetuning against another; `sign` −1 where less is better."""

    way: str
    other: str
    column: str
    text: str
    sign: int = 1


CONTRASTS = (
    *(
        _Contrast(way, FREE, SECOND, f"Coefficients learn a second task better where the first finetuning {way}.")
        for way in PENALTIES
    ),
    *(
        _Contrast(way, FREE, "forgotten", f"Less of the first task is forgotten where its finetuning {way}.", -1)
        for way in PENALTIES
    ),
    *(
        _Contrast(
            way, "stays near the base", SECOND,
            f"A first finetuning that {way} helps a second task more than one that merely stays near the base.",
        )
        for way in list(PENALTIES)[:2]
    ),
)  # fmt: skip


PRIMARY = (0, 1, 3)
"""Numbers of the primary ones of `CONTRASTS`: a second task after holding the core and after keeping to it, and what is
forgotten after holding it."""


def _claim(table: pd.DataFrame, contrast: _Contrast) -> Claim:
    """Pairs of tasks are the units of a comparison."""
    wide = table.pivot(index=ARM, columns="way", values=contrast.column)
    both = wide.reindex(columns=[contrast.way, contrast.other]).dropna().astype(float)
    units = ["/".join(map(str, key[:3])) for key in both.index]
    better, other = (contrast.sign * both[way] for way in (contrast.way, contrast.other))
    return conclude(
        f"{contrast.way}, against {contrast.other}: {contrast.column}",
        contrast.text,
        paired_comparison(better, other, units),
        unit="score",
        would_change="More pairs of tasks, or another strength of the penalty.",
        runs=2 * len(both),
        units=f"{counted(len(set(units)), 'ordered pair')} of tasks",
    )


def _figure(table: pd.DataFrame) -> go.Figure:
    traces = (
        {
            "x": rows["forgotten"],
            "y": rows[SECOND],
            "name": str(way),
            "text": [f"{first} → {second}" for first, second in zip(rows["first"], rows["second"], strict=True)],
        }
        for way, rows in table.groupby("way", sort=False)
    )
    return scatter_figure(traces, "score of the first task that is lost", "score of the second task")


def _note(settings: Settings) -> str:
    strengths = ", ".join(f"{way} {value:g}" for way, value in zip(PENALTIES, settings.strengths, strict=True))
    return (
        f"The penalty is the squared norm of a part of the update, with the strengths: {strengths}; the core is that "
        f"of the first {settings.leading} directions. The second task trains coefficients on the singular directions "
        "of the model that the first left. Intervals: Student's t over ordered pairs of tasks, whose seeds were "
        "averaged; p-values are Holm's over all claims. The rate of the second tuning was raised after first scores "
        "were seen; which claims are primary was decided after all were."
    )


EXPERIMENT = Experiment(
    "reuse", QUESTION, PRESETS, plan, analyse, "Does sparing the core in a first finetuning help a second one?"
)
