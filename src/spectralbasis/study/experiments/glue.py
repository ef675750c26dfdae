"""How do spectral coefficients compare with other ways to adapt, at matched numbers of trained parameters?"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from spectralbasis.report.study_page import Stated
from spectralbasis.study.claims import Claim, Experiment, Findings, marked
from spectralbasis.study.contests import (
    COEFFICIENTS,
    Arm,
    Contest,
    Contrast,
    compare_pairs,
    conclude_family,
    differences,
)
from spectralbasis.study.estimates import holm
from spectralbasis.study.runs import Results, Run
from spectralbasis.study.subjects import (
    DEBERTA,
    LEARNED,
    MINILM_LONGER,
    ROBERTA,
    SMALL_BERT,
    TINY_VIT,
    VIT_B16,
    Subject,
    is_learned,
)

QUESTION = (
    "How well does tuning spectral coefficients do beside other ways to adapt, for the numbers that it trains, and is "
    "it at or above LoRA with at least twice as many?"
)
PAIRED = ("subject", "task", "seed")
MARGIN = 0.01
"""Scores this far below still count as no worse: about the standard error of a dev set of a thousand examples."""


@dataclass(frozen=True)
class Settings:
    """Contests in order of preference, and what is concluded from them.

    Args:
        contests: arms on a subject; what comes later has fewer seeds.
        lean: pairs of a spectral arm and a LoRA arm that trains at least twice as many numbers in the backbone.
        equal: pairs of a spectral arm and a LoRA arm of about as many.
        forgetting: after each of whose runs the model is asked for masked tokens again.
        remembered: the text that is asked for.
    """

    contests: tuple[Contest, ...]
    lean: tuple[tuple[str, str], ...]
    equal: tuple[tuple[str, str], ...] = ()
    forgetting: Contest | None = None
    remembered: str = "novels"


def spectral(name: str, rates: Sequence[float], **options: Any) -> Arm:
    """An arm of spectral coefficients."""
    return Arm(name, {**COEFFICIENTS, **options}, tuple(rates))


def other(method: str, rates: Sequence[float], name: str = "", **options: Any) -> Arm:
    """An arm of another method."""
    return Arm(name or method, {"method": method, **options}, tuple(rates))


def sources(subject: Subject, task: str) -> Mapping[str, Run]:
    """Parallel adapters of all other tasks, for their fusion."""
    rest = [name for name in subject.tasks if name != task]
    return {
        f"source_{number}": subject.tune(name, 0, method="parallel", rank=8, learning_rate=3e-3)
        for number, name in enumerate(rest)
    }


CORE_ARMS = (
    other("full", (5e-5, 2e-4, 5e-4)),
    other("head", (2e-2, 5e-2, 1e-1)),
    other("bitfit", (1e-3, 3e-3, 1e-2)),
    other("lora", (2e-3, 5e-3, 1.5e-2), "lora r=1", rank=1),
    other("psoft", (2e-3, 5e-3, 1.5e-2), "psoft core k=35", rank=35),
    spectral("diagonal", (3e-2, 1e-1, 3e-1), coefficients="diagonal", leading=384),
    spectral("core k=35", (3e-3, 1e-2, 3e-2), coefficients="core", budget=0.002),
    spectral("sparse", (1e-2, 3e-2, 1e-1), coefficients="sparse", leading=384, budget=0.002),
)
"""At width 384: the diagonals train 14,208 numbers, LoRA of rank 1 trains 42,240, cores and sparse entries 45,000."""

RICH_ARMS = (
    other("lora", (5e-4, 2e-3, 5e-3), "lora r=8", rank=8),
    other("svft", (1e-2, 3e-2, 1e-1), "svft band", coefficients="band", bandwidth=1, scaling="absolute"),
)
"""LoRA with eight times as many numbers, and a band over all directions with as many as LoRA of rank 1."""

FURTHER_ARMS = (
    other("dora", (2e-3, 5e-3, 1.5e-2), rank=1),
    other("pissa", (3e-4, 1e-3, 3e-3), rank=1),
    other("adalora", (1.5e-2, 5e-2, 1.5e-1), rank=1),
    other("vera", (1e-2, 3e-2, 1e-1), rank=256),
    other("tinylora", (3e-2, 1e-1, 3e-1), rank=2, dimension=64),
    other("houlsby", (1e-3, 3e-3, 1e-2), rank=2),
    other("parallel", (1e-3, 3e-3, 1e-2), rank=8),
    other("subspace", (1e-2, 3e-2, 1e-1), dimension=14208),
    Arm("adapterfusion", {"method": "adapterfusion"}, (5e-5, 2e-4, 5e-4), sources),
    other("fourierft", (3e-2,), n_frequency=1000),
)
"""FourierFT has one rate and comes last: a step takes twice LoRA's time, for a transform of each weight's size."""

NARROW_ARMS = (
    other("full", (5e-5, 2e-4, 1e-3)),
    other("bitfit", (1e-3, 3e-3, 1e-2)),
    other("lora", (2e-3, 5e-3, 1.5e-2), "lora r=1", rank=1),
    spectral("diagonal", (3e-2, 1e-1, 3e-1), coefficients="diagonal", leading=128),
    spectral("core k=9", (3e-3, 1e-2, 3e-2), coefficients="core", leading=9),
    spectral("sparse", (1e-2, 3e-2, 1e-1), coefficients="sparse", leading=128, budget=0.002),
)
"""At width 128."""

LARGE_ARMS = (
    other("full", (1e-5, 2e-5, 5e-5)),
    other("head", (1e-3, 5e-3, 2e-2)),
    other("bitfit", (4e-4, 1e-3, 2e-3)),
    other("lora", (2e-4, 5e-4, 1e-3), "lora r=1", rank=1),
    other("psoft", (1e-3, 4e-3, 1e-2), "psoft core k=58", rank=58),
    spectral("diagonal", (1e-2, 5e-2, 1e-1), coefficients="diagonal", leading=768),
    spectral("core k=58", (1e-3, 4e-3, 1e-2), coefficients="core", budget=0.002),
    spectral("sparse", (5e-3, 2e-2, 5e-2), coefficients="sparse", leading=768, budget=0.002),
)
TINY_ARMS = (
    other("full", (3e-3,)),
    other("bitfit", (1e-2,)),
    other("lora", (1e-2,), "lora r=1", rank=1),
    spectral("diagonal", (3e-2, 1e-1), coefficients="diagonal", leading=32),
)

PRESETS = {
    "quick": Settings((Contest(TINY_VIT, TINY_ARMS, TINY_VIT.tasks[:1], (0, 1)),), (("diagonal", "lora r=1"),)),
    "cpu": Settings(
        (
            Contest(MINILM_LONGER, CORE_ARMS, ("SST-2", "MRPC")),
            Contest(MINILM_LONGER, RICH_ARMS, ("SST-2", "MRPC")),
            Contest(MINILM_LONGER, FURTHER_ARMS, ("SST-2",), (0,)),
        ),
        (("diagonal", "lora r=1"), ("core k=35", "lora r=8"), ("sparse", "lora r=8"), ("svft band", "lora r=8")),
        (("core k=35", "lora r=1"), ("svft band", "lora r=1")),
        Contest(SMALL_BERT, NARROW_ARMS, ("Shakespeare", "SST-2")),
    ),
    "paper": Settings(
        (
            Contest(ROBERTA, LARGE_ARMS, ("SST-2", "MRPC"), (0, 1, 2, 3, 4)),
            Contest(ROBERTA, RICH_ARMS, ("SST-2", "MRPC"), (0, 1, 2, 3, 4)),
            Contest(ROBERTA, FURTHER_ARMS, ("SST-2",), (0, 1, 2)),
            Contest(DEBERTA, LARGE_ARMS, ("SST-2", "MRPC")),
            Contest(VIT_B16, LARGE_ARMS, ("CIFAR-100", "SVHN")),
        ),
        (("diagonal", "lora r=1"), ("core k=58", "lora r=8"), ("sparse", "lora r=8"), ("svft band", "lora r=8")),
        (("core k=58", "lora r=1"),),
        Contest(replace(ROBERTA, tasks=("SST-2", "MRPC")), LARGE_ARMS, ("SST-2", "MRPC")),
        "WikiText-2",
    ),
}


def plan(settings: Settings, results: Results) -> list[Run]:
    """One contest after another, each with its trials of learning rates first; that of forgetting before them all."""
    asked = [run for _, pair in _remembered(settings, results) for run in pair]
    first = settings.forgetting.plan(results) if settings.forgetting else []
    return [*first, *asked, *(run for contest in settings.contests for run in contest.plan(results))]


def _remembered(settings: Settings, results: Results) -> Iterator[tuple[dict[str, Any], tuple[Run, Run]]]:
    """The runs of the contest of forgetting that count, each with the run that asks what is left."""
    if settings.forgetting is None:
        return
    subject = settings.forgetting.subject
    for labels, run in settings.forgetting.counted(results):
        asked = {"task": settings.remembered, "second_task": labels["task"], **subject.named()}
        length = subject.settings["max_length"]
        yield labels, (run, Run("retention", {**asked, "max_length": length}, 0, {**subject.needs(), "adapter": run}))


def analyse(settings: Settings, results: Results) -> Findings:
    """Scores by arm and task, paired comparisons with full finetuning and LoRA, and the frontier."""
    found = pd.concat([contest.scores(results) for contest in settings.contests], ignore_index=True).infer_objects()
    scores = both_halves(found, {task for contest in settings.contests for task in contest.selection_tasks})
    planned = sum(contest.size for contest in settings.contests)
    forgotten = forgetting(settings, results)
    lean, equal = _contrasts(settings)
    learned = [task for task, rows in scores.groupby("task", sort=False) if is_learned(str(task), rows["score"])]
    claims = conclude_family(lean, scores, "arm", PAIRED) + conclude_family(equal, scores, "arm", PAIRED)
    primary = [one.name for one in (*lean[:2], *equal[:1])]
    some = scores[scores["task"].isin(learned)]
    claims += conclude_family([_on_learned(one) for one in (*lean, *equal)], some, "arm", PAIRED)
    claims += conclude_family(_of_forgetting(settings), forgotten, "arm", PAIRED, unit="nats a token")
    claims = marked(claims, *primary)
    answer = answer_of([claim for claim in claims if claim.primary])
    note = (
        f"{len(scores)} of {planned} runs that count are finished; rates were chosen on other examples than these. On "
        "tasks whose selection half chose no rate, a score is the mean of both halves of the held-out examples. Which "
        "claims are primary was decided after the scores were seen."
    )
    tables = {} if forgotten.empty else {"Forgetting": _by_arm(forgotten)}
    if scores.empty:
        return Findings(claims, tables, note=note, answer=answer)
    rest = scores[~scores["task"].isin(learned)]
    if len(rest):
        note += (
            f" Most arms are at chance on {' and '.join(map(str, rest['task'].unique()))}: the median run scores less "
            f"than {LEARNED:g} above a constant answer. These tasks are shown apart, and the figure leaves them out."
        )
        tables = {"Scores on tasks at chance": _by_task(rest).drop(columns="mean"), **tables}
    tables = {
        "Scores": _by_task(some),
        **tables,
        "Numbers, time and bytes": _costs(scores),
        "Against full finetuning": against(scores, "full"),
        "Against LoRA of rank 1": against(scores, "lora r=1"),
        "Learning rates": scores[["subject", "arm", "learning_rate"]].drop_duplicates(),
    }
    return Findings(claims, tables, {"Score against trained numbers": frontier(some, scores)}, note, answer)


def both_halves(scores: pd.DataFrame, selection_tasks: Collection[str]) -> pd.DataFrame:
    """The scores, with those on tasks where no rate was chosen as means of both halves of the held-out examples."""
    free = ~scores["task"].isin(selection_tasks)
    return scores.assign(score=scores["score"].where(~free, (scores["score"] + scores["selection_score"]) / 2))


def _contrasts(settings: Settings) -> tuple[list[Contrast], list[Contrast]]:
    """Against LoRA of at least twice as many numbers, and of about as many."""
    change = f"An interval of the difference, over tasks, that lies wholly above or below -{MARGIN}."
    kinds: tuple[tuple[tuple[tuple[str, str], ...], str, Stated], ...] = (
        (settings.lean, "at least twice as many", "changed"),
        (settings.equal, "about as many", "after"),
    )
    lean, equal = (
        [
            Contrast(
                f"{ours} against {lora}",
                f"Spectral coefficients ({ours}) score no more than {MARGIN} below LoRA ({lora}), which trains {many} "
                "numbers, averaged over tasks and seeds.",
                ours,
                lora,
                change,
                MARGIN,
                stated,
            )
            for ours, lora in pairs
        ]
        for pairs, many, stated in kinds
    )
    return lean, equal


def _on_learned(one: Contrast) -> Contrast:
    name = f"{one.name}, on tasks that were learned"
    return replace(one, name=name, text=f"On tasks that were learned: {one.text}", stated="after")


def answer_of(primary: Sequence[Claim]) -> str:
    """What the primary claims say, as one sentence; nothing where no finished run answers them."""
    parts = [
        claim.tell(
            f"{claim.name} is no more than {claim.margin:g} below: {{effect}}",
            f"{claim.name} is more than {claim.margin:g} below: {{effect}}",
            f"{claim.name} is undecided: {{effect}}",
        )
        for claim in primary
        if math.isfinite(claim.effect)
    ]
    return f"Over {primary[0].units}, {'; '.join(parts)}." if parts else ""


def forgetting(settings: Settings, results: Results) -> pd.DataFrame:
    """How the mean log-likelihood of masked tokens of the remembered text changed, as `score`; nats a token.

    A row for each finished run, with what it scored on its own task.
    """
    rows = []
    for labels, (run, asked) in _remembered(settings, results):
        tuned, kept = results.get(run), results.get(asked)
        if tuned is not None and kept is not None:
            change = kept.result["after"] - kept.result["before"]
            numbers = tuned.result["parameters_backbone"]
            rows.append({**labels, "score": change, "own_score": tuned.result["score"], "backbone": numbers})
    return pd.DataFrame(rows, columns=["subject", "arm", "task", "seed", "score", "own_score", "backbone"])


def _by_arm(forgotten: pd.DataFrame) -> pd.DataFrame:
    """Means over tasks and seeds, and the mean score on each task that was tuned to."""
    groups = forgotten.groupby(["subject", "arm"], sort=False)
    own = forgotten.pivot_table(index=["subject", "arm"], columns="task", values="own_score", sort=False)
    means = groups[["backbone", "score"]].mean().rename(columns={"score": "change of the log-likelihood"})
    return means.assign(runs=groups.size()).join(own).reset_index()


def _of_forgetting(settings: Settings) -> list[Contrast]:
    """Each spectral arm against full finetuning and LoRA, each at the rate that serves its own task best."""
    arms = settings.forgetting.arms if settings.forgetting else ()
    return [
        Contrast(
            f"forgetting, {arm.name} against {reference}",
            f"Spectral coefficients ({arm.name}) leave more of the pretraining than {reference} does.",
            arm.name,
            reference,
            "An interval of the difference, over tasks, that lies wholly on the other side of zero.",
        )
        for arm in arms
        if arm.settings["method"] == "spectral"
        for reference in ("full", "lora r=1")
    ]


def against(scores: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Each arm minus the reference over common tasks and seeds: difference, 95 % interval, and Holm's p-value."""
    rows = []
    for arm in [name for name in scores["arm"].unique() if name != reference]:
        pairs = differences(scores, "arm", arm, reference, PAIRED)
        if len(pairs):
            found, _ = compare_pairs(pairs)
            rows.append([arm, found.estimate, found.low, found.high, found.p_value, len(pairs)])
    table = pd.DataFrame(rows, columns=["arm", "difference", "low", "high", "p_value", "pairs"])
    return table.assign(p_value=holm(table["p_value"]))


