"""What finetuned checkpoints share, for the page: a clustered heat map, a table, sentences.

Findings along a training run, for the page: against the step, and against the size of the update.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from spectralbasis.comparison.sharing import PermutationEntry, RunEntry, SharingEntry, StepEntry
from spectralbasis.comparison.summary import Summary
from spectralbasis.report.figures import Figure, layout, shorten
from spectralbasis.report.results import plotly_text, rounded, short_names
from spectralbasis.report.sentences import CLAIMS, Cell, Claim, fixed, number, p_value

SHARING_HEADINGS = (
    "Checkpoint",
    "Checkpoint",
    "Tasks",
    "Overlap",
    "Null",
    "Excess",
    "Base with first",
    "Base with second",
    "Updates: cosine",
    "Updates: overlap",
    "Updates: unrelated",
)
_NUMBERS = (
    "value",
    "null_mean",
    "effect",
    "base_overlap_a",
    "base_overlap_b",
    "update_cosine",
    "update_overlap",
    "update_overlap_haar",
)
FEWEST_DRAWN = 3
"""Checkpoints from which on a map shows more than the table does."""
MOST_DRAWN = 400
"""Checkpoints up to which a map has cells that can be told apart."""
_OVER = {
    "different tasks": "pairs of different tasks",
    "all": "all pairs",
    "same task": "pairs of one task",
    "one run": "pairs of steps of one run",
}
_MEANING = {
    "supported": "So they share more than independent updates of their sizes would leave. Either each kept more of the "
    "base than by chance, or they moved the same way: the similarity of the updates themselves tells the two apart.",
    "contradicted": "So they share less than independent updates of their sizes would leave.",
    "undecided": "So what they have in common is what independent updates of their sizes leave of one base.",
}


@dataclass(frozen=True)
class Sharing:
    """The entry `sharing` of a summary, with the names that the page shows.

    Attributes:
        entry: as in `summary.json`.
        names: label → short name, in the summary's order.
    """

    entry: SharingEntry
    names: Mapping[str, str]

    @classmethod
    def read(cls, summary: Summary) -> "Sharing | None":
        """The sharing of a summary; None where it has none."""
        entry = summary.get("sharing")
        if not entry or not entry["pairs"]:
            return None
        labels = list(dict.fromkeys([*(pair["a"] for pair in entry["pairs"]), *(pair["b"] for pair in entry["pairs"])]))
        return cls(entry, dict(zip(labels, short_names(labels), strict=True)))

    @property
    def tested(self) -> bool:
        """Whether there is a null, so that an excess exists."""
        return self.entry["effect"] is not None

    def grid(self, key: str) -> np.ndarray:
        """One number of every pair, (t, t), symmetric, NaN on the diagonal and where a pair has none."""
        place = {label: i for i, label in enumerate(self.names)}
        grid = np.full((len(place), len(place)), np.nan)
        for pair in self.entry["pairs"]:
            value = number(pair.get(key))
            i, j = place[pair["a"]], place[pair["b"]]
            grid[i, j] = grid[j, i] = np.nan if value is None else value
        return grid


def cluster_order(likeness: np.ndarray) -> list[int]:
    """The order of checkpoints that puts alike ones side by side: average linkage on 1 − likeness.

    Args:
        likeness: (t, t), symmetric; what is NaN counts as 0.
    """
    if len(likeness) < 3:
        return list(range(len(likeness)))
    distance = 1 - np.nan_to_num(likeness)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance.clip(min=0), checks=False), "average", optimal_ordering=True)
    return [int(leaf) for leaf in leaves_list(tree)]


def sharing_figure(sharing: Sharing) -> Figure:
    """Heat map of the excess between every two checkpoints (of the overlap itself where there is no null)."""
    key = "effect" if sharing.tested else "value"
    grid = sharing.grid(key)
    order = cluster_order(grid)
    names = [list(sharing.names.values())[i] for i in order]
    grid = grid[np.ix_(order, order)]
    ticks = [plotly_text(shorten(name)) for name in names]
    axis = {"showgrid": False, "ticks": "", "showline": False, "tickvals": list(range(len(ticks))), "ticktext": ticks}
    scale = "diverging" if sharing.tested else "sequential"
    trace = {
        "type": "heatmap",
        "xgap": 2,
        "ygap": 2,
        "hoverongaps": False,
        "hovertemplate": "%{text}<extra></extra>",
        "colorscale": [[step / 4, f"var(--{scale}-{step})"] for step in range(5)],
        "colorbar": {"orientation": "h", "thickness": 8, "len": 1, "x": 0, "xanchor": "left", "y": 1, "ypad": 8}
        | {"yanchor": "bottom", "outlinewidth": 1, "outlinecolor": "var(--rule)", "ticks": "", "nticks": 5}
        | {"tickformat": ".3~g"},
    }
    return {
        "traces": [trace | ({"zmid": 0} if sharing.tested else {})],
        "layout": layout(
            axis | {"tickangle": -40}, axis | {"autorange": "reversed"}, margin={"l": 8, "r": 8, "t": 44, "b": 8}
        ),
        "views": [
            {
                "traces": [{"z": [rounded(row) for row in grid], "text": _hover(sharing, order)}],
                "label": _sharing_label(sharing, names, grid),
            }
        ],
    }


def _hover(sharing: Sharing, order: Sequence[int]) -> list[list[str]]:
    labels = [list(sharing.names)[i] for i in order]
    pairs = {frozenset((pair["a"], pair["b"])): pair for pair in sharing.entry["pairs"]}
    return [[_numbers(pairs.get(frozenset((row, column)))) for column in labels] for row in labels]


def _numbers(pair: Mapping[str, Any] | None) -> str:
    if pair is None:
        return ""
    lines = [f"<b>{plotly_text(str(pair['a']))}</b> and <b>{plotly_text(str(pair['b']))}</b>"]
    named = {"overlap": "value", "null mean": "null_mean", "excess": "effect", "cosine of updates": "update_cosine"}
    lines += [f"{name}: {fixed(pair.get(key), 4).text}" for name, key in named.items() if pair.get(key) is not None]
    return "<br>".join(lines)


def _sharing_label(sharing: Sharing, names: Sequence[str], grid: np.ndarray) -> str:
    what = "Excess of shared overlap over the null" if sharing.tested else "Shared overlap"
    found = f" From {np.nanmin(grid):.4f} to {np.nanmax(grid):.4f}." if np.isfinite(grid).any() else ""
    return f"Heat map. {what} between {len(names)} checkpoints, alike ones side by side: {', '.join(names)}.{found}"


def sharing_rows(sharing: Sharing) -> list[list[Cell]]:
    """One row per pair, in the order of `HEADINGS`."""
    return [
        [
            *(Cell(sharing.names[pair[end]], sharing.names[pair[end]]) for end in ("a", "b")),
            _tasks(pair["same_task"]),
            *(fixed(pair.get(key), 4) for key in _NUMBERS),
        ]
        for pair in sharing.entry["pairs"]
    ]


def _tasks(same: bool | None) -> Cell:
    text = "–" if same is None else "same" if same else "different"
    return Cell(text, text)


def explain_sharing(sharing: Sharing) -> list[str]:
    """The finding in sentences."""
    entry = sharing.entry
    over = _OVER[entry["over"]]
    observed = f"Averaged over {over}, the leading subspaces of two finetuned checkpoints overlap by"
    if not sharing.tested:
        return [f"{observed} {fixed(entry['value'], 4).text}. No null was drawn, so nothing tells how much is chance."]
    said = [
        f"{observed} {fixed(entry['value'], 4).text}; two independent random updates of their sizes and spectra leave "
        f"{fixed(entry['null_mean'], 4).text}. The excess is {_signed(entry['effect'])}{_sure(entry)}.",
    ]
    if entry["over"] != "one run":
        said.append(_MEANING[entry["verdict"]])
    return said


def explain_tasks(sharing: Sharing) -> list[str]:
    """The ceiling and the permutation test in sentences, where tasks are known."""
    return [*_ceiling(sharing.entry), *_permutation(sharing.entry["permutation"])]


def _ceiling(entry: SharingEntry) -> list[str]:
    ceiling = entry["ceiling"]
    if not ceiling or entry["over"] != "different tasks":
        return []
    return [
        f"The ceiling, which is the same task with other seeds, is {fixed(ceiling['value'], 4).text} "
        f"(excess {_signed(ceiling['effect'])})."
    ]


def _permutation(test: PermutationEntry | None) -> list[str]:
    if not test:
        return []
    more = "more" if test["statistic"] > 0 else "less"
    how = "all" if test["exact"] else "a sample of"
    return [
        f"Checkpoints of one task share {fixed(abs(test['statistic']), 4).text} {more} than those of different tasks: "
        f"permutation test over {how} {test['arrangements']:,} arrangements of the task labels, one-sided "
        f"{_p(test['p_value'])}."
    ]


def _sure(entry: SharingEntry) -> str:
    ends = [entry["ci_low"], entry["ci_high"]]
    if None in ends:
        return ""
    p = entry["p_value"]
    return f" (95\u00a0% interval {_signed(ends[0])} to {_signed(ends[1])}{'' if p is None else ', ' + _p(p)})"


def _p(value: float) -> str:
    text = p_value(value)
    return f"p\u00a0{text}" if text.startswith("<") else f"p\u00a0=\u00a0{text}"


def _signed(value: Any) -> str:
    found = number(value)
    return "–" if found is None else f"{found:+.4f}".replace("-", "−")


TRAJECTORY_HEADINGS = (
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
        "views": [{"traces": [{} for _ in traces], "label": _trajectory_label(panel, runs)}],
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


def _trajectory_label(panel: Panel, runs: Sequence[RunEntry]) -> str:
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
