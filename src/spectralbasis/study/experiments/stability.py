"""Are the leading singular directions more stable under finetuning than chance, and does the update lie in them?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import plotly.graph_objects as go

from spectralbasis.comparison.statistics import Interval
from spectralbasis.report.study_page import two_digits
from spectralbasis.study.claims import (
    CHOSEN_AFTER,
    Claim,
    Experiment,
    Findings,
    as_family,
    conclude,
    marked,
    scatter_figure,
    task_units,
)
from spectralbasis.study.estimates import mean_interval, slope_with_interval
from spectralbasis.study.runs import Results, Run
from spectralbasis.study.subjects import LARGE, LIMU_BERT, MINILM, SMALL_BERT, SMALL_VIT, TINY_VIT, LabelledRun, Subject
from spectralbasis.study.trajectories import summarise_steps

QUESTION = (
    "Are the leading singular directions of a pretrained model's weights more stable under full finetuning than under "
    "random updates of the same size and spectrum, more than the trailing ones, and does the update lie in them?"
)


@dataclass(frozen=True)
class Settings:
    """Which models are finetuned, and what is measured on the way.

    Args:
        subjects: models with their tasks and learning rates.
        measured: shares of all steps after which matrices are measured.
        seeds: of finetuning.
        leading: number of directions.
        draws: of the scrambled null for each matrix and measured step.
    """

    subjects: tuple[Subject, ...]
    measured: tuple[float, ...] = (0.1, 1 / 3, 1.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    leading: int = 16
    draws: int = 2


SEVERAL_TASKS = Settings((MINILM, SMALL_VIT, SMALL_BERT))
"""On the models of the preset "cpu" that have several tasks: what other experiments take over."""

PRESETS = {
    "quick": Settings((TINY_VIT,), measured=(0.5, 1.0), seeds=(0,), leading=4),
    "cpu": replace(SEVERAL_TASKS, subjects=(*SEVERAL_TASKS.subjects, LIMU_BERT)),
    "paper": Settings(LARGE, seeds=(0, 1, 2, 3, 4), leading=64, draws=5),
}

RUN = ["model", "task", "learning_rate", "seed"]
HELD = "halvings of the null's rotation"


def plan(settings: Settings, results: Results) -> list[Run]:
    """Full finetuning of every model on every task, at every learning rate, with every seed."""
    return [arm.run for arm in _arms(settings)]


def _arms(settings: Settings) -> Iterator[LabelledRun]:
    for seed in settings.seeds:
        for subject in settings.subjects:
            for task in subject.tasks:
                for rate in subject.learning_rates:
                    run = finetuning(settings, subject, task, rate, seed)
                    yield LabelledRun(run, dict(zip(RUN, (subject.name, task, rate, seed), strict=True)))


def finetuning(settings: Settings, subject: Subject, task: str, learning_rate: float, seed: int) -> Run:
    """One full finetuning, measured on the way; other experiments take the same run, so that it is done once."""
    at = sorted({max(1, round(share * subject.settings["steps"])) for share in settings.measured})
    measure = {"steps": at, "leading": settings.leading, "draws": settings.draws, "trailing": True}
    return subject.tune(task, seed, method="full", learning_rate=learning_rate, measure=measure)


def analyse(settings: Settings, results: Results) -> Findings:
    """Verdicts on stability and coverage, with tables by model, layer, kind and step."""
    arms = [(arm, record) for arm in _arms(settings) if (record := results.get(arm.run))]
    tables = [record.measurements.assign(**arm.labels) for arm, record in arms if len(record.measurements)]
    if not tables:
        return Findings(_marked(_claims(pd.DataFrame(), 0)), note="No run is finished yet.")
    rows = pd.concat(tables, ignore_index=True)
    steps = summarise_steps(rows, by=[*RUN, "step"])
    final = steps[steps["step"] == steps.groupby(RUN)["step"].transform("max")]
    scores = pd.DataFrame([{**arm.labels, "score": record.result.get("score")} for arm, record in arms])
    last_rows = rows.merge(final[[*RUN, "step"]])
    shown = {
        "Models, tasks and learning rates": _means(final.merge(scores), ["model", "task", "learning_rate"]),
        "Layers": _means(summarise_steps(last_rows, by=[*RUN, "layer"]), ["model", "layer"]),
        "Kinds of matrices": _means(summarise_steps(last_rows, by=[*RUN, "kind"]), ["model", "kind"]),
        "Steps": _means(steps, ["model", "learning_rate", "step"]),
    }
    claims = _marked([*_claims(steps, len(tables)), *plain_overlaps(final, len(tables))])
    return Findings(
        claims,
        shown,
        {"Rotation avoided by size of the update": _held_figure(steps), "Coverage over chance": _gain_figure(steps)},
        _note(settings, len(tables), steps),
        _answer(claims),
    )


SHOWN = (
    "score", "norm", "overlap", "overlap_null", "held", "trailing_overlap", "trailing_overlap_null", "trailing_held",
    "matched_cosine", "core", "core_null", "diagonal", "diagonal_null", "stable", "forced",
)  # fmt: skip


def _means(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Means over all else, with the number of runs."""
    groups = table.groupby(by, sort=False)
    means = groups[[name for name in SHOWN if name in table]].mean()
    return means.assign(runs=groups[RUN].apply(lambda rows: len(rows.drop_duplicates()))).reset_index()


