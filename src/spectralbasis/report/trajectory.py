"""Findings along a training run, for the page: against the step, and against the size of the update."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spectralbasis.comparison.summary import Summary
from spectralbasis.comparison.trajectory import RunEntry, StepEntry
from spectralbasis.report.embed import plotly_text, rounded
from spectralbasis.report.figures import Figure, layout
from spectralbasis.report.sentences import CLAIMS, Claim, number
from spectralbasis.report.tables import Cell, fixed

HEADINGS = (
    "Run",
    "Step",
    "Relative step, %",
    "Stability",
    "Null",
    "Effect",
    "Coverage, %",
    "Null, %",
    "Effect, points",
)
_SYMBOLS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "triangle-down": "▼", "star": "★"}
_TITLES: dict[Claim, str] = {"stability": "Stability", "coverage": "Coverage, core"}
_SCALES: dict[str, dict[str, Any]] = {
    "step": {"title": {"text": "training step"}, "tickformat": "~s", "rangemode": "tozero"},
    "size": {"title": {"text": "‖ΔW‖ / ‖W₀‖"}, "tickformat": "~%", "rangemode": "tozero"},
}


@dataclass(frozen=True)
class Panel:
    """One chart: a claim against the step or against the relative size of the update."""

    key: str
    title: str
    claim: Claim
    against: str


PANELS = tuple(
    Panel(f"trajectory-{claim}-{against}", f"{_TITLES[claim]} by {words}", claim, against)
    for claim in CLAIMS
    for against, words in (("step", "training step"), ("size", "size of the update"))
)


def read_trajectories(summary: Summary) -> list[RunEntry]:
    """The runs of a summary that have several points."""
    return [run for run in summary.get("trajectory", []) if len(run["points"]) > 1]


def markers(runs: Sequence[RunEntry]) -> list[tuple[str, str]]:
    """The marker that each run is drawn with, and its name."""
    signs = list(_SYMBOLS.values())
    return [(signs[place % len(signs)], run["run"]) for place, run in enumerate(runs)]


def trajectory_figure(panel: Panel, runs: Sequence[RunEntry]) -> Figure:
    """What was observed at each point of each run, and its null."""
    percent = panel.claim == "coverage"
    traces = [trace for place, run in enumerate(runs) for trace in _traces(panel, run, place, percent)]
    return {
        "traces": traces,
        "layout": layout(
            _SCALES[panel.against] | {"nticks": 6},
            {"nticks": 6, "tickformat": ".3~%" if percent else ".3~f"},
            margin={"l": 44, "r": 14, "t": 8, "b": 40},
        ),
        "views": [{"traces": [{} for _ in traces], "label": _label(panel, runs)}],
    }


def _traces(panel: Panel, run: RunEntry, place: int, percent: bool) -> list[Figure]:
    points = [point for point in run["points"] if _x(panel, point) is not None]
    name = plotly_text(run["run"] or "run")
    amount = "%{y:.2~%}" if percent else "%{y:.4f}"
    shared = {
        "type": "scatter",
        "x": rounded(_x(panel, point) or 0.0 for point in points),
        "customdata": [f"{name}, step {point['step']:,}" for point in points],
        "cliponaxis": False,
    }
    symbol = list(_SYMBOLS)[place % len(_SYMBOLS)]
    return [
        shared
        | {
            "mode": "lines",
            "name": f"{name}, null",
            "y": _ys(points, panel.claim, "null_mean"),
            "line": {"color": "var(--null)", "width": 2, "dash": "dash"},
            "hovertemplate": f"%{{customdata}}: null {amount}<extra></extra>",
        },
        shared
        | {
            "mode": "lines+markers",
            "name": name,
            "y": _ys(points, panel.claim, "value"),
            "line": {"color": "var(--observed)", "width": 2.5},
            "marker": {"size": 8, "symbol": symbol},
            "hovertemplate": f"%{{customdata}}: {amount}<extra></extra>",
        },
    ]


def _x(panel: Panel, point: StepEntry) -> float | None:
    return number(point["step"] if panel.against == "step" else point["update_norm_relative"])


def _ys(points: Sequence[StepEntry], claim: Claim, key: str) -> list[float | None]:
    values = (number(point[claim].get(key)) for point in points)
    return rounded(float("nan") if value is None else value for value in values)


def _label(panel: Panel, runs: Sequence[RunEntry]) -> str:
    said = []
    for run in runs:
        first, last = run["points"][0], run["points"][-1]
        ends = (fixed(point[panel.claim].get("value"), 4).text for point in (first, last))
        said.append(f"{run['run']} goes from {' to '.join(ends)} between steps {first['step']} and {last['step']}")
    return f"Line chart. {panel.title}. {'; '.join(said)}."


def trajectory_rows(runs: Sequence[RunEntry]) -> list[list[Cell]]:
    """One row per run and step, in the order of `HEADINGS`."""
    return [
        [
            Cell(run["run"], run["run"]),
            Cell(f"{point['step']:,}", point["step"]),
            fixed(point["update_norm_relative"], 2, 100),
            *(fixed(point["stability"].get(key), 4) for key in ("value", "null_mean", "effect")),
            *(fixed(point["coverage"].get(key), 2, 100) for key in ("value", "null_mean", "effect")),
        ]
        for run in runs
        for point in run["points"]
    ]
