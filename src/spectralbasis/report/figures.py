"""Plotly figures as plain dictionaries.

A colour is written `var(--name)`: the page's script puts the style sheet's value there, anew when the scheme changes.
A figure has `traces` and a `layout`, and `views`: per selection what replaces the traces' data. The heat map and the
spectra are drawn by the script from the embedded grids, so theirs hold the looks only.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from spectralbasis.report.curves import Panel
from spectralbasis.report.embed import plotly_text, rounded

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


def curve_figure(panel: Panel, curves: Sequence[pd.DataFrame], selections: Sequence[str]) -> Figure:
    """A metric against k with the null's band; one view per selection.

    An overlap is drawn zoomed on what was observed and its null, with `full` as its whole range; a coverage, which
    grows as a power of k, on logarithmic scales.
    """
    ks = sorted({int(k) for curve in curves for k in curve.index})
    ticks = {"tickvals": ks, "ticktext": [str(k) for k in ks]}
    x = {"type": "log", "title": {"text": "k"}, "showgrid": False, "unifiedhovertitle": {"text": "k = %{x}"}} | ticks
    y = {"type": "log", "tickformat": "~%", "dtick": 1} if panel.percent else {"tickformat": ".3~f", "nticks": 6}
    figure = {
        "traces": _curve_traces(".2~%" if panel.percent else ".4f"),
        "layout": layout(x, y, hovermode="x unified"),
        "views": [_curve_view(panel, curve, name) for curve, name in zip(curves, selections, strict=True)],
    }
    return figure if panel.percent else figure | {"full": [0.0, 1.02]}


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


def _curve_view(panel: Panel, curve: pd.DataFrame, selection: str) -> Figure:
    k = [int(size) for size in curve.index]
    nulled = curve[curve["null_mean"].notna()]
    traces = [
        _band(nulled, "null_low", "null_high"),
        _band(curve, "low", "high"),
        {"x": k, "y": rounded(curve["unrelated"])},
        {"x": k, "y": rounded(curve["null_mean"])},
        {"x": k, "y": rounded(curve["value"]), "customdata": [int(count) for count in curve["count"]]},
    ]
    return {"traces": traces, "range": _zoom(curve, panel.percent), "label": _label(panel, curve, selection)}


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


def _band(curve: pd.DataFrame, low: str, high: str) -> Figure:
    k = [int(size) for size in curve.index]
    return {"x": k + k[::-1], "y": rounded(curve[high]) + rounded(curve[low])[::-1]}


def _label(panel: Panel, curve: pd.DataFrame, selection: str) -> str:
    if curve.empty:
        return f"{panel.title}, {selection}: no measurements"
    last = curve.iloc[-1]
    number = "{:.3%}" if panel.percent else "{:.4f}"
    null = "" if pd.isna(last["null_mean"]) else f", null {number.format(last['null_mean'])}"
    value = number.format(last["value"])
    return f"Line chart. {panel.title}, {selection}. At k = {curve.index[-1]}: observed {value}{null}."


def heatmap_figure() -> Figure:
    """The looks of the heat map of matrices; the script fills in rows, columns and values."""
    return {
        "traces": [
            {
                "type": "heatmap",
                "xgap": 2,
                "ygap": 2,
                "hoverongaps": False,
                "hovertemplate": "%{text}<extra></extra>",
                "colorbar": {
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
                },
            }
        ],
        "layout": layout(
            {"title": {"text": "layer"}, "showgrid": False, "ticks": "", "showline": False},
            {"autorange": "reversed", "showgrid": False, "ticks": "", "showline": False},
            margin={"l": 8, "r": 8, "t": 44, "b": 40},
        ),
        "scales": {
            "sequential": _scale("sequential", 5),
            "diverging": _scale("diverging", 5),
        },
    }


def _scale(name: str, steps: int) -> list[list[Any]]:
    return [[step / (steps - 1), f"var(--{name}-{step})"] for step in range(steps)]


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
