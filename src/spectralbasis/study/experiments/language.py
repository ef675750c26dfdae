"""A small causal language model by arm: what it makes of text that it was not trained on, after tuning to its kind."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from spectralbasis.comparison.statistics import Interval
from spectralbasis.study.claims import Claim, Experiment, Findings, conclude, counted, marked, scatter_figure
from spectralbasis.study.contests import Arm, Contest, differences
from spectralbasis.study.estimates import paired_comparison
from spectralbasis.study.experiments.frontier import best_arm
from spectralbasis.study.experiments.glue import answer_of, other, spectral
from spectralbasis.study.runs import Results, Run
from spectralbasis.study.subjects import Subject, pretrained

QUESTION = (
    "Does the spectral recipe reach the held-out perplexity of LoRA with as many numbers, and of full finetuning, when "
    "a small causal language model is tuned to other text?"
)
MARGIN = 0.01
"""Nats a token: a perplexity 1 % higher still counts as no worse; fixed before the runs, like the claims."""
PAIRED = ("subject", "task", "seed")
FULL, LORA, BAND = "full", "lora r=1", "band of all"
UNTUNED = other("full", (1e-12,), "untuned", steps=1)
"""One step too small to change a score."""


@dataclass(frozen=True)
class Settings:
    """What is compared, and on what.

    Args:
        subject: a causal language model and texts; learning rates are chosen on passages held out of their training
            parts, and scores are those of all their held-out passages.
        arms: that are compared; `FULL`, `LORA` and `BAND` among them.
        halves: names of the spectral arms of at most half of LoRA's numbers; the one with the best mean score on the
            passages for selection is compared with LoRA.
        longer: optimizer steps of further runs of these three, with the first seed and the rates that were chosen: is a
            difference one of too few steps?
        seeds: of the order of passages; the first chooses the rates.
    """

    subject: Subject
    arms: tuple[Arm, ...]
    halves: tuple[str, ...]
    longer: int
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def contest(self) -> Contest:
        """All arms on all texts."""
        return Contest(self.subject, self.arms, self.subject.tasks, self.seeds)

    @property
    def untuned(self) -> Contest:
        """What the model scores as it comes."""
        return Contest(self.subject, (UNTUNED,), self.subject.tasks, self.seeds[:1])

    def extended(self, results: Results) -> Contest:
        """`FULL`, `LORA` and `BAND` with more steps, as far as their rates are known."""
        wanted = [(arm, self.contest.chosen_rate(arm, results)) for arm in self.arms if arm.name in (FULL, LORA, BAND)]
        arms = tuple(replace(arm, learning_rates=(rate,)) for arm, rate in wanted if rate is not None)
        subject = replace(self.subject, settings={**self.subject.settings, "steps": self.longer})
        return Contest(subject, arms, subject.tasks, self.seeds[:1])

    def half(self, results: Results) -> str:
        """Which arm of at most half of LoRA's numbers is compared with it."""
        arms = tuple(arm for arm in self.arms if arm.name in self.halves)
        chosen = best_arm(replace(self.contest, arms=arms), results)
        return chosen.name if chosen else "not chosen yet"


