"""Do leading directions serve better than trailing or random ones, with tasks and random draws crossed?"""

import math
from dataclasses import dataclass, replace

import pandas as pd
import plotly.graph_objects as go

from spectralbasis.comparison.statistics import Interval
from spectralbasis.study.claims import Claim, Experiment, Findings, conclude_equal, counted, marked
from spectralbasis.study.contests import COEFFICIENTS, Arm, Contest, differences
from spectralbasis.study.estimates import clustered_interval
from spectralbasis.study.runs import Results, Run
from spectralbasis.study.subjects import MINILM_TASKS, ROBERTA, TINY_VIT, Subject

QUESTION = (
    "At equal numbers of coefficients, do the leading singular directions of a model serve better than its trailing "
    "ones, and than random ones, over twelve tasks and five random draws?"
)
WITHIN = 0.01
"""Mean scores that differ by less count as equal; fixed before the runs, like the tasks, the draws and the claims."""
LEADING, TRAILING, RANDOM = "pretrained", "minor", "random"


@dataclass(frozen=True)
class Cell:
    """A kind of coefficients with their number, and the learning rates among which every basis chooses.

    Args:
        name: in tables.
        mode: of coefficients.
        k: directions in each matrix.
        learning_rates: see `Arm`.
        bases: that are compared with the leading directions; the diagonal of all directions has no trailing ones.
    """

    name: str
    mode: str
    k: int
    learning_rates: tuple[float, ...]
    bases: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """What is crossed.

    Args:
        subject: the model and its tasks.
        cells: each a contest of its own.
        selection_tasks: see `Contest`.
        seeds: of training, each with a random draw of its own.
    """

    subject: Subject
    cells: tuple[Cell, ...]
    selection_tasks: tuple[str, ...]
    seeds: tuple[int, ...]

    def contest(self, cell: Cell) -> Contest:
        """The arms of one cell: the leading directions, and the other bases."""
        settings = {**COEFFICIENTS, "coefficients": cell.mode, "leading": cell.k}
        arms = tuple(
            Arm(
                basis,
                settings if basis == LEADING else {**settings, "basis": basis},
                cell.learning_rates,
                drawn="basis_seed" if basis == RANDOM else "",
            )
            for basis in (LEADING, *cell.bases)
        )
        return Contest(self.subject, arms, self.selection_tasks, self.seeds)


CELLS = (
    Cell("core k=33", "core", 33, (1e-3, 3e-3, 1e-2), (RANDOM, TRAILING)),
    Cell("diagonal of all", "diagonal", 384, (3e-3, 1e-2, 3e-2), (RANDOM,)),
)
TWELVE = replace(MINILM_TASKS, tasks=tuple(task for task in MINILM_TASKS.tasks if task != "RTE"))
"""No method gets above chance on RTE in so few steps."""
PRESETS = {
    "quick": Settings(
        TINY_VIT,
        (Cell("diagonal k=8", "diagonal", 8, (3e-2,), (RANDOM, TRAILING)),),
        TINY_VIT.tasks[:1],
        (0, 1),
    ),
    "cpu": Settings(TWELVE, CELLS, ("SST-2", "MRPC", "trec", "tweets_emotion"), (0, 1, 2, 3, 4)),
    "paper": Settings(
        ROBERTA,
        (
            Cell("core k=48", "core", 48, (1e-3, 4e-3, 1e-2), (RANDOM, TRAILING)),
            Cell("diagonal of all", "diagonal", 768, (1e-2, 5e-2, 1e-1), (RANDOM,)),
        ),
        ("SST-2", "MRPC", "CoLA", "STS-B"),
        (0, 1, 2, 3, 4),
    ),
}
CLAIMS = (
    ("leading equals random", RANDOM, "random ones"),
    ("leading equals trailing", TRAILING, "the trailing ones"),
)
PAIRED = ("subject", "cell", "task", "seed")


