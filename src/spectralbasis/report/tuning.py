"""The scores of tuned adapters, as one chart per task."""

import pandas as pd

from spectralbasis.report.embed import plotly_text, rounded
from spectralbasis.report.figures import Figure, layout

_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "star", "hexagon", "pentagon")


def with_labels(rows: pd.DataFrame) -> pd.DataFrame:
    """The runs with a column `label`: the method and, where it has them, its kind of coefficients."""
    kinds = rows["coefficients"].fillna("").astype(str)
    return rows.assign(label=(rows["method"].astype(str) + " " + kinds).str.strip())


def tuning_figure(rows: pd.DataFrame, task: str) -> Figure:
    """Score against trained backbone parameters (log) for one task; what trains none is a horizontal line."""
    rows = rows[rows["task"] == task]
    trained, untrained = rows[rows["parameters_backbone"] > 0], rows[rows["parameters_backbone"] == 0]
    traces = [_points(place, label, part) for place, (label, part) in enumerate(_by_label(trained))]
    lines = [_score_line(label, float(part["score"].mean())) for label, part in _by_label(untrained)]
    low, high = rows["score"].min(), rows["score"].max()
    pad = 0.12 * (high - low) or 0.02
    return {
        "traces": traces,
        "layout": layout(
            {"type": "log", "title": {"text": "trained backbone parameters"}, "dtick": 1, "tickformat": "~s"},
            {"nticks": 6, "tickformat": ".3~f", "range": rounded([low - pad, high + pad])},
            shapes=[shape for shape, _ in lines],
            annotations=[note for _, note in lines],
            showlegend=True,
            legend={"orientation": "h", "y": -0.34, "yanchor": "top", "x": 0, "bgcolor": "rgba(0,0,0,0)"},
        ),
        "views": [{"traces": [{} for _ in traces], "label": _label(rows, task)}],
    }


def _by_label(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(str(label), part) for label, part in rows.groupby("label", sort=False)]


def _points(place: int, label: str, rows: pd.DataFrame) -> Figure:
    name = plotly_text(label)
    ours = bool((rows["method"] == "spectral").all())
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [int(count) for count in rows["parameters_backbone"]],
        "y": rounded(rows["score"]),
        "cliponaxis": False,
        "marker": {
            "size": 10,
            "symbol": _SYMBOLS[place % len(_SYMBOLS)],
            "color": "var(--observed)" if ours else "var(--null)",
            "line": {"width": 0},
        },
        "customdata": [name] * len(rows),
        "hovertemplate": "%{customdata}: %{y:.4~f} with %{x:,} parameters<extra></extra>",
    }


def _score_line(label: str, score: float) -> tuple[Figure, Figure]:
    line = {"color": "var(--haar)", "width": 1.5, "dash": "dot"}
    shape = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": score, "y1": score, "line": line}
    place = {"xref": "paper", "x": 1, "xanchor": "right", "y": score, "yanchor": "bottom", "showarrow": False}
    return shape, place | {"text": f"{plotly_text(label)}: {score:.3f}, no backbone parameter"}


def _label(rows: pd.DataFrame, task: str) -> str:
    runs = zip(rows["label"], rows["score"], rows["parameters_backbone"], strict=True)
    scores = "; ".join(f"{label} {score:.3f} with {count:,}" for label, score, count in runs)
    return f"Scatter chart. {task}: score by trained backbone parameters. {scores}."
