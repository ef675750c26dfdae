"""Does it matter which directions the coefficients live on, at equal numbers of them?"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from spectralbasis.comparison.statistics import Interval
from spectralbasis.report.study_page import Stated
from spectralbasis.study.claims import (
    CHOSEN_AFTER,
    Claim,
    Experiment,
    Findings,
    as_family,
    conclude,
    counted,
    marked,
    scatter_figure,
)
from spectralbasis.study.contests import (
    COEFFICIENTS,
    Arm,
    Contest,
    Contrast,
    conclude_equality,
    conclude_family,
    differences,
)
from spectralbasis.study.estimates import clustered_interval, mean_interval, paired_comparison, rank_correlation_with_p
from spectralbasis.study.runs import Results, Run
from spectralbasis.study.subjects import MINILM_LONGER, ROBERTA, SMALL_VIT, TINY_VIT, VIT_B16, Subject

QUESTION = (
    "At equal numbers of coefficients, does tuning do better on the pretrained singular directions than on random, "
    "trailing, curvature, scratch-trained or another task's directions, and does gradient coverage tell?"
)
MADE = ("pretrained", "random", "minor")
"""Bases that an adapter makes itself from the weights; the others are files that runs make first."""
SCRATCH_RATE = 1e-3
"""Of full training from random weights; higher than finetuning's."""
CURVATURE = ("curvature", "curvature of another task", "curvature of several tasks")


@dataclass(frozen=True)
class Cell:
    """One number of coefficients: a mode with its size, the learning rates of all its arms, and the bases compared."""

    mode: str
    k: int
    learning_rates: tuple[float, ...]
    bases: tuple[str, ...]

    @property
    def name(self) -> str:
        """In tables."""
        return f"{self.mode} k={self.k}"


