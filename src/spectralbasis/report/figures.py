"""The figures of the page as plain dictionaries for Plotly, and the numbers that they show.

A colour is written `var(--name)`, and the script of the page inserts the value from the style sheet. A figure has
`traces`, a `layout` and `views` (the data for each selection). The script draws the heat map and the spectra from the
embedded grids, so their figures hold only the style.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from spectralbasis.report.results import Measure, Results, category_positions, plotly_text, rounded, with_mean

_CARRIED = 400_000
_FEWEST_DIRECTIONS = 16


@dataclass(frozen=True)
class Spectra:
    """`base`, `low`, `high` of shape (matrices, directions), `tuned` of shape (selections, matrices, directions).

    With several checkpoints the first selection is their mean, and `low` to `high` their range. Where all of it would
    be too much to carry, that mean is the only selection, and `directions` are spaced evenly in their logarithm.
    """

    directions: np.ndarray
    base: np.ndarray
    tuned: np.ndarray
    low: np.ndarray
    high: np.ndarray


def spectra(results: Results, matrices: pd.Series, carried: int = _CARRIED) -> Spectra | None:
    """The leading singular values of `matrices` in every checkpoint; None where the comparison has none."""
    rows = results.spectra
    if rows.empty:
        return None
    depth = int(rows["index"].max()) + 1
    most = max(carried // (4 * len(matrices)), _FEWEST_DIRECTIONS)
    directions = np.arange(depth)
    if depth > most:
        directions = np.unique(np.geomspace(1, depth, most).round().astype(int)) - 1
    rows = rows[rows["index"].isin(directions)]
    every = (len(results.tuned), len(matrices), len(directions))
    where = (
        category_positions(rows["tuned"], results.tuned),
        category_positions(rows["matrix"], matrices),
        np.searchsorted(directions, rows["index"].to_numpy()),
    )
    is_base = (rows["metric"] == "singular_value_base").to_numpy()
    base, tuned = np.full(every[1:], np.nan), np.full(every, np.nan)
    base[where[1][is_base], where[2][is_base]] = rows["value"][is_base]
    tuned[tuple(axis[~is_base] for axis in where)] = rows["value"][~is_base]
    low, high = np.fmin.reduce(tuned), np.fmax.reduce(tuned)
    selections = with_mean(tuned)
    return Spectra(directions, base, selections if selections.size <= carried else selections[:1], low, high)


SMALLEST = 1e-12
"""Where the bands end below, so that a logarithmic scale can show them."""


def panel_curves(results: Results, measure: Measure) -> list[pd.DataFrame]:
    """One curve per selection: all checkpoints together where there are several, then each of them.

    A curve holds means over matrices, at each k (its index) that at least half of them reach: columns `count, value,
    low, high` (the middle 80 % of matrices), `null_mean, null_low, null_high` (two standard deviations of a typical
    matrix: the median of theirs) and `unrelated`.
    """
    rows = measure.rows(results.measurements)
    rows = rows.assign(unrelated=measure.unrelated(rows["k"], rows["m"], rows["n"]))
    each = _aggregate(rows, ["tuned", "k"])
    single = [_well_founded(each[each["tuned"] == name]) for name in results.tuned]
    return single if len(single) == 1 else [_well_founded(_aggregate(rows, ["k"])), *single]


def _aggregate(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    groups = rows.groupby(keys, observed=True)
    means = groups[["value", "null_mean", "unrelated"]].mean()
    spread = 2 * groups["null_std"].median()
    return means.assign(
        count=groups.size(),
        low=groups["value"].quantile(0.1).clip(lower=SMALLEST),
        high=groups["value"].quantile(0.9),
        null_low=(means["null_mean"] - spread).clip(lower=SMALLEST),
        null_high=(means["null_mean"] + spread).clip(upper=1),
    ).reset_index()


def _well_founded(curve: pd.DataFrame) -> pd.DataFrame:
    return curve[curve["count"] >= curve["count"].max() / 2].set_index("k")


Figure = dict[str, Any]

_AXIS = {
    "gridcolor": "var(--grid)",
    "linecolor": "var(--axis)",
    "tickcolor": "var(--axis)",
    "zeroline": False,
    "spikecolor": "var(--axis)",
    "spikethickness": -1,
    "spikedash": "solid",
    "ticks": "outside",
    "ticklen": 4,
    "automargin": True,
    "fixedrange": True,
}


def layout(x: dict[str, Any], y: dict[str, Any], **more: Any) -> Figure:
    """What all figures share, with their axes' particulars."""
    return {
        "font": {"family": "var(--font)", "size": 12, "color": "var(--ink-soft)"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 44, "r": 10, "t": 8, "b": 40},
        "showlegend": False,
        "dragmode": False,
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "var(--surface)",
            "bordercolor": "var(--axis)",
            "font": {"family": "var(--font)", "size": 12, "color": "var(--ink)"},
            "align": "left",
            "namelength": -1,
        },
        "xaxis": _AXIS | x,
        "yaxis": _AXIS | y,
    } | more