STORIES = Subject(
    "stories260K",
    Run("initialise", {"architecture": "stories260K"}),
    ("Shakespeare", "novels"),
    {"steps": 300, "batch_size": 8, "max_length": 64, "select_on": "train"},
)
"""Passages of 40 words have some 130 tokens of its vocabulary of 512; the first 64 are read."""
ARMS = (
    other("full", (1e-3, 3e-3, 1e-2)),
    other("lora", (3e-3, 1e-2, 3e-2), LORA, rank=1),
    spectral(BAND, (1e-2, 3e-2, 1e-1), coefficients="band", leading=64),
    spectral("core k=12", (1e-2, 3e-2, 1e-1), coefficients="core", leading=12),
    spectral("diagonal of all", (1e-2, 3e-2, 1e-1), coefficients="diagonal", leading=64),
    spectral("band of 28", (1e-2, 3e-2, 1e-1), coefficients="band", leading=28),
    other("lora", (3e-3, 1e-2, 3e-2), "lora r=8", rank=8),
)
"""In its 35 matrices LoRA of rank 1 trains 5,780 numbers, a band over all directions 5,690, cores of 12 directions
5,040, a diagonal 1,920, a band of 28 directions 2,870, LoRA of rank 8 46,240; all are 260,032."""
TINY = Settings(
    Subject(
        "tiny Llama (descriptions)",
        pretrained("llama-tiny", "descriptions", steps=20, batch_size=8, max_length=32, learning_rate=3e-3),
        ("descriptions",),
        {"steps": 6, "batch_size": 4, "max_length": 32, "select_on": "train"},
    ),
    (
        other("full", (1e-3,)),
        other("lora", (1e-2,), LORA, rank=1),
        spectral(BAND, (3e-2,), coefficients="band", leading=32),
        spectral("diagonal of all", (3e-2,), coefficients="diagonal", leading=32),
    ),
    ("diagonal of all",),
    longer=12,
    seeds=(0, 1),
)
"""The smallest that shows something, from built-in data."""
LONG = replace(
    STORIES,
    tasks=("Shakespeare", "novels", "WikiText-2"),
    settings={**STORIES.settings, "steps": 3000, "batch_size": 16, "max_length": 128},
)
HALVES = ("diagonal of all", "band of 28")
PRESETS = {
    "quick": TINY,
    "cpu": Settings(STORIES, ARMS, HALVES, longer=600),
    "paper": Settings(LONG, ARMS, HALVES, longer=12000, seeds=(0, 1, 2, 3, 4)),
}


def plan(settings: Settings, results: Results) -> list[Run]:
    """The model as it comes, trials of learning rates, the runs that count, seed by seed, and those of more steps."""
    contests = (settings.untuned, settings.contest, settings.extended(results))
    return [run for contest in contests for run in contest.plan(results)]


def compare_seeds(pairs: pd.DataFrame) -> tuple[Interval, str]:
    """The mean difference, each seed's averaged over the tasks: too few tasks are here to say anything of others."""
    seeds, tasks = pairs["seed"].nunique(), pairs["task"].nunique()
    found = paired_comparison(pairs["better"], pairs["worse"], pairs["seed"])
    return found, f"{counted(seeds, 'seed')}, each over {counted(tasks, 'task')}"


def analyse(settings: Settings, results: Results) -> Findings:
    """The three primary claims, perplexities by text, and how far each arm is from full finetuning and LoRA."""
    contest = settings.contest
    scores = contest.scores(results)
    before = settings.untuned.scores(results)
    claims = _claims(settings, results, scores)
    note = (
        f"{len(scores)} of {contest.size} runs that count are finished. A score is the mean log-likelihood of the "
        "tokens of held-out passages, in nats a token: minus the logarithm of the perplexity, so that larger is "
        f"better, and a difference of {MARGIN} is a perplexity about {MARGIN:.0%} lower or higher. Learning rates were "
        "chosen on passages held out of the training parts. The intervals are over seeds, which decide the order of "
        f"the training passages: they say nothing of texts other than {' and '.join(settings.subject.tasks)}, nor of "
        f"other models. All runs that count have {contest.subject.settings['steps']} steps; the table of more steps "
        f"tells, for one seed at the same rates, what {settings.longer} steps give. Before the steps, the rates to try "
        "and the arm of half the numbers were fixed, a first trial had shown scores on Shakespeare."
    )
    if scores.empty:
        return Findings(claims, note=note)
    tables = {
        "Perplexity on held-out passages": perplexities(scores, before),
        "Differences by text": by_text(scores, settings.half(results)),
        "More steps": more_steps(settings, results),
        "Learning rates": scores[["arm", "learning_rate"]].drop_duplicates(),
    }
    figures = {"Perplexity against trained numbers": figure(scores, before)}
    return Findings(claims, tables, figures, note, answer_of(claims))