def _claims(steps: pd.DataFrame, runs: int) -> list[Claim]:
    """Each task of each model is one unit; runs of other seeds and learning rates are not independent of it."""

    def effect(values: pd.Series, at: pd.DataFrame) -> Interval:
        return mean_interval(values, at["model"] + " / " + at["task"])

    units = task_units(steps)
    if steps.empty:
        nothing = mean_interval([])
        found = dict.fromkeys(("held", "trailing", "unforced", "core", "diagonal", "size"), nothing)
    else:
        last = steps[steps["step"] == steps.groupby(RUN)["step"].transform("max")]
        found = {
            "held": effect(last["held"], last),
            "trailing": effect(last["held"] - last["trailing_held"], last),
            "unforced": effect(last["stable"] - 2 * last["forced"], last),
            "core": effect(last["core_gain"], last),
            "diagonal": effect(last["diagonal_gain"], last),
            "size": slope_with_interval(steps["norm"], steps["held"], steps["model"] + " / " + steps["task"]),
        }
    claims = [
        conclude(
            "leading above scrambled",
            "Finetuning turns the leading directions less than scrambled updates of the same size and spectrum do.",
            found["held"], unit=HELD, runs=runs, units=units, stated="changed",
            would_change="Rotations like the null's leave it undecided; larger ones contradict it: then "
            "finetuning seeks out the leading directions.",
        ),
        conclude(
            "leading above trailing",
            "The leading directions are spared more than the trailing ones, each against its own null.",
            found["trailing"], unit=HELD, runs=runs, units=units, stated="changed",
            would_change="Leading directions that turn more than trailing ones, each against its null: then dominant "
            "vectors turn while the tail is stable (arXiv 2505.23099).",
        ),
        conclude(
            "stability beyond Wedin's bound",
            "Of the matrices whose leading subspace stays (overlap of at least 0.99), the size of the update alone "
            "forces fewer than half.",
            found["unforced"], unit="share of the matrices", runs=runs, units=units, stated="changed",
            would_change="Steps so small that the bound forces the overlap in most stable matrices.",
        ),
        conclude(
            "core covers the update",
            "The core of the leading directions covers more of the update than of a scrambled one.",
            found["core"], unit="doublings of chance", runs=runs, units=units, stated="changed",
            would_change="A coverage at or below that of scrambled updates.",
        ),
        conclude(
            "diagonal covers the update",
            "Changes of the leading singular values cover more of the update than of a scrambled one.",
            found["diagonal"], unit="doublings of chance", runs=runs, units=units, stated="changed",
            would_change="A coverage at or below that of scrambled updates.",
        ),
        conclude(
            "larger steps are held back more",
            "The larger the update, the more its rotation of the leading directions falls short of chance.",
            found["size"], unit=f"{HELD} per decade of ‖ΔW‖/‖W0‖", runs=runs, units=units, stated="changed",
            would_change="A slope of the other sign: only small steps would spare the leading directions.",
        ),
    ]  # fmt: skip
    return as_family(claims)