def curve_figure(measure: Measure, curves: Sequence[pd.DataFrame], selections: Sequence[str]) -> Figure:
    """A metric against k with the null's band; one view per selection.

    An overlap is drawn zoomed on what was observed and its null, with `full` as its whole range; a coverage, which
    grows as a power of k, on logarithmic scales.
    """
    ks = sorted({int(k) for curve in curves for k in curve.index})
    ticks = {"tickvals": ks, "ticktext": [str(k) for k in ks]}
    x = {"type": "log", "title": {"text": "k"}, "showgrid": False, "unifiedhovertitle": {"text": "k = %{x}"}} | ticks
    y = {"type": "log", "tickformat": "~%", "dtick": 1} if measure.percent else {"tickformat": ".3~f", "nticks": 6}
    figure = {
        "traces": _curve_traces(".2~%" if measure.percent else ".4f"),
        "layout": layout(x, y, hovermode="x unified"),
        "views": [_curve_view(measure, curve, name) for curve, name in zip(curves, selections, strict=True)],
    }
    return figure if measure.percent else figure | {"full": [0.0, 1.02]}


def _curve_traces(number: str) -> list[Figure]:
    line = {"type": "scatter", "mode": "lines"}
    band = line | {"fill": "toself", "line": {"width": 0}, "hoverinfo": "skip"}
    return [
        band | {"name": "null ± 2 sd", "fillcolor": "var(--null-band)"},
        band | {"name": "middle 80 %", "fillcolor": "var(--observed-band)"},
        line
        | {
            "name": "unrelated",
            "line": {"color": "var(--haar)", "width": 1.5, "dash": "dot"},
            "hovertemplate": f"unrelated %{{y:{number}}}<extra></extra>",
        },
        line
        | {
            "name": "null",
            "line": {"color": "var(--null)", "width": 2, "dash": "dash"},
            "hovertemplate": f"null %{{y:{number}}}<extra></extra>",
        },
        line
        | {
            "name": "observed",
            "mode": "lines+markers",
            "line": {"color": "var(--observed)", "width": 2.5},
            "marker": {"size": 6},
            "hovertemplate": f"observed %{{y:{number}}} (%{{customdata}} measurements)<extra></extra>",
        },
    ]


def _curve_view(measure: Measure, curve: pd.DataFrame, selection: str) -> Figure:
    k = [int(size) for size in curve.index]
    nulled = curve[curve["null_mean"].notna()]
    traces = [
        _band(nulled, "null_low", "null_high"),
        _band(curve, "low", "high"),
        {"x": k, "y": rounded(curve["unrelated"])},
        {"x": k, "y": rounded(curve["null_mean"])},
        {"x": k, "y": rounded(curve["value"]), "customdata": [int(count) for count in curve["count"]]},
    ]
    if curve.empty:
        label = f"{measure.title}, {selection}: no measurements"
    else:
        last, number = curve.iloc[-1], "{:.3%}" if measure.percent else "{:.4f}"
        null = "" if pd.isna(last["null_mean"]) else f", null {number.format(last['null_mean'])}"
        value = number.format(last["value"])
        label = f"Line chart. {measure.title}, {selection}. At k = {curve.index[-1]}: observed {value}{null}."
    return {"traces": traces, "range": _zoom(curve, measure.percent), "label": label}


def _band(curve: pd.DataFrame, low: str, high: str) -> Figure:
    k = [int(size) for size in curve.index]
    return {"x": k + k[::-1], "y": rounded(curve[high]) + rounded(curve[low])[::-1]}


def _zoom(curve: pd.DataFrame, logarithmic: bool) -> list[float | None]:
    names = ["value", "null_mean", "unrelated"] if logarithmic else ["value", "low", "high", "null_low", "null_high"]
    shown = np.concatenate([curve[name].to_numpy() for name in names])
    shown = shown[np.isfinite(shown) & (shown > 0)]
    if not shown.size:
        return [0.0, 1.0]
    if logarithmic:
        return rounded([np.log10(shown.min()) - 0.5, np.log10(shown.max()) + 0.3])
    pad = 0.06 * np.ptp(shown) or 0.02
    return rounded([max(shown.min() - pad, 0), shown.max() + pad])