def _claims(settings: Settings, results: Results, scores: pd.DataFrame) -> list[Claim]:
    half = settings.half(results)
    wanted = (
        (BAND, LORA,
         "A band over all directions has a mean log-likelihood no more than {margin} nats a token below that of LoRA "
         "with as many numbers."),
        (half, LORA,
         "The best spectral arm of at most half of LoRA's numbers has a mean log-likelihood no more than {margin} nats "
         "a token below it."),
        (BAND, FULL,
         "A band over all directions has a mean log-likelihood no more than {margin} nats a token below that of full "
         "finetuning."),
    )  # fmt: skip
    claims = []
    for ours, theirs, text in wanted:
        pairs = differences(scores, "arm", ours, theirs, PAIRED)
        found, units = compare_seeds(pairs)
        claim = conclude(
            f"{ours} against {theirs}", text.format(margin=MARGIN), found, unit="nats a token",
            would_change=f"An interval of the difference, over seeds, that lies wholly above or below -{MARGIN}.",
            runs=2 * len(pairs), units=units, margin=MARGIN, stated="changed",
        )  # fmt: skip
        claims.append(claim)
    return marked(claims, *(claim.name for claim in claims))


def perplexities(scores: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """For each arm, and the model as it comes, the perplexity on each text (of the mean score over seeds), and costs.

    `score` is the mean over texts, in nats a token.
    """
    rows = pd.concat([table for table in (before, scores) if len(table)], ignore_index=True)
    means = rows.pivot_table(index="arm", columns="task", values="score", sort=False)
    groups = rows.groupby("arm", sort=False)
    costs = groups[["backbone", "seconds_per_step"]].mean().assign(seeds=groups["seed"].nunique())
    table = (-means).apply(np.exp).assign(score=means.mean(axis=1, skipna=False)).join(costs)
    table.loc[UNTUNED.name : UNTUNED.name, ["backbone", "seconds_per_step"]] = math.nan
    return table.reset_index()


def by_text(scores: pd.DataFrame, half: str) -> pd.DataFrame:
    """Each claim's difference on each text, in nats a token, with its 95 % interval over seeds."""
    rows = []
    for ours, theirs in ((BAND, LORA), (half, LORA), (BAND, FULL)):
        for task, pairs in differences(scores, "arm", ours, theirs, PAIRED).groupby("task", sort=False):
            found, _ = compare_seeds(pairs)
            rows.append([ours, theirs, task, found.estimate, found.low, found.high, len(pairs)])
    return pd.DataFrame(rows, columns=["arm", "against", "task", "difference", "low", "high", "pairs"])


def more_steps(settings: Settings, results: Results) -> pd.DataFrame:
    """Scores with the first seed by number of steps, in nats a token, each text a column."""
    tables = []
    for contest in (settings.contest, settings.extended(results)):
        scores = contest.scores(results).assign(steps=contest.subject.settings["steps"])
        tables.append(scores[scores["arm"].isin([FULL, LORA, BAND]) & (scores["seed"] == settings.seeds[0])])
    rows = pd.concat([table for table in tables if len(table)] or tables, ignore_index=True)
    return rows.pivot_table(index=["arm", "steps"], columns="task", values="score", sort=False).reset_index()


def figure(scores: pd.DataFrame, before: pd.DataFrame) -> go.Figure:
    """Perplexity, the geometric mean over texts, against the numbers trained in the backbone."""
    table = perplexities(scores, before).dropna(subset=["score", "backbone"])
    traces = [
        {"x": [numbers], "y": [math.exp(-mean)], "name": arm, "marker": {"size": 9}}
        for arm, numbers, mean in zip(table["arm"], table["backbone"], table["score"], strict=True)
    ]
    return scatter_figure(traces, "numbers trained in the backbone", "mean perplexity", log="xy")


EXPERIMENT = Experiment(
    "language", QUESTION, PRESETS, plan, analyse, "How well does a tuned language model predict held-out text?"
)