def _note(settings: Settings, runs: int, steps: pd.DataFrame) -> str:
    sizes = steps["norm"]
    return (
        f"{runs} finished runs; updates of {sizes.min():.2g} to {sizes.max():.2g} of the weights' norm. Leading: the "
        f"first {settings.leading} directions, or half of a smaller matrix; null: {settings.draws} scrambled draws for "
        "each matrix and step. Ratios to the null are taken in each matrix, and their logarithms averaged. Intervals: "
        "Student's t over models and tasks, whose learning rates and seeds were averaged first. Tasks of "
        "one model are alike, so that intervals are about tasks of these models. " + CHOSEN_AFTER
    )


PRIMARY = ("leading above scrambled", "leading above trailing", "core covers the update")
PLAIN = "plain overlap of leading above trailing"


def _marked(claims: Sequence[Claim]) -> list[Claim]:
    return marked(claims, *PRIMARY)


def plain_overlaps(last: pd.DataFrame, runs: int) -> list[Claim]:
    """What is seen without a null: leading directions overlap more than trailing ones, after random updates too."""
    units = last["model"] + " / " + last["task"]
    claims = []
    for name, of, suffix in ((PLAIN, "finetuning", ""), (f"{PLAIN}, scrambled", "scrambled updates", "_null")):
        if f"trailing_overlap{suffix}" not in last:
            continue
        gap = last[f"overlap{suffix}"] - last[f"trailing_overlap{suffix}"]
        by_unit = gap.groupby(units).mean()
        claims.append(
            conclude(
                name,
                f"After {of} the leading directions overlap more with those of the base than the trailing ones do, "
                f"without a comparison with chance (seen in {(by_unit > 0).sum()} of {len(by_unit)} tasks).",
                mean_interval(gap, units), unit="overlap", runs=runs, units=task_units(last), stated="after",
                would_change="Trailing directions that overlap as much.",
            )
        )  # fmt: skip
    return claims


def _answer(claims: Sequence[Claim]) -> str:
    named = {claim.name: claim for claim in claims}
    answer = named[PRIMARY[0]].tell(
        "Finetuning turns the leading directions less than scrambled updates do: {effect} over {units}",
        "Finetuning turns the leading directions more than scrambled updates do: {effect} over {units}",
        "Whether finetuning turns the leading directions less than scrambled ones is undecided: {effect} over {units}",
    )
    if PLAIN not in named:
        return answer
    chance = named[f"{PLAIN}, scrambled"].effect
    return (
        answer
        + named[PLAIN].tell(
            "; in plain overlap they still exceed the trailing ones, {effect}, as they do under scrambled updates",
            "; in plain overlap they are below the trailing ones, {effect}, and under scrambled updates",
            "; in plain overlap no difference from the trailing ones is seen, {effect}, and under scrambled updates",
        )
        + f" ({two_digits(chance)})."
    )


def _held_figure(steps: pd.DataFrame) -> go.Figure:
    traces = (
        {
            "x": rows["norm"], "y": rows[column], "name": f"{model}, {name}", "marker": {"symbol": symbol, "size": 6},
        }
        for model, rows in steps.groupby("model", sort=False)
        for name, column, symbol in (("leading", "held", "circle"), ("trailing", "trailing_held", "x"))
    )  # fmt: skip
    return scatter_figure(traces, "‖ΔW‖ / ‖W0‖", HELD, log="x")


def _gain_figure(steps: pd.DataFrame) -> go.Figure:
    traces = (
        {"x": rows["norm"], "y": 2.0 ** rows[f"{name}_gain"], "name": f"{model}, {name}", "marker": {"size": 6}}
        for model, rows in steps.groupby("model", sort=False)
        for name in ("core", "diagonal")
    )
    return scatter_figure(traces, "‖ΔW‖ / ‖W0‖", "coverage over that of chance", log="xy")


EXPERIMENT = Experiment(
    "stability",
    QUESTION,
    PRESETS,
    plan,
    analyse,
    "Do leading directions turn less than by chance?",
)
