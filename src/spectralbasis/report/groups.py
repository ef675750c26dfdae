"""What several checkpoints show together on the page: what they share, and the course of a training run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spectralbasis.comparison.sharing import RunEntry, SharingEntry
from spectralbasis.comparison.summary import Summary
from spectralbasis.report.figures import COLOURBAR, HEATMAP, Figure, colour_scale, layout, shorten
from spectralbasis.report.results import plotly_text, rounded, short_names
from spectralbasis.report.sentences import CLAIMS, Cell, Claim, fixed, p_phrase

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
    "supported": "So they share more than independent updates of the same sizes would. Either each kept more of the "
    "base than expected by chance, or they moved the same way: the similarity of the updates shows which.",
    "contradicted": "So they share less than independent updates of the same sizes would.",
    "undecided": "So what they share does not differ measurably from what independent updates of the same sizes would "
    "share.",
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
            value = pair.get(key)
            i, j = place[pair["a"]], place[pair["b"]]
            grid[i, j] = grid[j, i] = np.nan if value is None else value
        return grid


def cluster_order(likeness: np.ndarray) -> list[int]:
    """The order of checkpoints that puts similar ones side by side: average linkage on 1 − likeness.

    Args:
        likeness: (t, t), symmetric; what is NaN counts as 0.
    """
    if len(likeness) < 3:
        return list(range(len(likeness)))
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

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
    trace = HEATMAP | {
        "colorscale": colour_scale("diverging" if sharing.tested else "sequential"),
        "colorbar": COLOURBAR | {"nticks": 5, "tickformat": ".3~g"},
    }
    what = "Excess of shared overlap over the null" if sharing.tested else "Shared overlap"
    found = f" From {np.nanmin(grid):.4f} to {np.nanmax(grid):.4f}." if np.isfinite(grid).any() else ""
    return {
        "traces": [trace | ({"zmid": 0} if sharing.tested else {})],
        "layout": layout(
            axis | {"tickangle": -40}, axis | {"autorange": "reversed"}, margin={"l": 8, "r": 8, "t": 44, "b": 8}
        ),
        "views": [
            {
                "traces": [{"z": [rounded(row) for row in grid], "text": _hover(sharing, order)}],
                "label": f"Heat map. {what} between {len(names)} checkpoints, similar ones side by side: "
                f"{', '.join(names)}.{found}",
            }
        ],
    }


def _hover(sharing: Sharing, order: Sequence[int]) -> list[list[str]]:
    """The numbers of each cell's pair, as lines."""
    shown = {"overlap": "value", "null mean": "null_mean", "excess": "effect", "cosine of updates": "update_cosine"}
    texts = {}
    for pair in sharing.entry["pairs"]:
        lines = [f"<b>{plotly_text(pair['a'])}</b> and <b>{plotly_text(pair['b'])}</b>"]
        numbers = {name: pair.get(key) for name, key in shown.items()}
        lines += [f"{name}: {fixed(value, 4).text}" for name, value in numbers.items() if value is not None]
        texts[frozenset((pair["a"], pair["b"]))] = "<br>".join(lines)
    labels = [list(sharing.names)[i] for i in order]
    return [[texts.get(frozenset((row, column)), "") for column in labels] for row in labels]


def sharing_rows(sharing: Sharing) -> list[list[Cell]]:
    """One row per pair, in the order of `SHARING_HEADINGS`."""
    tasks = {None: "–", True: "same", False: "different"}
    return [
        [
            *(Cell(sharing.names[pair[end]], sharing.names[pair[end]]) for end in ("a", "b")),
            Cell(tasks[pair["same_task"]], tasks[pair["same_task"]]),
            *(fixed(pair.get(key), 4) for key in _NUMBERS),
        ]
        for pair in sharing.entry["pairs"]
    ]


def explain_sharing(sharing: Sharing) -> list[str]:
    """The finding in sentences."""
    entry = sharing.entry
    over = _OVER[entry["over"]]
    observed = f"Averaged over {over}, the leading subspaces of two finetuned checkpoints overlap by"
    if not sharing.tested:
        return [f"{observed} {fixed(entry['value'], 4).text}. There is no null, so the share due to chance is unknown."]
    sure, p = "", entry["p_value"]
    if entry["ci_low"] is not None and entry["ci_high"] is not None:
        ends = f"{_signed(entry['ci_low'])} to {_signed(entry['ci_high'])}"
        sure = f" (95\u00a0% interval {ends}{'' if p is None else ', ' + p_phrase(p)})"
    said = [
        f"{observed} {fixed(entry['value'], 4).text}; two independent updates under the null leave "
        f"{fixed(entry['null_mean'], 4).text}. The excess is {_signed(entry['effect'])}{sure}.",
    ]
    if entry["over"] != "one run":
        said.append(_MEANING[entry["verdict"]])
    return said


