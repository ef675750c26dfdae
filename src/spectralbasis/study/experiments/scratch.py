"""Is it pretraining that makes the leading singular directions stable, or the architecture and the task alone?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from spectralbasis.comparison.statistics import Interval
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
from spectralbasis.study.estimates import paired_comparison
from spectralbasis.study.experiments import scale
from spectralbasis.study.runs import Results, Run
from spectralbasis.study.subjects import (
    BERT,
    EXCESS,
    MINILM_LINEAGE,
    NORM,
    ROBERTA_LINEAGE,
    STABILITY,
    TINY,
    VIT,
    VIT_BASE,
    LabelledRun,
    Lineage,
    at_equal_norm,
    at_last_step,
    is_learned,
    measured_steps,
)

QUESTION = (
    "Does a pretrained model keep its leading singular directions better than the identical architecture does from "
    "random weights, or from weights that it learned on the task alone, also where both have moved equally far?"
)

PRETRAINED = "pretrained"
RANDOM = "random weights"
FAST = "random weights at a higher rate"
LEARNED = "weights learned on the task alone"
STARTS = (PRETRAINED, RANDOM, FAST, LEARNED)


@dataclass(frozen=True)
class Settings:
    """Which architectures are trained from which starts.

    Args:
        lineages: of each, the largest size of pretraining is taken.
        scratch_rates: name of a lineage → the learning rate that suits random weights.
        seeds: of weights and of training.
        measured: as for `scale`, so that both take the same runs.
    """

    lineages: tuple[Lineage, ...]
    scratch_rates: Mapping[str, float]
    seeds: tuple[int, ...]
    measured: Mapping[str, Any]

    @classmethod
    def beside(cls, preset: str, scratch_rates: Mapping[str, float], *lineages: Lineage) -> "Settings":
        """On these lineages, with what a preset of `scale` measures."""
        other = scale.PRESETS[preset]
        return cls(lineages, scratch_rates, other.seeds, other.measured)


PRESETS = {
    "quick": Settings.beside("quick", {TINY.name: 1e-2}, TINY),
    "cpu": Settings.beside(
        "cpu", {VIT.name: 1e-3, BERT.name: 2e-3, MINILM_LINEAGE.name: 1e-3}, VIT, BERT, MINILM_LINEAGE
    ),
    "paper": Settings.beside("paper", {ROBERTA_LINEAGE.name: 2e-4, VIT_BASE.name: 5e-4}, ROBERTA_LINEAGE, VIT_BASE),
}

ARM = ["lineage", "task", "seed"]
RUN = [*ARM, "start"]
UNITS = {STABILITY: "overlap", EXCESS: "halvings of the null's rotation"}


def plan(settings: Settings, results: Results) -> list[Run]:
    """Every architecture from every start on every task, one seed of everything after another."""
    return [one.run for one in _runs(settings)]


def _runs(settings: Settings) -> Iterator[LabelledRun]:
    for seed in settings.seeds:
        for lineage in settings.lineages:
            for task in lineage.moves:
                for start in STARTS:
                    run = _run(settings, lineage, task, seed, start)
                    yield LabelledRun(run, dict(zip(RUN, (lineage.name, task, seed, start), strict=True)))


def _run(settings: Settings, lineage: Lineage, task: str, seed: int, start: str) -> Run:
    """One training. What was learned on the task alone is trained on it again, as the pretrained model is."""
    if start == PRETRAINED:
        return lineage.finetune(lineage.pretrained(lineage.sizes[-1], seed), task, seed, settings.measured)
    untrained = lineage.untrained(seed)
    if start == RANDOM:
        return lineage.finetune(untrained, task, seed, settings.measured)
    rate = settings.scratch_rates[lineage.name]
    learned = lineage.finetune(untrained, task, seed, settings.measured, learning_rate=rate)
    return learned if start == FAST else lineage.finetune(learned, task, seed, settings.measured)


@dataclass(frozen=True)
class _Question:
    """The pretrained start against another."""

    other: str
    value: str
    equal_norm: bool

    @property
    def view(self) -> str:
        return "at equal ‖ΔW‖" if self.equal_norm else "at equal steps"


QUESTIONS = (
    _Question(RANDOM, STABILITY, False),
    _Question(RANDOM, STABILITY, True),
    _Question(RANDOM, EXCESS, True),
    _Question(FAST, EXCESS, True),
    _Question(LEARNED, STABILITY, True),
    _Question(LEARNED, EXCESS, True),
)
PRIMARY = (0, 1, 5)
"""Numbers of the primary ones of `QUESTIONS`."""
DOES = {
    STABILITY: ("more stable", "keeps its leading directions better"),
    EXCESS: ("more held", "avoids more of the rotation that a scrambled update would bring"),
}


def analyse(settings: Settings, results: Results) -> Findings:
    """Pretrained minus every other start, and the tables that this is taken from."""
    runs = list(_runs(settings))
    steps, finished = measured_steps(runs, results)
    if not finished:
        nothing = as_family(_claim(question, []) for question in QUESTIONS)
        return Findings(nothing, note="No run is finished yet.")
    last = at_last_step(steps, RUN)
    pairs = {question: _pairs(question, steps, last) for question in QUESTIONS}
    idle = _idle(last)
    weighed = {
        question: [pair for pair in found if (pair["lineage"], pair["task"], question.other) not in idle]
        for question, found in pairs.items()
    }
    claims = as_family(_claim(question, found) for question, found in weighed.items())
    claims = marked(claims, *(_name(QUESTIONS[number]) for number in PRIMARY))
    shown = {"Starts": _means(last), "Pretrained minus other starts": _differences(pairs)}
    note = f"{finished} of {len(runs)} trainings are finished. {NOTE}"
    if idle:
        listed = "; ".join(f"{lineage} on {task} from {start}" for lineage, task, start in sorted(idle))
        note += f" Controls that learned nothing carry no weight in the claims: {listed}."
    figures = {"Rotation avoided by size of the update": _figure(steps)}
    return Findings(claims, shown, figures, note, _answer(claims))


def _idle(last: pd.DataFrame) -> set[tuple[str, str, str]]:
    """Lineage, task and start of those that score no better than chance."""
    groups = last.groupby(["lineage", "task", "start"], sort=False)["score"]
    return {(str(a), str(b), str(c)) for (a, b, c), scores in groups if not is_learned(b, scores)}


def _answer(claims: Sequence[Claim]) -> str:
    steps, norm = claims[:2]
    return steps.tell(
        "At equal steps a pretrained model keeps its leading directions better than random weights do, {effect}",
        "At equal steps a pretrained model keeps its leading directions worse than random weights do, {effect}",
        "Whether a pretrained model keeps its leading directions better than random weights do is undecided at equal "
        "steps, {effect}",
    ) + norm.tell(
        ", and better where both have moved equally far, {effect}; both over {units}.",
        ", and worse where both have moved equally far, {effect}; both over {units}.",
        ", as it is where both have moved equally far, {effect}; both over {units}.",
    )


def _pairs(question: _Question, steps: pd.DataFrame, last: pd.DataFrame) -> list[dict[str, Any]]:
    """The pretrained value and the other's, for each lineage, task and seed that has both."""
    both = [PRETRAINED, question.other]
    rows = last[last["start"].isin(both)]
    if question.equal_norm:
        paths = steps[steps["start"].isin(both)]
        complete = paths.groupby(ARM)["start"].transform("nunique") == len(both)
        rows = at_equal_norm(paths[complete], RUN, ARM) if complete.any() else paths[complete]
    wide = rows.pivot(index=ARM, columns="start", values=question.value)
    if not set(both) <= set(wide):
        return []
    found = wide[both].dropna().rename(columns=dict(zip(both, ("pretrained", "other"), strict=True))).reset_index()
    return [{str(name): value for name, value in row.items()} for row in found.to_dict("records")]


