"""Plotly figures as plain dictionaries.

A colour is written `var(--name)`: the page's script puts the style sheet's value there, anew when the scheme changes.
A figure has `traces` and a `layout`, and `views`: per selection what replaces the traces' data. The heat map and the
spectra are drawn by the script from the embedded grids, so theirs hold the looks only.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from spectralbasis.report.curves import Panel
from spectralbasis.report.embed import plotly_text, rounded

Figure = dict[str, Any]

_AXIS = {
    "gridcolor": "var(--grid)",
    "linecolor": "var(--axis)",
    "tickcolor": "var(--axis)",
    "zeroline": False,
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
    """A metric against k with the null's band; one view per selection, zoomed on what was observed and its null."""
    number = ".2~%" if panel.percent else ".3f"
    ks = sorted({int(k) for curve in curves for k in curve.index})
    return {
        "traces": _curve_traces(number),
        "layout": layout(
            {
                "type": "log",
                "title": {"text": "k"},
                "tickvals": ks,
                "ticktext": [str(k) for k in ks],
                "showgrid": False,
            },
            {"tickformat": ".3~%" if panel.percent else ".3~f", "rangemode": "tozero", "nticks": 6},
            hovermode="x unified",
        ),
        "views": [_curve_view(panel, curve, name) for curve, name in zip(curves, selections, strict=True)],
        "full": [0.0, 1.02],
    }


def _ticks_at(ks: Sequence[int]) -> dict[str, Any]:
    return {"tickvals": list(ks), "ticktext": [str(k) for k in ks]}


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
            "hovertemplate": f"observed %{{y:{number}}} (%{{customdata}} rows)<extra></extra>",
        },
    ]


def _curve_view(panel: Panel, curve: pd.DataFrame, selection: str) -> Figure:
    k = [int(size) for size in curve.index]
    values = {name: rounded(curve[name]) for name in curve}
    nulled = curve[curve["null_mean"].notna()]
    traces = [
        _band(nulled, "null_low", "null_high"),
        _band(curve, "low", "high"),
        {"x": k, "y": values["unrelated"]},
        {"x": k, "y": values["null_mean"]},
        {"x": k, "y": values["value"], "customdata": [int(count) for count in curve["count"]]},
    ]
    return {"traces": traces, "range": _zoom(curve), "label": _label(panel, curve, selection)}


def _zoom(curve: pd.DataFrame) -> list[float | None]:
    shown = curve[["low", "high", "value", "null_low", "null_high"]]
    low, high = float(shown.min().min()), float(shown.max().max())
    pad = 0.06 * (high - low) or 0.02
    return rounded([max(low - pad, 0), high + pad])


def _band(curve: pd.DataFrame, low: str, high: str) -> Figure:
    k = [int(size) for size in curve.index]
    return {"x": k + k[::-1], "y": rounded(curve[high]) + rounded(curve[low])[::-1]}


def _label(panel: Panel, curve: pd.DataFrame, selection: str) -> str:
    if curve.empty:
        return f"{panel.title}, {selection}: no measurements"
    last = curve.iloc[-1]
    number = "{:.2%}" if panel.percent else "{:.3f}"
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
                    "outlinewidth": 0,
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
    """Where each matrix stands: `rows` (kinds) and `columns` (layers) with labels, and a matrix's place per cell or -1.

    Two matrices of one layer and kind (an encoder's and a decoder's) get rows by their full names, the layer starred.
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
        "columns": ["none" if layer < 0 else str(layer) for layer in column_names],
        "cells": cells,
    }


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
    direction = {"title": {"text": "direction"}, "showgrid": False, "rangemode": "tozero"}
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
