"""How far do few numbers go: recipes chosen on four tasks, and put to thirteen beside full finetuning and LoRA."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import plotly.graph_objects as go

from spectralbasis.study.claims import Claim, Experiment, Findings, conclude, marked
from spectralbasis.study.contests import Arm, Contest, compare_pairs, differences
from spectralbasis.study.experiments.glue import other, spectral
from spectralbasis.study.runs import Results, Run
from spectralbasis.study.subjects import MINILM_TASKS, ROBERTA, TINY_VIT, Subject

QUESTION = (
    "Trained on at most 0.2 % of the numbers of a model, do spectral coefficients score as well as full finetuning and "
    "as LoRA with as many numbers, and with half as many still as well as LoRA, over thirteen tasks?"
)
MARGIN = 0.01
"""Scores this far below still count as no worse; it was fixed before the runs, like the claims and the tasks."""
PAIRED = ("subject", "task", "seed")
FULL, LORA = "full", "lora r=1"


@dataclass(frozen=True)
class Settings:
    """Which recipes are tried, and where the best are compared.

    Args:
        subject: the model and all its tasks.
        references: arms that are compared on all tasks whatever they score: full finetuning and LoRA.
        recipes: spectral arms with about as many numbers as LoRA; the one with the best mean score in the search goes
            on to all tasks, with rates chosen anew at the full number of steps.
        halves: the same with at most half as many numbers.
        further: arms that follow on all tasks when those before are done, with two seeds.
        selection_tasks: on which learning rates and recipes are chosen, on examples held out of their training parts.
        search_steps: optimizer steps of a run of the search.
        seeds: of the primary arms.
    """

    subject: Subject
    references: tuple[Arm, ...]
    recipes: tuple[Arm, ...]
    halves: tuple[Arm, ...]
    further: tuple[Arm, ...] = ()
    selection_tasks: tuple[str, ...] = ("SST-2", "MRPC", "trec", "tweets_emotion")
    search_steps: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)

    def search(self, arms: tuple[Arm, ...]) -> Contest:
        """The contest on the selection tasks that chooses among recipes: few steps, and no test example is scored."""
        short = {**self.subject.settings, "steps": self.search_steps, "select_on": "train alone"}
        return Contest(replace(self.subject, settings=short), arms, self.selection_tasks, self.seeds[:1])

    def trial(self, arms: tuple[Arm, ...]) -> Contest:
        """The contest on the selection tasks, with the first seed, that chooses rates."""
        return Contest(self.subject, arms, self.selection_tasks, self.seeds[:1])

    def primary(self, results: Results) -> Contest:
        """The references and the chosen recipes, on all tasks, as far as recipes are chosen."""
        chosen = [arm for group in (self.recipes, self.halves) if (arm := best_arm(self.search(group), results))]
        return Contest(self.subject, (*self.references, *chosen), self.selection_tasks, self.seeds)

    def exploration(self, results: Results) -> Contest:
        """The further arms that are not primary, on all tasks, with two seeds."""
        known = {arm.name for arm in self.primary(results).arms}
        rest = tuple(arm for arm in self.further if arm.name not in known)
        return Contest(self.subject, rest, self.selection_tasks, self.seeds[:2])


REFERENCES = (
    other("full", (5e-5, 2e-4, 5e-4)),
    other("lora", (2e-3, 5e-3, 1.5e-2), LORA, rank=1),
)
BAND = spectral("band of all", (3e-3, 1e-2, 3e-2), coefficients="band", leading=384)
CORE = spectral("core k=33", (1e-3, 3e-3, 1e-2), coefficients="core", leading=33)
DIAGONAL = spectral("diagonal of all", (3e-3, 1e-2, 3e-2), coefficients="diagonal", leading=384)
RECIPES = (
    BAND,
    CORE,
    spectral("core k=33, relative to singular values", (3e-4, 1e-3, 3e-3), coefficients="core", leading=33,
             scaling="relative"),
    spectral("blocks of 3", (3e-3, 1e-2, 3e-2), coefficients="block", leading=384, block_size=3),
    spectral("rotations of 5", (3e-3, 1e-2, 3e-2), coefficients="rotation", leading=384, block_size=5,
             scaling="normalized"),
    spectral("diagonal of all and biases", (3e-3, 1e-2, 3e-2), coefficients="diagonal", leading=384, also=["biases"]),
    spectral("sparse, by calibration", (3e-3, 1e-2, 3e-2), coefficients="sparse", leading=128, budget=0.00185),
)  # fmt: skip
"""At width 384 LoRA of rank 1 trains 42,240 numbers in the 37 matrices, a band over all directions 42,550, cores of
33 directions 40,293, blocks of 3 42,624, rotations in blocks of 5 42,550, a diagonal and the biases 35,328, sparse ones
42,023."""
HALVES = (
    DIAGONAL,
    spectral("band of 190", (3e-3, 1e-2, 3e-2), coefficients="band", leading=190),
    spectral("core k=23", (1e-3, 3e-3, 1e-2), coefficients="core", leading=23),
    spectral("rotations of pairs", (3e-3, 1e-2, 3e-2), coefficients="rotation", leading=380, block_size=2,
             scaling="normalized"),
)  # fmt: skip
"""14,208, 21,016, 19,573 and 21,090 numbers."""
FURTHER = (
    other("head", (2e-2, 5e-2, 1e-1)),
    other("bitfit", (1e-3, 3e-3, 1e-2)),
    other("lora", (5e-4, 2e-3, 5e-3), "lora r=8", rank=8),
    other("psoft", (2e-3, 5e-3, 1.5e-2), "psoft core k=33", rank=33),
    BAND,
    CORE,
    DIAGONAL,
)
TINY = Settings(
    TINY_VIT,
    (other("full", (3e-3,)), other("lora", (1e-2,), LORA, rank=1)),
    (spectral("core k=8", (1e-2, 3e-2), coefficients="core", leading=8),
     spectral("band of all", (3e-2,), coefficients="band", leading=32)),
    (spectral("diagonal of all", (3e-2,), coefficients="diagonal", leading=32),),
    selection_tasks=TINY_VIT.tasks[:1],
    search_steps=6,
    seeds=(0, 1),
)  # fmt: skip
LARGE = Settings(
    replace(ROBERTA, settings={**ROBERTA.settings, "select_on": "train"}),
    (other("full", (1e-5, 2e-5, 5e-5)), other("lora", (2e-4, 5e-4, 1e-3), LORA, rank=1)),
    (
        spectral("band of all", (1e-3, 4e-3, 1e-2), coefficients="band", leading=768),
        spectral("core k=48", (1e-3, 4e-3, 1e-2), coefficients="core", leading=48),
    ),
    (
        spectral("diagonal of all", (1e-2, 5e-2, 1e-1), coefficients="diagonal", leading=768),
        spectral("band of 384", (1e-3, 4e-3, 1e-2), coefficients="band", leading=384),
        spectral("core k=33", (1e-3, 4e-3, 1e-2), coefficients="core", leading=33),
    ),
    selection_tasks=("SST-2", "MRPC", "CoLA", "STS-B"),
)
"""At width 768 LoRA of rank 1 trains 165,888 numbers in the 72 matrices, a band 165,744, cores of 48 directions
165,888."""
PRESETS = {"quick": TINY, "cpu": Settings(MINILM_TASKS, REFERENCES, RECIPES, HALVES, FURTHER), "paper": LARGE}


def best_arm(contest: Contest, results: Results) -> Arm | None:
    """The arm whose best rate scores highest on the selection examples; None until all its runs are done."""
    means = {arm.name: contest.selection_mean(arm, results) for arm in contest.arms}
    if any(mean is None for mean in means.values()):
        return None
    return max(contest.arms, key=lambda arm: means[arm.name] or 0.0)


def plan(settings: Settings, results: Results) -> list[Run]:
    """The search, rates of the references, then the primary arms seed by seed, then what is exploration."""
    search = settings.search((*settings.recipes, *settings.halves)).trials(results)
    return [*search, *settings.primary(results).plan(results), *settings.exploration(results).plan(results)]


def analyse(settings: Settings, results: Results) -> Findings:
    """The three primary claims over all tasks, what recipes scored, and scores by task of all arms."""
    contest = settings.primary(results)
    primary = contest.scores(results)
    explored = settings.exploration(results).scores(results)
    scores = pd.concat([table for table in (primary, explored) if len(table)] or [primary], ignore_index=True)
    planned = contest.size
    note = (
        f"{len(primary)} of {planned} primary runs are finished. Recipes, in runs of {settings.search_steps} steps, "
        "and then learning rates, in runs of full length, were chosen on examples held out of the training parts of "
        f"{', '.join(settings.selection_tasks)}; scores are those of the whole test sets."
    )
    tables = {"Recipes on the selection examples": recipes(settings, results)}
    if scores.empty:
        return Findings(_claims(settings, results, primary), tables, note=note)
    at_chance = chance_tasks(scores, results, settings)
    shown = scores[~scores["task"].isin(at_chance)]
    learned = [task for task in settings.subject.tasks if task not in at_chance]
    tables |= {"Scores": _by_task(shown, learned), "Learning rates": scores[["arm", "learning_rate"]].drop_duplicates()}
    if at_chance:
        tables["Tasks on which every arm is at chance"] = _by_task(scores[scores["task"].isin(at_chance)], at_chance)
    figures = {"Score against trained numbers": figure(shown, learned)} if len(shown) else {}
    return Findings(_claims(settings, results, primary[~primary["task"].isin(at_chance)]), tables, figures, note)


def _claims(settings: Settings, results: Results, scores: pd.DataFrame) -> list[Claim]:
    recipe, half = (best_arm(settings.search(group), results) for group in (settings.recipes, settings.halves))
    names = [arm.name if arm else "not chosen yet" for arm in (recipe, half)]
    wanted = (
        ("not below full finetuning", names[0], FULL,
         "The best spectral recipe of at most 0.2 % of the numbers scores no more than {margin} below full "
         "finetuning, averaged over tasks."),
        ("not below LoRA of equal size", names[0], LORA,
         "The best spectral recipe scores no more than {margin} below LoRA with as many numbers, averaged over tasks."),
        ("half the numbers of LoRA", names[1], LORA,
         "The best spectral recipe with at most half of LoRA's numbers scores no more than {margin} below it, averaged "
         "over tasks."),
    )  # fmt: skip
    claims = []
    for name, ours, theirs, text in wanted:
        pairs = differences(scores, "arm", ours, theirs, PAIRED)
        found, units = compare_pairs(pairs)
        claim = conclude(
            f"{name} ({ours} against {theirs})", text.format(margin=MARGIN), found, unit="score", runs=2 * len(pairs),
            would_change=f"An interval of the difference, over tasks, that lies wholly above or below -{MARGIN}.",
            units=units, margin=MARGIN,
        )  # fmt: skip
        claims.append(claim)
    return marked(claims, *(claim.name for claim in claims))


def recipes(settings: Settings, results: Results) -> pd.DataFrame:
    """Each arm at each learning rate that was tried: the mean score on the selection examples, and what was trained."""
    primary = settings.primary(results)
    contests = (
        ("reference", settings.trial(settings.references)),
        ("recipe", settings.search(settings.recipes)),
        ("half", settings.search(settings.halves)),
        ("chosen", settings.trial(primary.arms[len(settings.references) :])),
    )
    rows = []
    for group, contest in contests:
        steps = contest.subject.settings.get("steps")
        for arm in contest.arms:
            for rate in contest.tried_rates(arm, results):
                runs = [arm.run(contest.subject, task, rate, contest.seeds[0]) for task in contest.selection_tasks]
                records = [record for run in runs if (record := results.get(run)) is not None]
                if len(records) == len(runs):
                    means = pd.DataFrame([record.result for record in records])
                    score, numbers = means["selection_score"].mean(), means["parameters_backbone"].mean()
                    best = rate == contest.chosen_rate(arm, results)
                    rows.append([group, arm.name, steps, rate, score, numbers, best])
    return pd.DataFrame(rows, columns=["group", "arm", "steps", "learning_rate", "selection_score", "backbone", "best"])


def chance_tasks(scores: pd.DataFrame, results: Results, settings: Settings) -> list[str]:
    """Tasks on which no arm's mean score is above the best constant answer, by more than a hundredth."""
    best = scores.groupby(["task", "arm"])["score"].mean().groupby("task").max()
    constant = {}
    for labels, run in settings.primary(results).counted(results):
        record = results.get(run)
        if record is not None and "constant_score" in record.result:
            constant[labels["task"]] = float(record.result["constant_score"])
    return [task for task in settings.subject.tasks if task in best and task in constant
            and best[task] <= constant[task] + 0.01]  # fmt: skip


