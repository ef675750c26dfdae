"""Do unrelated tasks, finetuned from one base, share their leading singular directions beyond chance?"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from spectralbasis.comparison.statistics import Interval, pair_interval
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
from spectralbasis.study.estimates import mean_interval
from spectralbasis.study.experiments import stability
from spectralbasis.study.runs import Record, Results, Run
from spectralbasis.study.subjects import Subject
from spectralbasis.study.trajectories import NOISE, halvings

QUESTION = (
    "Do models that were finetuned from one base to unrelated tasks share their leading singular directions more than "
    "independent random updates would leave them to, and how far is that from what seeds of one task share?"
)

TASKS: dict[str, tuple[str, str]] = {
    "RTE": ("news", "does one text follow from another"),
    "MRPC": ("news", "do two sentences say the same"),
    "STS-B": ("news", "how alike are two sentences, a number"),
    "CoLA": ("examples of linguists", "is a sentence well formed"),
    "SST-2": ("film reviews", "is an opinion good or bad"),
    "MNIST": ("handwritten digits", "ten digits"),
    "USPS": ("handwritten digits", "ten digits"),
    "Fashion-MNIST": ("pictures of clothes", "ten pieces of clothing"),
    "CIFAR-10": ("photographs", "ten animals and vehicles"),
    "CIFAR-100": ("photographs", "a hundred kinds of things and beings"),
    "SVHN": ("house numbers", "ten digits"),
    "DTD": ("textures", "47 words for textures"),
    "EuroSAT": ("satellite images", "ten uses of land"),
    "Pets": ("photographs", "37 breeds of cats and dogs"),
    "Shakespeare": ("plays", "masked words"),
    "WikiText-2": ("encyclopaedia", "masked words"),
    "digits-parity": ("handwritten digits", "even or odd"),
    "digits-larger-than-four": ("handwritten digits", "up to 4 or above"),
    "digits-rotated": ("handwritten digits, turned", "ten digits"),
}
"""Task → (domain, label space). Two tasks are unrelated where both differ (STS-B has captions and forum posts too)."""

HELD = "halvings of the null's distance"


def unrelated(a: str, b: str) -> bool:
    """Whether two tasks differ in domain and in label space."""
    return all(one != other for one, other in zip(TASKS[a], TASKS[b], strict=True))


@dataclass(frozen=True)
class Settings:
    """Which finetuned models are compared with each other.

    Args:
        finetuning: the runs of `stability` that are taken over.
        rates: which of a subject's learning rates, by number.
        draws: of the scrambled null for each matrix.
    """

    finetuning: stability.Settings
    rates: tuple[int, ...] = (1, 2)
    draws: int = 3


PRESETS = {
    "quick": Settings(replace(stability.PRESETS["quick"], seeds=(0, 1)), rates=(1,)),
    "cpu": Settings(stability.SEVERAL_TASKS, draws=2),
    "paper": Settings(stability.PRESETS["paper"], draws=5),
}


def plan(settings: Settings, results: Results) -> list[Run]:
    """One comparison of all tasks and seeds for each model and learning rate."""
    return [run for _, _, run in _comparisons(settings)]


def _comparisons(settings: Settings) -> Iterator[tuple[Subject, float, Run]]:
    for subject in settings.finetuning.subjects:
        for rate in (subject.learning_rates[number] for number in settings.rates):
            yield subject, rate, comparison(settings, subject, rate)


def comparison(settings: Settings, subject: Subject, rate: float) -> Run:
    """The run that compares a model finetuned to all its tasks, with all seeds, at one learning rate."""
    arms = [(task, seed) for task in subject.tasks for seed in settings.finetuning.seeds]
    tuned = {
        f"tuned_{number}": stability.finetuning(settings.finetuning, subject, task, rate, seed)
        for number, (task, seed) in enumerate(arms)
    }
    wanted: dict[str, Any] = {
        "tasks": [task for task, _ in arms], "leading": settings.finetuning.leading, "draws": settings.draws,
    }  # fmt: skip
    return Run("compare", {**subject.named(), **wanted}, 0, {**subject.needs(), **tuned})


def analyse(settings: Settings, results: Results) -> Findings:
    """Claims for each model, over its learning rates; tables of task pairs."""
    found = [(s, rate, record) for s, rate, run in _comparisons(settings) if (record := results.get(run))]
    tables = [_pairs(subject, rate, record) for subject, rate, record in found]
    pairs = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    subjects = settings.finetuning.subjects
    claims = as_family(claim for s in subjects for claim in _claims(s, pairs, found))
    overlap = updates_overlap(pairs, len(found))
    first = subjects[0].name
    claims = marked(
        [*claims, overlap], f"{first}: unrelated tasks share", f"{first}: unrelated tasks turn alike", overlap.name
    )
    shown = {"Task pairs": _by_task_pair(pairs)} if tables else {}
    return Findings(
        claims,
        {**shown, "Unrelated tasks": _relations(settings.finetuning.subjects)},
        {"Distances between finetuned models": _figure(pairs)} if tables else {},
        _note(settings),
        _answer(claims),
    )


def _pairs(subject: Subject, rate: float, record: Record) -> pd.DataFrame:
    """The pairs of one comparison with what is made of them."""
    pairs = record.measurements
    held = halvings(pairs["value"], pairs["null_mean"])
    by_stability = halvings(
        pairs["base_overlap_a"] * pairs["base_overlap_b"], pairs["base_null_a"] * pairs["base_null_b"]
    )
    return pairs.assign(
        model=subject.name,
        learning_rate=rate,
        held=held,
        common=held - by_stability,
        unrelated=[unrelated(a, b) for a, b in zip(pairs["task_a"], pairs["task_b"], strict=True)],
    )


def _claims(subject: Subject, pairs: pd.DataFrame, found: list[tuple[Subject, float, Record]]) -> list[Claim]:
    here = pairs[pairs["model"] == subject.name] if len(pairs) else pairs
    records = [record for one, _, record in found if one is subject]
    apart = here[here["unrelated"]] if len(here) else here
    number = len(apart.drop_duplicates(["task_a", "task_b"])) if len(apart) else 0
    units = f"{counted(number, 'pair')} of {counted(len(_tasks(apart)), 'task')}"
    alone = ", and no interval exists, as all these pairs have a task in common" if _have_common_task(apart) else ""
    return [
        conclude(
            f"{subject.name}: unrelated tasks share",
            f"Unrelated tasks finetuned from {subject.name} leave their leading directions closer to each other than "
            "independent scrambled updates do.",
            _over_tasks(apart, "held"), unit=HELD, runs=len(records), units=units + alone, stated="changed",
            would_change="Pairs as far apart as independent draws, or farther.",
        ),
        conclude(
            f"{subject.name}: unrelated tasks turn alike",
            f"Unrelated tasks turn the leading directions of {subject.name} in part the same way: they are closer to "
            "each other than their own distances from the base make them.",
            _over_tasks(apart, "common"), unit=HELD, runs=len(records), units=units + alone, stated="changed",
            would_change="Tasks no closer than models whose overlaps with the base multiply, as those of independent "
            "updates do: then all they share is the base.",
        ),
        conclude(
            f"{subject.name}: seeds share more than tasks",
            f"Finetuned from {subject.name}, seeds of one task share more than different tasks do.",
            _ceiling(here, records), unit=HELD, runs=len(records), units=counted(len(_tasks(here)), "task"),
            would_change="Different tasks as close as seeds of one: then nothing of a task shows in these directions.",
            stated="changed",
        ),
    ]  # fmt: skip


UPDATES = "updates of unrelated tasks overlap"


def updates_overlap(pairs: pd.DataFrame, runs: int) -> Claim:
    """The claim that the updates of unrelated tasks have more in common than chance; models are the units.

    Pairs of one model share its weights, and most of them a task.
    """
    apart = pairs[pairs["unrelated"] & (pairs["task_a"] != pairs["task_b"])] if len(pairs) else pd.DataFrame()
    seen, found, units = "", mean_interval([]), counted(0, "model")
    if len(apart):
        by = ["model", "task_a", "task_b"]
        means = apart.groupby(by, as_index=False)[["update_overlap", "update_overlap_haar"]].mean()
        ratios = means["update_overlap"] / means["update_overlap_haar"]
        seen = f" ({ratios.min():.1f} to {ratios.max():.1f} times; more in {(ratios > 1).sum()} of {len(ratios)} pairs)"
        found = mean_interval(np.log2(ratios), means["model"])
        units = f"{counted(means['model'].nunique(), 'model')}, {counted(len(means), 'pair')} of tasks"
    return conclude(
        UPDATES,
        f"The leading directions of two updates to unrelated tasks overlap more than random subspaces do{seen}.",
        found, unit="doublings of chance", runs=runs, units=units, stated="after",
        would_change="Overlaps around those of random subspaces, or models in which they are.",
    )  # fmt: skip


def _answer(claims: Sequence[Claim]) -> str:
    named = {claim.name: claim for claim in claims if claim.primary}
    overlap = named.pop(UPDATES)
    shared = next(iter(named.values()))
    return shared.tell(
        "Unrelated tasks keep their leading directions closer to each other than chance, {effect} over {units}",
        "Unrelated tasks leave their leading directions farther apart than chance, {effect} over {units}",
        "Whether unrelated tasks share leading directions beyond chance is undecided: {effect} over {units}",
    ) + overlap.tell(
        "; their updates overlap more than random subspaces do, {effect} over {units}.",
        "; their updates overlap less than random subspaces do, {effect} over {units}.",
        "; whether their updates overlap more than random subspaces is undecided: {effect} over {units}.",
    )


def _tasks(pairs: pd.DataFrame) -> list[str]:
    return [] if pairs.empty else list(pd.unique(pairs[["task_a", "task_b"]].to_numpy().ravel()))


def _have_common_task(pairs: pd.DataFrame) -> bool:
    """Whether one task is in all pairs, so that leaving it out leaves none and no jackknife over tasks exists."""
    return any(((pairs["task_a"] == task) | (pairs["task_b"] == task)).all() for task in _tasks(pairs))


def _over_tasks(pairs: pd.DataFrame, column: str) -> Interval:
    """Mean over pairs of tasks; models of one task count as one, and pairs with a task in common as dependent."""
    if pairs.empty:
        return mean_interval([])
    means = pairs.groupby(["task_a", "task_b"])[column].mean().rename("effect").reset_index()
    if _have_common_task(pairs):
        return Interval(float(means["effect"].mean()), *[math.nan] * 3)
    units = means.assign(tuned_a=means["task_a"], tuned_b=means["task_b"], tuned=range(len(means)), layer=0)
    return pair_interval(units, seed=0)


def _ceiling(pairs: pd.DataFrame, records: list[Record]) -> Interval:
    """Seeds of a task less pairs with other tasks, over tasks; the p-value permutes task labels, two-sided."""
    if pairs.empty:
        return mean_interval([])
    differences = []
    for task in pd.unique(pairs[["task_a", "task_b"]].to_numpy().ravel()):
        mine = pairs[(pairs["task_a"] == task) | (pairs["task_b"] == task)]
        same = mine["task_a"] == mine["task_b"]
        differences.append(mine.loc[same, "held"].mean() - mine.loc[~same, "held"].mean())
    over_tasks = mean_interval(differences)
    tests = [test["p_value"] for record in records if (test := record.result["sharing"]["permutation"])]
    p_value = min(1.0, 2 * max(tests)) if tests else over_tasks.p_value
    return Interval(over_tasks.estimate, over_tasks.low, over_tasks.high, p_value)


SHOWN = [
    "value", "null_mean", "held", "common", "base_overlap_a", "base_overlap_b", "update_cosine", "update_overlap",
    "update_overlap_haar",
]  # fmt: skip


def _by_task_pair(pairs: pd.DataFrame) -> pd.DataFrame:
    by = ["model", "learning_rate", "task_a", "task_b", "unrelated"]
    groups = pairs.groupby(by, sort=False)
    return groups[SHOWN].mean().assign(pairs=groups.size()).reset_index()


def _relations(subjects: tuple[Subject, ...]) -> pd.DataFrame:
    """Every two tasks of a model, whether they are unrelated, and why."""
    rows = [
        {
            "task a": a, "task b": b, "unrelated": unrelated(a, b),
            "domains": " / ".join((TASKS[a][0], TASKS[b][0])), "labels": " / ".join((TASKS[a][1], TASKS[b][1])),
        }
        for subject in subjects
        for number, a in enumerate(subject.tasks)
        for b in subject.tasks[number + 1 :]
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _figure(pairs: pd.DataFrame) -> go.Figure:
    kinds = np.where(
        pairs["task_a"] == pairs["task_b"], "one task", np.where(pairs["unrelated"], "unrelated", "related")
    )
    traces = (
        {
            "x": (1 - rows["null_mean"]).clip(lower=NOISE),
            "y": (1 - rows["value"]).clip(lower=NOISE),
            "name": f"{model}, {kind}",
        }
        for (model, kind), rows in pairs.groupby([pairs["model"], kinds], sort=False)
    )
    return scatter_figure(
        traces, "1 − overlap of independent scrambled updates", "1 − overlap of the finetuned models", log="xy"
    )


def _note(settings: Settings) -> str:
    return (
        f"Of each two finetuned models, the subspaces of the first {settings.finetuning.leading} singular directions "
        f"are compared with {settings.draws} pairs of independent scrambled updates, matrix by matrix, left and right. "
        "Distances are 1 − overlap. Intervals: a jackknife over tasks, whose seeds and learning rates were averaged; "
        "where all pairs of a model have one task in common, no jackknife and so no interval exists. " + CHOSEN_AFTER
    )


EXPERIMENT = Experiment("sharing", QUESTION, PRESETS, plan, analyse, "Do unrelated tasks share directions?")