def heatmap_figure() -> Figure:
    """The looks of the heat map of matrices; the script fills in rows, columns and values."""
    return {
        "traces": [HEATMAP],
        "layout": layout(
            {"title": {"text": "layer"}, "showgrid": False, "ticks": "", "showline": False},
            {"autorange": "reversed", "showgrid": False, "ticks": "", "showline": False},
            margin={"l": 8, "r": 8, "t": 44, "b": 40},
        ),
        "scales": {
            "sequential": colour_scale("sequential"),
            "diverging": colour_scale("diverging"),
        },
    }


def colour_scale(name: str) -> list[list[Any]]:
    """The five colours of a scale of the style sheet."""
    return [[step / 4, f"var(--{name}-{step})"] for step in range(5)]


COLOURBAR: Figure = {
    "orientation": "h",
    "thickness": 8,
    "len": 1,
    "x": 0,
    "xanchor": "left",
    "y": 1,
    "yanchor": "bottom",
    "ypad": 8,
    "outlinewidth": 1,
    "outlinecolor": "var(--rule)",
    "ticks": "",
    "nticks": 6,
}
HEATMAP: Figure = {
    "type": "heatmap",
    "xgap": 2,
    "ygap": 2,
    "hoverongaps": False,
    "hovertemplate": "%{text}<extra></extra>",
    "colorbar": COLOURBAR,
}


def heatmap_cells(matrices: pd.DataFrame) -> Figure:
    """Where each matrix stands: labels of `rows` (kinds; also `short` ones) and `columns` (layers), and `cells`.

    A cell holds the matrix's place, or -1. Two matrices of one layer and kind (an encoder's and a decoder's) get rows
    by their full names, the layer starred.
    """
    shared = matrices.duplicated(["layer", "kind"], keep=False)
    named = zip(matrices["matrix"], matrices["layer"], matrices["kind"], shared, strict=True)
    rows = [_starred(name, layer) if ambiguous else kind or name for name, layer, kind, ambiguous in named]
    row_names, column_names = list(dict.fromkeys(rows)), sorted(set(matrices["layer"]))
    cells = [[-1] * len(column_names) for _ in row_names]
    for place, (row, layer) in enumerate(zip(rows, matrices["layer"], strict=True)):
        cells[row_names.index(row)][column_names.index(layer)] = place
    return {
        "rows": [plotly_text(name) for name in row_names],
        "short": [plotly_text(shorten(name)) for name in row_names],
        "columns": ["none" if layer < 0 else str(layer) for layer in column_names],
        "cells": cells,
    }


def shorten(name: str, most: int = 16) -> str:
    """The end of a name that is too long for an axis."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _starred(name: str, layer: int) -> str:
    return ".".join("*" if part == str(layer) else part for part in name.split("."))


def spectrum_figures() -> tuple[Figure, Figure]:
    """The looks of one matrix's singular values before and after, and of their relative change."""
    line = {"type": "scatter", "mode": "lines+markers", "marker": {"size": 4}}
    band = {"type": "scatter", "mode": "lines", "fill": "toself", "line": {"width": 0}, "hoverinfo": "skip"}
    base = line | {
        "name": "base",
        "line": {"color": "var(--null)", "width": 2, "dash": "dash"},
        "hovertemplate": "base %{y:.4g}<extra></extra>",
    }
    tuned = line | {
        "name": "finetuned",
        "line": {"color": "var(--observed)", "width": 2},
        "hovertemplate": "finetuned %{y:.4g}<extra></extra>",
    }
    change = tuned | {"name": "change", "hovertemplate": "%{y:+.3~%}<extra></extra>"}
    direction = {
        "title": {"text": "direction"},
        "showgrid": False,
        "rangemode": "tozero",
        "unifiedhovertitle": {"text": "direction %{x}"},
    }
    return (
        {
            "traces": [band | {"fillcolor": "var(--observed-band)"}, base, tuned],
            "layout": layout(direction, {"nticks": 6, "rangemode": "tozero"}, hovermode="x unified"),
        },
        {
            "traces": [band | {"fillcolor": "var(--observed-band)"}, change],
            "layout": layout(
                direction,
                {"nticks": 6, "tickformat": "+.2~%", "zeroline": True, "zerolinecolor": "var(--axis)"},
                hovermode="x unified",
            ),
        },
    )


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
        "views": [{"traces": [{} for _ in traces], "label": _tuning_label(rows, task)}],
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


def _tuning_label(rows: pd.DataFrame, task: str) -> str:
    runs = zip(rows["label"], rows["score"], rows["parameters_backbone"], strict=True)
    scores = "; ".join(f"{label} {score:.3f} with {count:,}" for label, score, count in runs)
    return f"Scatter chart. {task}: score by trained backbone parameters. {scores}."