def _by_task(scores: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    """Means over seeds, a column for each task, and the mean of those where an arm has all tasks."""
    wide = scores.pivot_table(index="arm", columns="task", values="score", sort=False).reindex(columns=list(tasks))
    groups = scores.groupby("arm", sort=False)
    numbers, seeds = groups["backbone"].mean(), groups["seed"].nunique()
    return wide.assign(mean=wide.mean(axis=1, skipna=False), backbone=numbers, seeds=seeds).reset_index()


def figure(scores: pd.DataFrame, tasks: Sequence[str]) -> go.Figure:
    """Mean score of the arms that have all tasks against the numbers trained in the backbone."""
    table = _by_task(scores, tasks).dropna(subset=["mean"]).sort_values("mean", ascending=False)
    drawn = go.Figure()
    for arm, numbers, mean in zip(table["arm"], table["backbone"], table["mean"], strict=True):
        drawn.add_scatter(x=[max(numbers, 1)], y=[mean], name=arm, mode="markers", marker={"size": 9})
    return drawn.update_layout(
        xaxis={"type": "log", "title": "numbers trained in the backbone"}, yaxis={"title": "mean score over tasks"}
    )


EXPERIMENT = Experiment("frontier", QUESTION, PRESETS, plan, analyse, "How far do few numbers go?")
