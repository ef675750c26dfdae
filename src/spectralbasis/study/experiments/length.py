"""Does stability come with pretraining? Models that were pretrained for longer and longer on the same examples."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from spectralbasis.study.claims import Claim, Experiment, Findings, conclude_equal, counted, marked
from spectralbasis.study.estimates import clustered_interval, mean_interval
from spectralbasis.study.experiments import ladder
from spectralbasis.study.experiments.scale import pretraining_scores, task_slopes, trend_figure
from spectralbasis.study.runs import Results, Run
from spectralbasis.study.subjects import (
    BERT,
    CHANGE,
    EXCESS,
    LEARNED,
    NORM,
    SHIFT,
    SMALL_VIT,
    STABILITY,
    TINY,
    VIT,
    LabelledRun,
    Lineage,
    at_equal_norm,
    is_learned,
    measured_steps,
)
from spectralbasis.training.fitting import WARM_UP

QUESTION = (
    "After longer pretraining on the same examples, does finetuning turn the leading singular directions of a model "
    "less, where all models have moved equally far?"
)
UNIT_STEPS = 100
PER_UNIT = f"doubling of {UNIT_STEPS} + steps"
"""The unit of length: `log2(1 + steps / UNIT_STEPS)`, which no pretraining has none of."""
MARGINS = {STABILITY: 0.002, EXCESS: 0.05}
"""Slopes that count as none, per unit of length. Fixed before the runs."""
UNITS = {STABILITY: "overlap", EXCESS: "halvings of the null's rotation"}
ARM = ["lineage", "task"]
RUN = [*ARM, "steps", "seed"]


@dataclass(frozen=True)
class Settings:
    """Which models are pretrained for how long, and what is measured while they are finetuned.

    Args:
        lineages: architectures with their pretraining and the tasks they are finetuned on; sizes are not read.
        lengths: steps of pretraining, ascending, 0 first: the random weights themselves.
        seeds: of initial weights, examples, pretraining and finetuning at once.
        measured: settings of `TrajectoryCallback`, and `shares` of all steps after which it measures.
    """

    lineages: tuple[Lineage, ...]
    lengths: tuple[int, ...] = (0, 400, 1600, 6400)
    seeds: tuple[int, ...] = tuple(range(6))
    measured: Mapping[str, Any] = field(
        default_factory=lambda: {
            "leading": 16, "draws": 8, "nulls": [ladder.ENERGY], "shares": (0.05, 0.15, 0.4, 1.0),
        }
    )  # fmt: skip

    def pretrained(self, lineage: Lineage, steps: int, seed: int) -> Run | str:
        """The run that makes the model: every length has the same examples, all of which the shortest sees once."""
        if steps == 0:
            return lineage.untrained(seed)
        examples = self.lengths[1] * lineage.pretraining["batch_size"]
        return lineage.pretrained(examples, seed, steps=steps)


PRETRAINED_VIT = replace(
    VIT,
    name=SMALL_VIT.name,
    sizes=(),
    moves=dict.fromkeys(SMALL_VIT.tasks, CHANGE),
    pretraining={**VIT.pretraining, "task": "Fashion-MNIST"},
)
PRETRAINED_BERT = replace(BERT, sizes=(), moves={**BERT.moves, "WikiText-2": SHIFT})
"""Finetuned as in `scale`: in the 120 steps of `SMALL_BERT` it does not get beyond chance on SST-2."""

PRESETS = {
    "quick": Settings(
        (replace(TINY, sizes=()),),
        lengths=(0, 40),
        seeds=(0, 1),
        measured={"leading": 4, "draws": 2, "nulls": [ladder.ENERGY], "shares": (1 / 3, 1.0)},
    ),
    "cpu": Settings((PRETRAINED_VIT, PRETRAINED_BERT)),
    "paper": Settings((PRETRAINED_VIT, PRETRAINED_BERT), lengths=(0, 800, 3200, 12800), seeds=tuple(range(12))),
}


def plan(settings: Settings, results: Results) -> list[Run]:
    """Every length of pretraining, finetuned on every task, one seed of everything after another."""
    return [one.run for one in _runs(settings)]


def _runs(settings: Settings) -> Iterator[LabelledRun]:
    for seed in settings.seeds:
        for lineage in settings.lineages:
            for steps in settings.lengths:
                model = settings.pretrained(lineage, steps, seed)
                for task in lineage.moves:
                    run = lineage.finetune(model, task, seed, settings.measured)
                    yield LabelledRun(run, dict(zip(RUN, (lineage.name, task, steps, seed), strict=True)))


def analyse(settings: Settings, results: Results) -> Findings:
    """The pooled slopes of overlap and effect on the length of pretraining, and what they are made of."""
    runs = list(_runs(settings))
    steps, finished = measured_steps(runs, results)
    pretraining = pretraining_scores(_pretrainings(settings), results)
    shown = {} if pretraining.empty else {"Pretraining": pretraining}
    idle = _not_learned(steps)
    rows = _at_equal_norm(steps, idle)
    claims = _claims(rows)
    if rows.empty:
        return Findings(claims, shown, note="No finetuning that learned its task is finished yet.")
    shown |= {"Finetuning, at equal ‖ΔW‖": _means(rows, steps), "Slopes": _slopes(rows)}
    figures = {
        f"{title} by length of pretraining": trend_figure(
            rows, value, "unit", f"1 + steps of pretraining / {UNIT_STEPS}"
        )
        for value, title in {EXCESS: "Rotation avoided", STABILITY: "Overlap"}.items()
    }
    note = f"{finished} of {len(runs)} finetunings are finished. {_note(settings, rows, idle)}"
    return Findings(claims, shown, figures, note, _answer(claims))


def _not_learned(steps: pd.DataFrame) -> list[tuple[str, str]]:
    """Lineage and task where some length of pretraining left the scores at chance."""
    if steps.empty:
        return []
    scores = steps.drop_duplicates(RUN).groupby([*ARM, "steps"], sort=False)
    return sorted({
        (str(lineage), str(task))
        for (lineage, task, _), one in scores
        if not is_learned(task, one["score"], float(one["constant_score"].median()))
    })  # fmt: skip


def _at_equal_norm(steps: pd.DataFrame, idle: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """What was measured at one norm for each lineage and task that was learned, with `unit`, `1 + steps / 100`."""
    known = steps[~pd.MultiIndex.from_frame(steps[ARM]).isin(idle)] if len(steps) else steps
    if known.empty:
        return pd.DataFrame(columns=[*RUN, NORM, STABILITY, EXCESS, "unit"])
    rows = at_equal_norm(known, RUN, ARM)
    return rows.assign(unit=1 + rows["steps"] / UNIT_STEPS)


def _unit_slopes(rows: pd.DataFrame, value: str) -> pd.DataFrame:
    """The slope per unit of length of each lineage, seed and task."""
    slopes = task_slopes(rows, value, "unit")
    return slopes.assign(slope=slopes["slope"] * math.log10(2))


CLAIMS = {STABILITY: "overlap by length", EXCESS: "effect beyond energy by length"}
"""Quantity → name of its claim. Both are primary."""
TEXTS = {
    STABILITY: "The overlap of the leading directions before and after finetuning",
    EXCESS: f"How far finetuning turns the leading directions beside the null `{ladder.ENERGY}`",
}


def _claims(rows: pd.DataFrame) -> list[Claim]:
    """A slope of each quantity, pooled over tasks, seeds and architectures, and whether it is smaller than its margin.

    All that starts from one seed's weights of an architecture is one cluster.
    """
    claims = []
    for value, name in CLAIMS.items():
        text = f"{TEXTS[value]} does not depend on the length of pretraining, to within {MARGINS[value]:g} per unit."
        slopes = _unit_slopes(rows, value)
        clusters = slopes["lineage"].astype(str) + ", seed " + slopes["seed"].astype(str)
        models, seeds = (slopes[label].nunique() for label in ("lineage", "seed"))
        claims.append(
            conclude_equal(
                name, text, clustered_interval(slopes["slope"], clusters), within=MARGINS[value],
                unit=f"{UNITS[value]} per {PER_UNIT}", runs=int(rows[value].count()),
                units=f"{counted(clusters.nunique(), 'model')}: {counted(models, 'architecture')} × "
                f"{counted(seeds, 'pretraining seed')}",
            )
        )  # fmt: skip
    return marked(claims, *CLAIMS.values())


def _answer(claims: Sequence[Claim]) -> str:
    overlap, beyond = claims
    if not math.isfinite(overlap.effect):
        return ""
    more, beyond_more = ("more" if claim.effect > 0 else "less" for claim in claims)
    return overlap.tell(
        "Longer pretraining does not change the overlap of the leading directions by as much as the margin, {effect}",
        f"Longer pretraining makes the leading directions overlap {more} after finetuning, {{effect}}",
        "Whether longer pretraining changes the overlap of the leading directions is undecided, {effect}",
    ) + beyond.tell(
        "; beyond what the update's energy explains, any change is below the margin, {effect}; {units}.",
        f"; beyond what the update's energy explains, it makes them {beyond_more} stable, {{effect}}; {{units}}.",
        "; beyond what the update's energy explains, a change is undecided, {effect}; {units}.",
    )


def _means(rows: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, with the scores after the last step."""
    groups = rows.merge(steps.drop_duplicates(RUN)[[*RUN, "score"]]).groupby([*ARM, "steps"], sort=False)
    means = groups[[STABILITY, f"{STABILITY}_null", EXCESS, NORM, "score"]].mean()
    return means.assign(seeds=groups[STABILITY].count()).reset_index()