def plan(settings: Settings, results: Results) -> list[Run]:
    """One cell after another, each with its trials of learning rates first."""
    return [run for cell in settings.cells for run in settings.contest(cell).plan(results)]


def analyse(settings: Settings, results: Results) -> Findings:
    """Equivalence of leading with random and with trailing directions, over tasks and draws."""
    cells = [settings.contest(cell).scores(results).assign(cell=cell.name) for cell in settings.cells]
    scores = pd.concat(cells, ignore_index=True).infer_objects()
    planned = sum(settings.contest(cell).size for cell in settings.cells)
    claims = [_claim(name, other, words, scores) for name, other, words in CLAIMS]
    claims = marked(claims, *(claim.name for claim in claims))
    note = (
        f"{len(scores)} of {planned} runs that count are finished. Every seed of training has a random basis of its "
        "own. Errors are clustered by task and by seed (Cameron, Gelbach & Miller): runs of one task, and of one "
        "draw, are not independent."
    )
    if scores.empty:
        return Findings(claims, note=note, answer=_answer(claims))
    tables = {
        "Differences by task": _by_task(scores),
        "Scores": scores.pivot_table(index=["cell", "arm"], columns="task", values="score", sort=False).reset_index(),
        "Learning rates": scores[["cell", "arm", "learning_rate"]].drop_duplicates(),
    }
    return Findings(claims, tables, {"Leading minus other directions, by task": _figure(scores)}, note, _answer(claims))


def crossed(scores: pd.DataFrame, other: str) -> tuple[Interval, str, int]:
    """Mean of leading minus another basis over tasks and draws, what it is over, and how many runs that takes."""
    pairs = differences(scores, "arm", LEADING, other, PAIRED)
    found = clustered_interval(pairs["better"] - pairs["worse"], pairs["task"], pairs["seed"])
    what = "draw" if other == RANDOM else "seed"
    units = f"{counted(pairs['task'].nunique(), 'task')} × {counted(pairs['seed'].nunique(), what)}"
    return found, units, 2 * len(pairs)


def _claim(name: str, other: str, words: str, scores: pd.DataFrame) -> Claim:
    found, units, runs = crossed(scores, other)
    text = f"At equal numbers of coefficients, leading directions and {words} differ by less than {WITHIN} in score."
    return conclude_equal(name, text, found, within=WITHIN, unit="score", runs=runs, units=units)


def _answer(claims: list[Claim]) -> str:
    first = claims[0]
    if not math.isfinite(first.effect):
        return "No finished run answers this yet."
    return first.tell(
        f"Leading and random directions serve equally well, to within {WITHIN}: {{effect}}; {{units}}.",
        f"Leading and random directions differ by more than {WITHIN}: {{effect}}; {{units}}.",
        f"Whether leading and random directions differ by more than {WITHIN} is undecided: {{effect}}; {{units}}.",
    )


def _by_task(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean differences over seeds: a row for each cell and basis, a column for each task."""
    pairs = [differences(scores, "arm", LEADING, other, PAIRED).assign(against=other) for other in (RANDOM, TRAILING)]
    table = pd.concat(pairs, ignore_index=True)
    table["difference"] = table["better"] - table["worse"]
    wide = table.pivot_table(index=["cell", "against"], columns="task", values="difference", sort=False)
    return wide.assign(mean=wide.mean(axis=1)).reset_index()


def _figure(scores: pd.DataFrame) -> go.Figure:
    table = _by_task(scores)
    figure = go.Figure()
    for _, row in table.iterrows():
        tasks = row.drop(["cell", "against", "mean"])
        figure.add_scatter(x=tasks.index, y=tasks.values, mode="markers", name=f"{row['cell']}, {row['against']}")
    return figure.update_layout(xaxis={"title": "task"}, yaxis={"title": "leading minus other, score"})


EXPERIMENT = Experiment("crossed", QUESTION, PRESETS, plan, analyse, "Does the basis matter?")
