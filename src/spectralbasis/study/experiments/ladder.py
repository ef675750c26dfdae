"""Is what turns of the leading directions explained by where the update's energy lies? A ladder of nulls."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from spectralbasis.comparison.statistics import Interval
from spectralbasis.study.claims import Claim, Experiment, Findings, as_family, conclude, conclude_equal, marked
from spectralbasis.study.estimates import mean_interval
from spectralbasis.study.exchange import OTHER_TASKS
from spectralbasis.study.runs import Results, Run
from spectralbasis.study.subjects import (
    MINILM_TASKS,
    MULTIBERTS,
    ROBERTA,
    SMALL_BERT,
    SMALL_VIT,
    TINY_VIT,
    LabelledRun,
    Subject,
)
from spectralbasis.study.trajectories import summarise_steps

QUESTION = (
    "Finetuning turns the leading singular directions more than scrambled updates do. Is that explained by where the "
    "energy of the update lies in the base's directions, or is there more to it?"
)
MARGIN = 0.15
"""Halvings that count as none: a rotation between 0.90 and 1.11 of what is expected. Fixed before the runs."""
SCRAMBLED, ENERGY = "scrambled", "energy"
NULLS = (SCRAMBLED, "scrambled-left", "scrambled-right", ENERGY)
HELD = "halvings of the null's rotation"


@dataclass(frozen=True)
class Group:
    """Runs that are tested together.

    Args:
        name: in tables.
        subjects: models of one architecture; where there are several, they differ in the seed of pretraining.
        seeds: of finetuning.
    """

    name: str
    subjects: tuple[Subject, ...]
    seeds: tuple[int, ...]

    @property
    def unit(self) -> str:
        """What is independent: the pretrained model, or the task where there is one model."""
        return "model" if len(self.subjects) > 1 else "task"

    @property
    def units(self) -> str:
        """What they are called."""
        return "pretraining seeds" if self.unit == "model" else "tasks"


@dataclass(frozen=True)
class Settings:
    """Which models are finetuned, and what is measured after the last step.

    Args:
        groups: the claims are about the first; the others repeat it.
        leading: number of directions.
        draws: of each null for each matrix; the logarithm of a mean of few is too low (by 0.01 to 0.03 for 8).
    """

    groups: tuple[Group, ...]
    leading: int = 16
    draws: int = 8


def from_seeds(subject: Subject, seeds: range) -> tuple[Subject, ...]:
    """The same subject, pretrained from each of these seeds."""
    assert isinstance(subject.model, Run)
    return tuple(
        replace(subject, name=f"{subject.name} {seed}", model=_reseeded(subject.model, seed)) for seed in seeds
    )


def _reseeded(run: Run, seed: int) -> Run:
    return Run(run.action, run.settings, seed, {role: _reseeded(need, seed) for role, need in run.needs.items()})


PRESETS = {
    "quick": Settings(
        (
            Group("tiny ViT", (TINY_VIT,), (0,)),
            Group("tiny ViT, pretrained anew", from_seeds(TINY_VIT, range(2)), (0,)),
        ),
        leading=4,
        draws=2,
    ),
    "cpu": Settings(
        (
            Group("MiniLM", (replace(MINILM_TASKS, settings={**MINILM_TASKS.settings, "steps": 300}),), (0, 1, 2)),
            Group("ViT", from_seeds(SMALL_VIT, range(6)), (0,)),
            Group("BERT", from_seeds(SMALL_BERT, range(6)), (0,)),
        )
    ),
    "paper": Settings((Group("RoBERTa-base", (ROBERTA,), (0, 1, 2)), Group("MultiBERT", MULTIBERTS, (0,))), leading=64),
}
LABELS = ["group", "model", "task", "seed"]


def plan(settings: Settings, results: Results) -> list[Run]:
    """Full finetuning of every model on every task with every seed, then the exchange of updates between tasks."""
    return [arm.run for arm in (*_arms(settings), *_exchanges(settings))]


def _arms(settings: Settings) -> Iterator[LabelledRun]:
    for group in settings.groups:
        for seed in group.seeds:
            for subject in group.subjects:
                for task in subject.tasks:
                    labels = dict(zip(LABELS, (group.name, subject.name, task, seed), strict=True))
                    yield LabelledRun(_finetuning(settings, subject, task, seed), labels)


def _finetuning(settings: Settings, subject: Subject, task: str, seed: int) -> Run:
    """At the middle one of the subject's learning rates."""
    rate = subject.learning_rates[len(subject.learning_rates) // 2]
    measure = {
        "steps": [subject.settings["steps"]], "leading": settings.leading, "draws": settings.draws, "trailing": True,
        "nulls": list(NULLS),
    }  # fmt: skip
    return subject.tune(task, seed, method="full", learning_rate=rate, measure=measure)


def _exchanges(settings: Settings) -> Iterator[LabelledRun]:
    """One for each model and seed, over its tasks; the labels lack the task."""
    for group in settings.groups:
        for seed in group.seeds:
            for subject in group.subjects:
                wanted = {**subject.named(), "tasks": list(subject.tasks), "leading": settings.leading}
                tuned = {
                    f"tuned_{number}": _finetuning(settings, subject, task, seed)
                    for number, task in enumerate(subject.tasks)
                }
                labels = {"group": group.name, "model": subject.name, "seed": seed}
                yield LabelledRun(Run("exchange", wanted, 0, {**subject.needs(), **tuned}), labels)


def analyse(settings: Settings, results: Results) -> Findings:
    """The claims on the first group, and the ladder for all."""
    arms = list(_arms(settings))
    measured = [(arm, record) for arm in arms if (record := results.get(arm.run)) and len(record.measurements)]
    if not measured:
        claims = _claims(settings.groups[0], pd.DataFrame())
        return Findings(claims, note="No run is finished yet.", answer=_answer(claims))
    rows = pd.concat([record.measurements.assign(**arm.labels) for arm, record in measured], ignore_index=True)
    by_null = {null: summarise_steps(rows, LABELS, null) for null in NULLS}
    swapped = [
        record.measurements.assign(**arm.labels) for arm in _exchanges(settings) if (record := results.get(arm.run))
    ]
    if swapped:
        by_null[OTHER_TASKS] = summarise_steps(pd.concat(swapped, ignore_index=True), LABELS, OTHER_TASKS)
    steps = pd.concat([table.assign(null=null) for null, table in by_null.items()], ignore_index=True)
    ladder = _ladder(settings, steps)
    tables = {
        "Ladder": ladder,
        "Leading and trailing directions": _plain(settings, steps),
        "Where the energy of the update lies": _coverages(rows),
        "Units": _by_unit(settings, steps),
    }
    note = (
        f"{len(measured)} of {len(arms)} finetuning runs are finished. All rotations are those of the first "
        f"{settings.leading} directions after the last step. Each null has {settings.draws} draws for each matrix, but "
        "that of other tasks takes the updates of all other tasks, scaled to the norm of the task's own in each "
        "matrix. Effects are log2 of the null's rotation over the observed one in each matrix, averaged over matrices, "
        "then over the runs of a unit; below zero the directions turn more than under the null. Units are tasks, or "
        "pretraining seeds where a group has several. Intervals: Student's t over units."
    )
    first = steps[steps["group"] == settings.groups[0].name]
    claims = _claims(settings.groups[0], first)
    return Findings(claims, tables, {"Effect by null": _figure(ladder)}, note, _answer(claims))


def _over_units(group: Group, values: pd.Series, table: pd.DataFrame) -> Interval:
    return mean_interval(values, table[group.unit])


def _claims(group: Group, steps: pd.DataFrame) -> list[Claim]:
    """The equivalence under `energy`; beside it the plain observation and the effect of scrambling, as a family."""
    found = {name: mean_interval([]) for name in ("energy", "plain", "scrambled")}
    count = runs = 0
    if len(steps):
        energy, scrambled = (steps[steps["null"] == null] for null in (ENERGY, SCRAMBLED))
        count, runs = energy[group.unit].nunique(), len(energy)
        found["energy"] = _over_units(group, energy["held"], energy)
        found["plain"] = _over_units(group, scrambled["overlap"] - scrambled["trailing_overlap"], scrambled)
        found["scrambled"] = _over_units(group, -scrambled["held"], scrambled)
    units = f"{count} {group.units} of {group.name}"
    equal = conclude_equal(
        "energy explains the rotation",
        "Finetuning turns the leading directions as updates of the same energy on each pair of the base's directions "
        "with random signs do.",
        found["energy"], within=MARGIN, unit=HELD, runs=runs, units=units,
    )  # fmt: skip
    beside = as_family([
        conclude(
            "leading directions stay more than trailing ones",
            "After finetuning, the leading subspace overlaps with the base's more than the trailing one does.",
            found["plain"], unit="overlap", runs=runs, units=units,
            would_change="Trailing directions that overlap as much.",
        ),
        conclude(
            "leading directions turn more than under scrambled updates",
            "Finetuning turns the leading directions more than scrambled updates of the same size do.",
            found["scrambled"], unit="doublings of the null's rotation", runs=runs, units=units,
            would_change="Rotations like those of scrambled updates, or smaller ones.",
        ),
    ])  # fmt: skip
    claims = [equal, *beside]
    return marked(claims, *(claim.name for claim in claims))


def _answer(claims: list[Claim]) -> str:
    """Whether the energy explains the rotation, from the claim on it."""
    return claims[0].tell(
        f"Where the update's energy lies explains how far the leading directions turn, to within {MARGIN:g}: "
        "{effect}; {units}.",
        f"Where the update's energy lies does not explain how far the leading directions turn, to within {MARGIN:g}: "
        "{effect}; {units}.",
        "Whether the place of the update's energy explains how far the leading directions turn is undecided: {effect}; "
        "{units}.",
    )


def _ladder(settings: Settings, steps: pd.DataFrame) -> pd.DataFrame:
    """The effect under each null for each group, from what keeps least of the update to what keeps most."""
    table = []
    for group in settings.groups:
        for null in dict.fromkeys(steps["null"]):
            rows = steps[(steps["group"] == group.name) & (steps["null"] == null)]
            if rows.empty:
                continue
            found = _over_units(group, rows["held"], rows)
            table.append({
                "group": group.name, "null": null, "effect": found.estimate, "low": found.low, "high": found.high,
                "units": rows[group.unit].nunique(), "of": group.units, "overlap": rows["overlap"].mean(),
                "overlap_null": rows["overlap_null"].mean(),
            })  # fmt: skip
    return pd.DataFrame(table)


def _plain(settings: Settings, steps: pd.DataFrame) -> pd.DataFrame:
    """Overlap of leading minus trailing directions, as observed and as each null has it."""
    table = []
    for group in settings.groups:
        rows = steps[(steps["group"] == group.name) & (steps["null"] != OTHER_TASKS)]
        views = {
            "observed": rows[rows["null"] == SCRAMBLED].assign(leading=rows["overlap"], tail=rows["trailing_overlap"])
        }
        for null in NULLS:
            one = rows[rows["null"] == null]
            views[null] = one.assign(leading=one["overlap_null"], tail=one["trailing_overlap_null"])
        for name, one in views.items():
            if one.empty:
                continue
            gap = _over_units(group, one["leading"] - one["tail"], one)
            table.append({
                "group": group.name, "update": name, "leading": one["leading"].mean(), "trailing": one["tail"].mean(),
                "difference": gap.estimate, "low": gap.low, "high": gap.high, "units": one[group.unit].nunique(),
            })  # fmt: skip
    return pd.DataFrame(table)


def _coverages(rows: pd.DataFrame) -> pd.DataFrame:
    """Coverage over chance on the left, on the right and in the core, and the core over the product of the two."""
    matrices = summarise_steps(rows, [*LABELS, "matrix"], SCRAMBLED)
    matrices["core_over_product"] = np.log2(matrices["core"] / (matrices["left"] * matrices["right"]))
    shown = ["left_gain", "right_gain", "core_gain", "core_over_product"]
    means = 2 ** matrices.groupby("group", sort=False)[shown].mean()
    names = {"left_gain": "left over chance", "right_gain": "right over chance", "core_gain": "core over chance"}
    return means.rename(columns={**names, "core_over_product": "core over left × right"}).reset_index()


def _by_unit(settings: Settings, steps: pd.DataFrame) -> pd.DataFrame:
    """The effect under each null of every unit."""
    table = []
    for group in settings.groups:
        rows = steps[steps["group"] == group.name]
        wide: Any = rows.pivot_table(index=["group", group.unit], columns="null", values="held", sort=False)
        table.append(wide.reset_index().rename(columns={group.unit: "unit"}))
    return pd.concat(table, ignore_index=True)


def _figure(ladder: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    for group, rows in ladder.groupby("group", sort=False):
        errors = {"type": "data", "symmetric": False, "array": rows["high"] - rows["effect"],
                  "arrayminus": rows["effect"] - rows["low"]}  # fmt: skip
        figure.add_scatter(x=rows["null"], y=rows["effect"], error_y=errors, mode="markers", name=str(group))
    figure.add_hrect(y0=-MARGIN, y1=MARGIN, opacity=0.15, line_width=0)
    return figure.update_layout(xaxis={"title": "null"}, yaxis={"title": HELD})


EXPERIMENT = Experiment("ladder", QUESTION, PRESETS, plan, analyse, "What explains the rotation?")
