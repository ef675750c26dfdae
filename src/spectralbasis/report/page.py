"""The page of a comparison: one HTML file with its styles, scripts and numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spectralbasis.checkpoints.matching import share_text
from spectralbasis.comparison.nulls import NULLS
from spectralbasis.report import figures, groups, sentences
from spectralbasis.report.figures import Figure, spectra, tuning_figure, with_labels
from spectralbasis.report.groups import Sharing
from spectralbasis.report.results import (
    COVERAGE,
    OVERLAP,
    Headline,
    Results,
    Tuning,
    headline,
    packed,
    plotly_text,
    read_results,
    render_page,
    short_names,
    write_page,
)
from spectralbasis.report.sentences import CLAIMS, QUESTIONS, Finding, tracks

_FUNCTIONS = (
    sentences.amount,
    sentences.difference,
    sentences.interval,
    sentences.p_value,
    sentences.reading,
    share_text,
)
"""What the template calls."""


def write_report(directory: Path | str) -> Path:
    """Write `index.html` into the folder of a comparison and return its path.

    Reads `comparison.parquet`, `summary.json` and, where present, `tuning.json`. The page needs nothing beside itself.

    Raises:
        InputError: a file is missing or cannot be read, or the page cannot be written.
    """
    folder = Path(directory)
    return write_page(folder, _render(read_results(folder)))


def _render(results: Results) -> str:
    summary, numbers = results.summary, headline(results)
    columns = sentences.matrix_columns(numbers)
    flat = [column for _, group in columns for column in group]
    shown = spectra(results, numbers.matrices["matrix"])
    tuning = None if results.tuning is None else Tuning(with_labels(results.tuning.rows), results.tuning.note)
    tasks = {} if tuning is None else dict(tuning.rows.groupby("task", sort=False)["metric"].first())
    shared, runs = Sharing.read(summary), groups.read_trajectories(summary)
    null = ", ".join(name for name in results.measurements["null"].unique() if name)
    findings = {claim: Finding.read(claim, summary[claim]) for claim in CLAIMS}
    base, *tuned = (short_names([name])[0] for name in (summary["base"], *results.tuned))

    drawn = {
        measure.chart: figures.curve_figure(measure, figures.panel_curves(results, measure), numbers.selections)
        for measure in (*OVERLAP, *COVERAGE)
    }
    if tuning is not None:
        drawn |= {f"tuning-{i}": tuning_figure(tuning.rows, task) for i, task in enumerate(tasks)}
    if shared is not None and groups.FEWEST_DRAWN <= len(shared.names) <= groups.MOST_DRAWN:
        drawn["sharing-map"] = groups.sharing_figure(shared)
    if runs:
        drawn |= {panel.key: groups.trajectory_figure(panel, runs) for panel in groups.RUN_PANELS}
    drawn["heatmap"] = figures.heatmap_figure()
    drawn["spectrum-values"], drawn["spectrum-change"] = figures.spectrum_figures()
    return render_page(
        "page.html",
        "page.js",
        _FUNCTIONS,
        _payload(numbers, flat, shown, drawn),
        title=f"{base} against {', '.join(tuned) if len(tuned) <= 3 else f'{len(tuned)} finetuned checkpoints'}",
        base=base,
        headline=sentences.headline(findings["stability"], findings["coverage"], summary["measured_share"]),
        notes=summary["notes"],
        unpaired=summary["unpaired"],
        claims=[_claim(finding, results, null, len(numbers.matrices)) for finding in findings.values()],
        selections=numbers.selections,
        overlap=OVERLAP,
        coverage=COVERAGE,
        measures=numbers.measures,
        grids=numbers.grids,
        matrices=list(numbers.matrices["matrix"]),
        spectra=shown,
        columns=columns,
        rows=sentences.matrix_rows(numbers, flat),
        skipped=summary["skipped"],
        tuning=tuning,
        tuning_headings=sentences.TUNING_HEADINGS,
        tuning_rows=[] if tuning is None else sentences.tuning_rows(tuning),
        tuning_tasks=tasks,
        sharing=shared,
        sharing_sentences=[] if shared is None else groups.explain_sharing(shared),
        sharing_tasks=[] if shared is None else groups.explain_tasks(shared),
        sharing_drawn="sharing-map" in drawn,
        sharing_headings=groups.SHARING_HEADINGS,
        sharing_rows=[] if shared is None else groups.sharing_rows(shared),
        trajectory=groups.RUN_PANELS if runs else (),
        trajectory_runs=groups.markers(runs),
        trajectory_headings=groups.TRAJECTORY_HEADINGS,
        trajectory_rows=groups.trajectory_rows(runs),
        settings=sentences.settings(summary, null, len(numbers.matrices)),
        null=null,
        null_record=NULLS.get(null),
        methods=summary["methods"],
    )


def _claim(overall: Finding, results: Results, null: str, matrices: int) -> dict[str, Any]:
    claim, per_tuned, count = overall.claim, results.summary["per_tuned"], len(results.tuned)
    each = {name: Finding.read(claim, per_tuned[name][claim]) for name in results.tuned if name in per_tuned}
    scope = "one matrix" if matrices == 1 else f"{matrices} matrices"
    if count > 1:
        scope += f" in each of {count} checkpoints"
        labels, shown = [f"All {count} checkpoints", *short_names(list(each))], [overall, *each.values()]
    else:
        labels, shown = short_names(list(each)) or ["overall"], list(each.values()) or [overall]
    whose: dict[str, list[str]] = {}
    for label, finding in zip(labels, shown, strict=True):
        if finding.note:
            whose.setdefault(finding.note, []).append(label)
    step = {"step": NULLS[null].update} if null in NULLS else {}
    return {
        "key": claim,
        "question": QUESTIONS[claim],
        "finding": overall,
        "sentences": sentences.explain(overall, scope, **step),
        "notes": [{"name": _enumerate(names) if len(shown) > 1 else "", "text": note} for note, names in whose.items()],
        "rows": list(zip(labels, shown, tracks(shown), strict=True)),
    }


def _enumerate(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _payload(
    numbers: Headline,
    columns: Sequence[sentences.Column],
    shown: figures.Spectra | None,
    drawn: Mapping[str, Figure],
) -> Mapping[str, Any]:
    """What the page's script reads."""
    carried = None
    if shown is not None:
        carried = {name: packed(getattr(shown, name)) for name in ("base", "tuned", "low", "high")} | {
            "directions": [int(direction) for direction in shown.directions],
            "selections": len(shown.tuned),
        }
    return {
        "figures": drawn,
        "labels": [plotly_text(name) for name in numbers.matrices["matrix"]],
        "selections": numbers.selections,
        "measures": {
            measure.key: {"label": measure.label, "digits": measure.digits, "percent": measure.percent}
            for measure in numbers.measures
        },
        "grids": {key: {name: packed(grid) for name, grid in grids.items()} for key, grids in numbers.grids.items()},
        "cells": figures.heatmap_cells(numbers.matrices),
        "columns": [asdict(column) for column in columns],
        "spectra": carried,
    }