def explain_tasks(sharing: Sharing) -> list[str]:
    """The ceiling and the permutation test in sentences, where tasks are known."""
    ceiling, test, said = sharing.entry["ceiling"], sharing.entry["permutation"], []
    if ceiling and sharing.entry["over"] == "different tasks":
        said.append(
            f"The ceiling (the same task with other seeds) is {fixed(ceiling['value'], 4).text} (excess "
            f"{_signed(ceiling['effect'])})."
        )
    if test:
        said.append(
            f"Checkpoints of one task share {fixed(abs(test['statistic']), 4).text} "
            f"{'more' if test['statistic'] > 0 else 'less'} than those of different tasks: permutation test over "
            f"{'all' if test['exact'] else 'a sample of'} {test['arrangements']:,} arrangements of the task labels, "
            f"one-sided {p_phrase(test['p_value'])}."
        )
    return said


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}".replace("-", "−")


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
class RunPanel:
    """One chart: a claim against the step or against the relative size of the update."""

    key: str
    title: str
    claim: Claim
    against: str


RUN_PANELS = tuple(
    RunPanel(f"trajectory-{claim}-{against}", f"{_TITLES[claim]} by {words}", claim, against)
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


def trajectory_figure(panel: RunPanel, runs: Sequence[RunEntry]) -> Figure:
    """What was observed at each point of each run, and its null."""
    percent = panel.claim == "coverage"
    traces = [trace for place, run in enumerate(runs) for trace in _traces(panel, run, place, percent)]
    said = []
    for run in runs:
        first, last = run["points"][0], run["points"][-1]
        ends = (fixed(point[panel.claim].get("value"), 4).text for point in (first, last))
        said.append(f"{run['run']} goes from {' to '.join(ends)} between steps {first['step']} and {last['step']}")
    return {
        "traces": traces,
        "layout": layout(
            _SCALES[panel.against] | {"nticks": 6},
            {"nticks": 6, "tickformat": ".3~%" if percent else ".3~f"},
            margin={"l": 44, "r": 14, "t": 8, "b": 40},
        ),
        "views": [{"traces": [{} for _ in traces], "label": f"Line chart. {panel.title}. {'; '.join(said)}."}],
    }


def _traces(panel: RunPanel, run: RunEntry, place: int, percent: bool) -> list[Figure]:
    key = "step" if panel.against == "step" else "update_norm_relative"
    points: list[Any] = [point for point in run["points"] if dict(point)[key] is not None]
    name = plotly_text(run["run"] or "run")
    ys = {
        key: [np.nan if point[panel.claim][key] is None else point[panel.claim][key] for point in points]
        for key in ("value", "null_mean")
    }
    amount = "%{y:.2~%}" if percent else "%{y:.4f}"
    shared = {
        "type": "scatter",
        "x": rounded(point[key] for point in points),
        "customdata": [f"{name}, step {point['step']:,}" for point in points],
        "cliponaxis": False,
    }
    symbol = list(_SYMBOLS)[place % len(_SYMBOLS)]
    return [
        shared
        | {
            "mode": "lines",
            "name": f"{name}, null",
            "y": rounded(ys["null_mean"]),
            "line": {"color": "var(--null)", "width": 2, "dash": "dash"},
            "hovertemplate": f"%{{customdata}}: null {amount}<extra></extra>",
        },
        shared
        | {
            "mode": "lines+markers",
            "name": name,
            "y": rounded(ys["value"]),
            "line": {"color": "var(--observed)", "width": 2.5},
            "marker": {"size": 8, "symbol": symbol},
            "hovertemplate": f"%{{customdata}}: {amount}<extra></extra>",
        },
    ]


def trajectory_rows(runs: Sequence[RunEntry]) -> list[list[Cell]]:
    """One row per run and step, in the order of `TRAJECTORY_HEADINGS`."""
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