def _by_task(scores: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, a column for each task, and the mean of those where an arm has all tasks."""
    wide = scores.pivot_table(index=["subject", "arm"], columns="task", values="score", sort=False)
    counts = scores.groupby(["subject", "arm"], sort=False)["seed"].nunique()
    return wide.assign(mean=wide.mean(axis=1, skipna=False), seeds=counts).reset_index()


def _costs(scores: pd.DataFrame) -> pd.DataFrame:
    """Means over runs; their precision too, as a processor without bf16 trains in float32, at another speed."""
    groups = scores.groupby(["subject", "arm"], sort=False)
    means = groups[["backbone", "head", "model", "seconds_per_step"]].mean()
    precision = groups["precision"].agg(lambda found: ", ".join(sorted({*found})))
    means = means.assign(precision=precision, adapter_bytes=groups["adapter_bytes"].mean()).reset_index()
    for part in ("backbone", "head"):
        means[f"share_{part}"] = means[part] / means["model"]
    return means.drop(columns="model")


def frontier(learned: pd.DataFrame, scores: pd.DataFrame) -> go.Figure:
    """Mean score on learned tasks of the arms that have them all, best first, against the numbers in the backbone."""
    table = _by_task(learned).merge(_costs(scores), on=["subject", "arm"]).dropna(subset=["mean"])
    figure = go.Figure()
    for subject, rows in table.sort_values("mean", ascending=False).groupby("subject", sort=False):
        for place, (arm, numbers, mean) in enumerate(zip(rows["arm"], rows["backbone"], rows["mean"], strict=True)):
            # Ten colours, then the next symbol.
            figure.add_scatter(
                x=[max(numbers, 1)], y=[mean], name=arm, mode="markers", marker={"size": 9, "symbol": place // 10},
                legendgroup=subject, legendgrouptitle={"text": subject},
            )  # fmt: skip
    return figure.update_layout(
        xaxis={"type": "log", "title": "numbers trained in the backbone"},
        yaxis={"title": "mean score over tasks that were learned"},
        height=560,
    )


EXPERIMENT = Experiment(
    "glue", QUESTION, PRESETS, plan, analyse, "How do few coefficients score beside LoRA and other methods?"
)