def _difference(pairs: list[dict[str, Any]]) -> Interval:
    """Tasks of an architecture are the units: their seeds were averaged."""
    tasks = [f"{pair['lineage']} / {pair['task']}" for pair in pairs]
    return paired_comparison([pair["pretrained"] for pair in pairs], [pair["other"] for pair in pairs], tasks)


def _claim(question: _Question, pairs: list[dict[str, Any]]) -> Claim:
    does = DOES[question.value][1]
    tasks = pd.DataFrame(pairs, columns=["lineage", "task"])
    return conclude(
        _name(question),
        f"A pretrained model {does} than the identical architecture with {question.other}, {question.view}.",
        _difference(pairs),
        unit=UNITS[question.value],
        would_change="As much without pretraining: then the architecture and the task alone make for stability.",
        runs=2 * len(pairs),
        units=task_units(tasks, "lineage"),
        stated="changed",
    )


def _name(question: _Question) -> str:
    return f"pretrained {DOES[question.value][0]} than {question.other}, {question.view}"


def _differences(pairs: Mapping[_Question, list[dict[str, Any]]]) -> pd.DataFrame:
    """Pretrained minus another start, for each task of each architecture, with its interval over seeds."""
    table = []
    for question, found in pairs.items():
        frame = pd.DataFrame(found, columns=[*ARM, "pretrained", "other"])
        for (lineage, task), rows in frame.groupby(["lineage", "task"], sort=False):
            gap = paired_comparison(rows["pretrained"], rows["other"])
            labels = {"lineage": lineage, "task": task, "other start": question.other, "compared": question.view}
            values = {"pretrained": rows["pretrained"].mean(), "other": rows["other"].mean()}
            interval = {"difference": gap.estimate, "low": gap.low, "high": gap.high, "p": gap.p_value}
            table.append({**labels, "quantity": question.value, **values, **interval, "seeds": len(rows)})
    return pd.DataFrame(table)


def _means(last: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, after the last step."""
    wanted = ("score", STABILITY, "overlap_null", EXCESS, NORM, "matched_cosine", "core_gain", "diagonal_gain")
    groups = last.groupby(["lineage", "task", "start"], sort=False)
    shown = [name for name in wanted if name in last]
    return groups[shown].mean().assign(seeds=groups["seed"].nunique()).reset_index()


def _figure(steps: pd.DataFrame) -> go.Figure:
    traces = (
        {"x": rows[NORM], "y": rows[EXCESS], "name": f"{lineage}, {start}", "marker": {"size": 6}}
        for (lineage, start), rows in steps.groupby(["lineage", "start"], sort=False)
    )
    return scatter_figure(traces, "‖ΔW‖ / ‖W0‖", UNITS[EXCESS], log="x")


NOTE = (
    "All starts take as many steps on the same examples; the pretrained model, the random weights and what was learned "
    "on the task alone train at one learning rate, and random weights at a higher one that suits them too. Equal ‖ΔW‖ "
    "is the smaller of the two mean ‖ΔW‖/‖W0‖ of a pair, interpolated along the measured steps. Intervals: Student's t "
    "over tasks, whose seeds were averaged first. " + CHOSEN_AFTER
)


EXPERIMENT = Experiment("scratch", QUESTION, PRESETS, plan, analyse, "Is it pretraining that makes directions stable?")