@dataclass(frozen=True)
class Part:
    """A subject with the cells that are tried on it.

    Args:
        subject: the model and its tasks; a task's other task is the next one.
        cells: in order of preference.
        selection_tasks: see `Contest`.
        seeds: see `Contest`.
        head_steps: of training the head alone, before gradients are taken.
        held_out: examples for gradient coverage.
        one_draw: random bases are one draw for all seeds, as where rows are kept of before each seed had its own.
    """

    subject: Subject
    cells: tuple[Cell, ...]
    selection_tasks: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    head_steps: int = 40
    held_out: int = 256
    one_draw: bool = False

    def contest(self, cell: Cell) -> Contest:
        """The arms of one cell, one for each basis."""
        return Contest(
            self.subject,
            tuple(self._arm(cell, basis) for basis in cell.bases),
            self.selection_tasks,
            self.seeds,
        )

    def _arm(self, cell: Cell, basis: str) -> Arm:
        settings = {**COEFFICIENTS, "coefficients": cell.mode, "leading": cell.k}
        if basis in MADE:
            drawn = "" if basis != "random" or self.one_draw else "basis_seed"
            return Arm(basis, {**settings, "basis": basis}, cell.learning_rates, drawn=drawn)
        return Arm(basis, settings, cell.learning_rates, lambda subject, task: {"basis": self.basis(basis, task)})

    def basis(self, basis: str, task: str) -> Run:
        """The run that makes a basis for a task."""
        leading = max(cell.k for cell in self.cells)
        if basis in CURVATURE:
            others = [*self.subject.tasks, *self.subject.tasks]
            after = others[others.index(task) + 1 :][: len(self.subject.tasks) - 1]
            tasks = dict(zip(CURVATURE, ([task], after[:1], after), strict=True))[basis]
            settings = {"kind": "curvature", "tasks": tasks, "leading": leading, **self._at_pretrained_weights()}
            return Run("basis", settings, 0, self.subject.needs())
        if basis == "scratch":
            # The subject's twin, from other random weights than those that pretraining began with.
            model = self.subject.model
            untrained = model.needs["model"].settings if isinstance(model, Run) else {"architecture": {"like": model}}
            twin = replace(self.subject, model=Run("initialise", untrained, 1))
            checkpoint = twin.tune(task, 0, method="full", learning_rate=SCRATCH_RATE)
        else:
            rest = [name for name in self.subject.tasks if name != task]
            rate = self.subject.learning_rates[-1]
            checkpoint = self.subject.tune(rest[0], 0, method="full", learning_rate=rate)
        return Run("basis", {"kind": "checkpoint", "leading": leading}, 0, {"checkpoint": checkpoint})

    def _at_pretrained_weights(self) -> dict[str, Any]:
        """Settings of what is measured there."""
        kept = {name: self.subject.settings[name] for name in ("max_length", "bf16") if name in self.subject.settings}
        return {**self.subject.named(), **kept, "head_steps": self.head_steps}

    def coverage(self, task: str) -> Run:
        """The run that measures how much of the task's gradient each basis holds, and of what else."""
        bases = list(dict.fromkeys(basis for cell in self.cells for basis in cell.bases))
        files = {basis: self.basis(basis, task) for basis in bases if basis not in MADE}
        ks = sorted({cell.k for cell in self.cells})
        settings = {"task": task, "bases": bases, "k": ks, "examples": self.held_out}
        settings |= self._at_pretrained_weights()
        rate = self.subject.learning_rates[len(self.subject.learning_rates) // 2]
        tuned = self.subject.tune(task, 0, method="full", learning_rate=rate)
        return Run("gradient_coverage", settings, 0, {**self.subject.needs(), **files, "tuned": tuned})


@dataclass(frozen=True)
class Settings:
    """What is tried on which subjects."""

    parts: tuple[Part, ...]


ALL_BASES = (*MADE, *CURVATURE, "scratch", "another task's model")
FOUR_BASES = (*MADE, "curvature")
DIAGONAL_RATES = (1e-2, 3e-2, 1e-1)
CORE_RATES = (3e-3, 1e-2, 3e-2)
VIT_CELLS = (
    Cell("core", 16, CORE_RATES, ALL_BASES),
    Cell("diagonal", 64, DIAGONAL_RATES, ALL_BASES),
    Cell("core", 8, CORE_RATES, FOUR_BASES),
    Cell("core", 32, CORE_RATES, FOUR_BASES),
    Cell("core", 4, CORE_RATES, FOUR_BASES),
    Cell("band", 64, DIAGONAL_RATES, FOUR_BASES),
    Cell("sparse", 64, DIAGONAL_RATES, FOUR_BASES),
    Cell("diagonal", 16, DIAGONAL_RATES, FOUR_BASES),
    Cell("diagonal", 32, DIAGONAL_RATES, FOUR_BASES),
    Cell("diagonal", 96, DIAGONAL_RATES, ("pretrained", "random", "curvature")),
)
"""Widths are 96: a diagonal of all directions has no trailing ones beside it."""
TEXT_CELLS = (
    Cell("core", 35, CORE_RATES, (*FOUR_BASES, "curvature of another task")),
    Cell("diagonal", 64, (3e-2, 1e-1, 3e-1), FOUR_BASES),
    Cell("diagonal", 384, (3e-2, 1e-1, 3e-1), ("pretrained", "random")),
)
TINY_CELLS = (Cell("diagonal", 8, (3e-2, 1e-1), ("pretrained", "random", "curvature")),)

VIT = replace(
    SMALL_VIT,
    tasks=(*SMALL_VIT.tasks, "digits-rotated", "digits-larger-than-four"),
    settings={**SMALL_VIT.settings, "steps": 100, "train_examples": 1280},
)
"""Two small tasks more than elsewhere, for the units of a paired comparison are tasks."""

PRESETS = {
    "quick": Settings((Part(TINY_VIT, TINY_CELLS, TINY_VIT.tasks[:1], (0, 1), head_steps=5, held_out=64),)),
    "cpu": Settings(
        (
            Part(VIT, VIT_CELLS, ("USPS", "CIFAR-10"), one_draw=True),
            Part(replace(MINILM_LONGER, tasks=("SST-2", "MRPC")), TEXT_CELLS, ("SST-2",), one_draw=True),
        )
    ),
    "paper": Settings(
        (
            Part(
                replace(ROBERTA, tasks=("SST-2", "MRPC", "RTE")),
                (
                    Cell("core", 58, (1e-3, 4e-3, 1e-2), ALL_BASES),
                    Cell("diagonal", 256, (1e-2, 5e-2, 1e-1), ALL_BASES),
                    Cell("core", 16, (1e-3, 4e-3, 1e-2), FOUR_BASES),
                    Cell("core", 32, (1e-3, 4e-3, 1e-2), FOUR_BASES),
                    Cell("core", 128, (1e-3, 4e-3, 1e-2), FOUR_BASES),
                ),
                ("SST-2",),
                (0, 1, 2, 3, 4),
            ),
            Part(
                VIT_B16,
                (
                    Cell("core", 58, (1e-3, 4e-3, 1e-2), ALL_BASES),
                    Cell("diagonal", 256, (1e-2, 5e-2, 1e-1), ALL_BASES),
                    Cell("core", 16, (1e-3, 4e-3, 1e-2), FOUR_BASES),
                ),
                ("CIFAR-100", "SVHN"),
            ),
        )
    ),
}

CONTRASTS = tuple(
    Contrast(
        f"{better} against {worse}",
        f"At equal numbers of coefficients, {of_better} serve better than {of_worse}.",
        better,
        worse,
        "An interval of the difference, over tasks and cells, that lies wholly on the other side of zero.",
        stated="changed",
    )
    for better, of_better, worse, of_worse in (
        ("pretrained", "the leading singular directions", "random", "random ones"),
        ("pretrained", "the leading singular directions", "minor", "the trailing ones"),
        ("pretrained", "the leading singular directions", "scratch", "those of a model trained on the task alone"),
        ("pretrained", "the leading singular directions", "another task's model", "those of another task's model"),
        ("curvature", "directions of the task's curvature", "pretrained", "the leading singular ones"),
        (CURVATURE[1], "directions of another task's curvature", "pretrained", "the leading singular ones"),
        (CURVATURE[2], "directions of several other tasks' curvature", "pretrained", "the leading singular ones"),
    )
)
PAIRED = ("subject", "cell", "task", "seed")
EQUAL_WITHIN = 0.01
"""Mean scores that differ by less count as equal: about the standard error of a dev set of a thousand examples."""
QUANTITIES = {
    "coverage": "Gradient coverage",
    "noise": "Share of single examples' gradients",
    "signal": "Signal to noise",
    "update": "Share of full finetuning's update",
    "after": "Gradient coverage after full finetuning",
}
"""Column of `gradient_facts` → title of its table; see the action `gradient_coverage`."""
PREDICTORS: dict[str, tuple[str, str, Stated]] = {
    "coverage": ("gradient coverage", "that hold more of the task's gradient before training", "changed"),
    "signal": ("signal to noise", "whose coefficients' gradients tell more over their noise before training", "after"),
    "update": ("update coverage", "that hold more of what full finetuning changes", "after"),
}
"""Quantity → its name, what it is to have more of it, and when its claim was stated."""
PRIMARY = ("pretrained against random", "pretrained equals random", "pretrained against minor")


def plan(settings: Settings, results: Results) -> list[Run]:
    """Gradient coverage first, which trains nothing but heads, then one cell after another."""
    coverage = [part.coverage(task) for part in settings.parts for task in part.subject.tasks]
    return coverage + [run for part, cell in _cells(settings) for run in part.contest(cell).plan(results)]


def _cells(settings: Settings) -> Iterator[tuple[Part, Cell]]:
    for part in settings.parts:
        for cell in part.cells:
            yield part, cell


def analyse(settings: Settings, results: Results) -> Findings:
    """Paired comparisons of bases over all cells, scores by cell, and what gradient coverage says beside them."""
    scores = pd.concat(
        [part.contest(cell).scores(results).assign(cell=cell.name) for part, cell in _cells(settings)],
        ignore_index=True,
    ).infer_objects()  # what is not begun has columns without a type
    planned = sum(part.contest(cell).size for part, cell in _cells(settings))
    facts = gradient_facts(settings, results)
    both = scores.merge(facts, how="inner", on=["subject", "cell", "task", "arm"])
    reasons = [
        *(quantity_predicts(both, quantity) for quantity in PREDICTORS),
        rates_fall(scores),
        *(quantity_predicts(both, quantity, weights_alone=True) for quantity in ("coverage", "update")),
    ]
    contrasts = _contrasts(settings)
    of_weights = [replace(one, stated="after") for one in contrasts if {one.better, one.worse} <= set(MADE)]
    compare = partial(compare_cells, drawn=not any(part.one_draw for part in settings.parts))
    equal = conclude_equality(of_weights, scores, "arm", PAIRED, EQUAL_WITHIN, compare)
    family = conclude_family(contrasts, scores, "arm", PAIRED, compare=compare)
    primary = [name for name in PRIMARY if name in {claim.name for claim in (*family, *equal)}]
    claims = marked([*family, *equal, *as_family(reasons)], *primary)
    note = (
        f"{len(scores)} of {planned} runs that count are finished; rates were chosen on other examples than these. A "
        "cell is a kind of coefficients with their number. Tasks share cells, and cells share tasks, so that errors "
        f"are clustered both ways (Cameron, Gelbach & Miller); seeds were averaged first. {CHOSEN_AFTER}"
    )
    answer = _answer({claim.name: claim for claim in claims})
    if scores.empty:
        return Findings(claims, note=note, answer=answer)
    tables = {"Other units for the same differences": units_compared(of_weights, scores)}
    tables |= {"Scores": _by_basis(scores, "score"), "Learning rates": _by_basis(scores, "learning_rate")}
    tables |= {title: _by_basis(facts, quantity) for quantity, title in QUANTITIES.items() if len(facts)}
    figures = {
        "Leading minus random directions, by cell and task": cell_differences(scores),
        "Scores over the number of coefficients": sweep(scores),
    }
    return Findings(claims, tables, figures, note, answer)


def _answer(claims: Mapping[str, Claim]) -> str:
    if not set(PRIMARY) <= set(claims):
        return ""
    difference = claims[PRIMARY[0]].tell(
        "At equal numbers of coefficients the leading directions score higher than random ones, by {effect}",
        "At equal numbers of coefficients the leading directions score lower than random ones, by {effect}",
        "At equal numbers of coefficients no difference between leading and random directions is seen: {effect}",
    )
    equal = claims[PRIMARY[1]]
    within = equal.tell(
        f", and their means differ by less than {equal.margin:g}; over {{units}}.",
        f", and their means differ by more than {equal.margin:g}; over {{units}}.",
        f", and whether they differ by less than {equal.margin:g} is undecided; over {{units}}.",
    )
    return difference + within if math.isfinite(equal.effect) else difference


def compare_cells(pairs: pd.DataFrame, drawn: bool = False) -> tuple[Interval, str]:
    """The mean difference over tasks and cells, which are clustered both ways.

    Args:
        pairs: with the columns `subject`, `cell`, `task`, `seed`, `better`, `worse`.
        drawn: whether each seed has a random basis of its own: then seeds are clusters too, else they are averaged.
    """
    by = ["subject", "cell", "task", *(["seed"] if drawn else [])]
    effects = (pairs["better"] - pairs["worse"]).groupby([pairs[name] for name in by]).mean().rename("effect")
    means = effects.reset_index()
    kinds = {name: means["subject"] + " / " + means[name] for name in ("task", "cell")}
    kinds |= {"seed": means["seed"]} if drawn else {}
    units = " × ".join(counted(labels.nunique(), name) for name, labels in kinds.items())
    return clustered_interval(means["effect"], *kinds.values()), f"{units} ({counted(len(means), 'mean')})"


def units_compared(contrasts: Sequence[Contrast], scores: pd.DataFrame) -> pd.DataFrame:
    """The intervals that the differences would have over tasks alone, over cells alone, and over both."""
    rows = []
    for one in contrasts:
        pairs = differences(scores, "arm", one.better, one.worse, PAIRED)
        effect, subject = pairs["better"] - pairs["worse"], pairs["subject"] + " / "
        ways = {
            "tasks": mean_interval(effect, subject + pairs["task"]),
            "cells": mean_interval(effect, subject + pairs["cell"]),
            "tasks and cells": compare_cells(pairs)[0],
        }
        rows += [
            {"difference": one.name, "over": over, "effect": found.estimate, "low": found.low, "high": found.high}
            for over, found in ways.items()
        ]
    return pd.DataFrame(rows)


def _contrasts(settings: Settings) -> list[Contrast]:
    """Those whose both bases are tried in some cell."""
    tried = [frozenset(cell.bases) for _, cell in _cells(settings)]
    return [one for one in CONTRASTS if any({one.better, one.worse} <= bases for bases in tried)]


def gradient_facts(settings: Settings, results: Results) -> pd.DataFrame:
    """What each cell's coefficients hold before training: `subject, cell, task, arm`, and the `QUANTITIES`.

    Bands and sparse entries have no figure of their own, and are left out.
    """
    rows = []
    for part, cell in _cells(settings):
        for task in part.subject.tasks:
            record = results.get(part.coverage(task))
            table = pd.DataFrame() if record is None else record.measurements
            if len(table):
                here = table[(table["k"] == cell.k) & (table["form"] == cell.mode)]
                labels = {"subject": part.subject.name, "cell": cell.name, "task": task}
                wide = here.pivot(index="basis", columns="quantity", values="value").to_dict("index")
                rows += [{**labels, "arm": arm, **wide[arm]} for arm in cell.bases if arm in wide]
    return pd.DataFrame(rows, columns=["subject", "cell", "task", "arm", *QUANTITIES])


def quantity_predicts(both: pd.DataFrame, quantity: str, *, weights_alone: bool = False) -> Claim:
    """The claim that bases which hold more of something score higher, by rank correlation within cells and tasks.

    With `weights_alone`, bases of curvature are left out: they hold by far the most of the gradient.
    """
    rows = []
    here = both[~both["arm"].isin(CURVATURE)] if weights_alone else both
    means = here.groupby(["subject", "cell", "task", "arm"], as_index=False)[["score", quantity]].mean().dropna()
    for (subject, cell, task), one in means.groupby(["subject", "cell", "task"]):
        if len(one) > 2 and one["score"].nunique() > 1:
            rho = rank_correlation_with_p(one[quantity], one["score"]).rho
            rows.append((f"{subject} / {task}", f"{subject} / {cell}", rho))
    table = pd.DataFrame(rows, columns=["task", "cell", "rho"])
    name, more, stated = PREDICTORS[quantity]
    return conclude(
        f"{name} predicts scores" + (", without curvature" if weights_alone else ""),
        f"Of bases with equally many coefficients{', those of curvature left out' if weights_alone else ''}, those "
        f"{more} score higher after it.",
        clustered_interval(table["rho"], table["task"], table["cell"]),
        unit="rank correlation",
        would_change="A mean rank correlation whose interval lies wholly on the other side of zero.",
        runs=len(here),
        units=f"{counted(table['task'].nunique(), 'task')} × {counted(table['cell'].nunique(), 'cell')}",
        stated="after" if weights_alone else stated,
    )


def rates_fall(scores: pd.DataFrame) -> Claim:
    """The claim that arms on the task's curvature choose smaller rates than those on random directions, by cells."""
    rates = scores.pivot_table(index=["subject", "cell"], columns="arm", values="learning_rate")
    both = rates.reindex(columns=["random", "curvature"]).dropna()
    return conclude(
        "curvature takes smaller rates",
        "Coefficients on directions of the task's curvature settle at smaller rates than those on random ones.",
        paired_comparison(np.log10(both["random"]), np.log10(both["curvature"])),
        unit="decades of the rate",
        would_change="An interval over cells that reaches zero.",
        runs=int(scores["arm"].isin(both.columns).sum()),
        units=counted(len(both), "cell"),
        stated="after",
    )


def _by_basis(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """Means over tasks and seeds: a row for each cell, a column for each basis."""
    wide = table.pivot_table(index=["subject", "cell"], columns="arm", values=value, sort=False)
    return wide.reset_index().rename_axis(columns=None)


def cell_differences(scores: pd.DataFrame) -> go.Figure:
    """Score on leading minus random directions, a point for each cell and task, means over seeds."""
    pairs = differences(scores, "arm", "pretrained", "random", PAIRED)
    effects = (pairs["better"] - pairs["worse"]).groupby([pairs[name] for name in PAIRED[:3]], sort=False).mean()
    means = effects.rename("effect").reset_index()
    traces = (
        {
            "x": rows["effect"],
            "y": rows["subject"].str.split().str[0] + ", " + rows["cell"],
            "name": str(task),
            "marker": {"size": 8},
        }
        for task, rows in means.groupby("task", sort=False)
    )
    return scatter_figure(traces, "score on leading minus random directions", "")


def sweep(scores: pd.DataFrame) -> go.Figure:
    """Mean score against the numbers trained in the backbone, a line for each subject, mode and basis."""
    modes = scores.assign(mode=scores["cell"].str.partition(" ")[0])
    lines = (
        (f"{subject}, {mode}, {arm}", rows.groupby("backbone")["score"].mean())
        for (subject, mode, arm), rows in modes.groupby(["subject", "mode", "arm"], sort=False)
    )
    traces = ({"x": line.index, "y": line, "name": name, "mode": "lines+markers"} for name, line in lines)
    return scatter_figure(traces, "numbers trained in the backbone", "mean score", log="x")


EXPERIMENT = Experiment(
    "ablation", QUESTION, PRESETS, plan, analyse, "Does it matter which directions the coefficients live on?"
)