def _slopes(rows: pd.DataFrame) -> pd.DataFrame:
    """The slopes of each lineage and task over its seeds, with random weights and without."""
    table = []
    for view, some in (("all", rows), ("pretrained alone", rows[rows["steps"] > 0])):
        for value in CLAIMS:
            for (lineage, task), one in _unit_slopes(some, value).groupby(ARM, sort=False):
                found = mean_interval(one["slope"])
                table.append({
                    "lineage": lineage, "task": task, "quantity": value, "lengths": view, "slope": found.estimate,
                    "low": found.low, "high": found.high, "seeds": len(one),
                })  # fmt: skip
    return pd.DataFrame(table)


def _pretrainings(settings: Settings) -> Iterator[LabelledRun]:
    for lineage in settings.lineages:
        for steps in settings.lengths:
            for seed in settings.seeds:
                run = settings.pretrained(lineage, steps, seed)
                if steps and isinstance(run, Run):
                    labels = {"lineage": lineage.name, "task": lineage.pretraining["task"], "steps": steps}
                    yield LabelledRun(run, labels)


def _note(settings: Settings, rows: pd.DataFrame, idle: Sequence[tuple[str, str]]) -> str:
    shortest, longest = settings.lengths[1], settings.lengths[-1]
    units = math.log2(1 + longest / UNIT_STEPS)
    overlap, held = (MARGINS[value] * units for value in (STABILITY, EXCESS))
    rotation = 1 - rows.loc[rows["steps"] == 0, STABILITY].mean()
    share = f", {overlap / rotation:.0%} of the mean rotation of random weights" if rotation > 0 else ""
    left_out = ", ".join(f"{lineage} on {task}" for lineage, task in idle)
    return (
        f"A unit of length is a {PER_UNIT}, log2(1 + steps / {UNIT_STEPS}): random weights have 0, {longest:,} steps "
        f"{units:.2g}. All lengths of a seed start from the same random weights and take their batches from the same "
        f"examples, of which {shortest:,} steps see each once and {longest:,} steps {longest / shortest:g} times as "
        "often. Each length is a training of its own: the learning rate rises over the first "
        f"{WARM_UP:.0%} of its steps and falls linearly to zero, so that a shorter one is no beginning of a longer "
        "one. Equal ‖ΔW‖ is the largest mean ‖ΔW‖/‖W0‖ that every model of an architecture reached on a task, "
        "interpolated along the measured steps; runs that had passed it at the first of them are left out. Held is "
        f"against the null `{ladder.ENERGY}` of `ladder`: the update's magnitudes in the base's singular basis, with "
        f"random signs of rows and columns. Margins, fixed before the runs: {MARGINS[EXCESS]:g} halvings per unit move "
        f"the effect by {held:.2f} from random weights to the longest pretraining, where two models that `ladder` "
        f"counts as none may differ by {2 * ladder.MARGIN:.2f}; {MARGINS[STABILITY]:g} per unit moves the overlap by "
        f"{overlap:.3f}{share}. A slope is fitted for each task of each model; the pooled slope is their mean, "
        "clustered by pretraining seed × architecture (Student's t), so that its interval is about seeds of these "
        "architectures and tasks, not about other ones. The table of slopes explores each task alone, also without "
        f"random weights. A task counts where the median score is above that of a constant answer by {LEARNED:g} after "
        "every length; masked words have no constant answer, and always count."
        + (f" Left out, as they were not learned: {left_out}." if left_out else "")
    )


EXPERIMENT = Experiment("length", QUESTION, PRESETS, plan, analyse, "Does stability come with pretraining?")
