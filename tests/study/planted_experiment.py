"""An experiment for tests of the frame: the best of three values is tried again with other seeds."""

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from spectralbasis.study.claims import Claim, Experiment, Findings
from spectralbasis.study.runs import Results, Run

QUESTION = "Is the <best> value above zero?"


@dataclass(frozen=True)
class Settings:
    values: tuple[int, ...]
    refuses: str = ""


PRESETS = {"quick": Settings((1, 3, 2)), "cpu": Settings((1, 2), refuses="no such <task>")}


def plan(settings: Settings, results: Results) -> list[Run]:
    first = [_run(value, 0) for value in settings.values]
    known = [record.result["total"] for run in first if (record := results.get(run))]
    if settings.refuses:
        first.append(_run(9, 0, refuses=settings.refuses))
    return first if len(known) < len(settings.values) else first + [_run(max(known), seed) for seed in (1, 2)]


def analyse(settings: Settings, results: Results) -> Findings:
    found = [(run, record) for run in plan(settings, results) if (record := results.get(run))]
    claim = Claim(
        name="above zero", text="The best value is above zero.", verdict="supported" if found else "undecided",
        effect=max((record.result["total"] for _, record in found), default=float("nan")), low=0.5, high=3.5,
        p_value=0.01, unit="points", would_change="A value below.", runs=len(found),
        units=f"{len(found)} <values>", primary=True,
    )  # fmt: skip
    table = pd.DataFrame({"value|": [record.result["total"] for _, record in found], "who": "<b>a|b</b>"})
    return Findings([claim], {"All values": table}, {"Values": go.Figure(go.Scatter(y=[1, 2]))}, "A note.")


def _run(value: int, seed: int, **more: str) -> Run:
    return Run("tests.study.runs.planted:act", {"value": value, **more}, seed)


EXPERIMENT = Experiment("planted", QUESTION, PRESETS, plan, analyse)
