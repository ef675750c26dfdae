"""Assembles the page: one HTML file that holds its styles, scripts and numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from spectralbasis.checkpoints.matching import share_text
from spectralbasis.comparison.sharing import RunEntry
from spectralbasis.files import atomic_path, claim_files
from spectralbasis.report import figures, groups, sentences
from spectralbasis.report.figures import Figure, Spectra, spectra, tuning_figure, with_labels
from spectralbasis.report.groups import Sharing
from spectralbasis.report.results import (
    Headline,
    Results,
    Tuning,
    environment,
    headline,
    packed,
    plotly_text,
    read_results,
    script_hash,
    script_json,
    short_names,
)
from spectralbasis.report.sentences import CLAIMS, QUESTIONS, Claim, Finding, tracks
from spectralbasis.version import __version__

_HERE = Path(__file__).parent


def write_report(directory: Path | str) -> Path:
    """Write `index.html` into the folder of a comparison and return its path.

    Reads `comparison.parquet`, `summary.json` and, where present, `tuning.json`. The page needs nothing beside itself.

    Raises:
        InputError: a file is missing or cannot be read, or the page cannot be written.
    """
    page = render(read_results(directory))
    target = Path(directory) / "index.html"
    claim_files(target.parent, target.name)
    with atomic_path(target) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))
    return target


def render(results: Results) -> str:
    """The page of these results as HTML."""
    numbers = headline(results)
    columns = sentences.matrix_columns(numbers)
    flat = [column for _, group in columns for column in group]
    shown = spectra(results, numbers.matrices["matrix"])
    tuning = None if results.tuning is None else Tuning(with_labels(results.tuning.rows), results.tuning.note)
    shared, runs = Sharing.read(results.summary), groups.read_trajectories(results.summary)
    null = _null(results)
    plotly, script = Markup(get_plotlyjs()), Markup((_HERE / "page.js").read_text(encoding="utf-8"))
    drawn = _optional_figures(tuning, shared, runs)
    findings = {claim: Finding.read(claim, results.summary[claim]) for claim in CLAIMS}
    return _template().render(
        title=_title(results),
        base=short_names([results.summary["base"]])[0],
        headline=sentences.headline(findings["stability"], findings["coverage"], results.summary["measured_share"]),
        notes=results.summary["notes"],
        unpaired=results.summary["unpaired"],
        claims=[_claim(claim, findings[claim], results, len(numbers.matrices)) for claim in CLAIMS],
        selections=numbers.selections,
        overlap=figures.OVERLAP,
        coverage=figures.COVERAGE,
        measures=numbers.measures,
        grids=numbers.grids,
        matrices=list(numbers.matrices["matrix"]),
        spectra=shown,
        columns=columns,
        rows=sentences.matrix_rows(numbers, flat),
        skipped=results.summary["skipped"],
        tuning=tuning,
        tuning_headings=sentences.TUNING_HEADINGS,
        tuning_rows=[] if tuning is None else sentences.tuning_rows(tuning),
        tuning_tasks=_tasks(tuning),
        sharing=shared,
        sharing_sentences=[] if shared is None else groups.explain_sharing(shared),
        sharing_tasks=[] if shared is None else groups.explain_tasks(shared),
        sharing_drawn="sharing-map" in drawn,
        sharing_headings=groups.SHARING_HEADINGS,
        sharing_rows=[] if shared is None else groups.sharing_rows(shared),
        trajectory=groups.PANELS if runs else (),
        trajectory_runs=groups.markers(runs),
        trajectory_headings=groups.TRAJECTORY_HEADINGS,
        trajectory_rows=groups.trajectory_rows(runs),
        settings=sentences.settings(results.summary, null, len(numbers.matrices)),
        null=null,
        methods=results.summary["methods"],
        version=__version__,
        policy=f"{script_hash(plotly)} {script_hash(script)}",
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        plotly=plotly,
        script=script,
        payload=script_json(_payload(results, numbers, flat, shown, drawn)),
    )


def _template() -> jinja2.Template:
    templates = environment()
    words = (
        sentences.amount,
        sentences.difference,
        sentences.interval,
        sentences.p_value,
        sentences.reading,
        share_text,
    )
    templates.globals.update({function.__name__: function for function in words})
    return templates.get_template("page.html")


def _title(results: Results) -> str:
    base, *tuned = (short_names([name])[0] for name in (results.summary["base"], *results.tuned))
    against = ", ".join(tuned) if len(tuned) <= 3 else f"{len(tuned)} finetuned checkpoints"
    return f"{base} against {against}"


def _null(results: Results) -> str:
    return ", ".join(name for name in results.measurements["null"].unique() if name)


def _claim(claim: Claim, overall: Finding, results: Results, matrices: int) -> dict[str, Any]:
    per_tuned = results.summary["per_tuned"]
    each = {name: Finding.read(claim, per_tuned[name][claim]) for name in results.tuned if name in per_tuned}
    several = len(results.tuned) > 1
    scope = "one matrix" if matrices == 1 else f"{matrices} matrices"
    scope += f" in each of {len(results.tuned)} checkpoints" if several else ""
    if several:
        labels, shown = [f"All {len(results.tuned)} checkpoints", *short_names(list(each))], [overall, *each.values()]
    else:
        labels, shown = short_names(list(each)) or ["overall"], list(each.values()) or [overall]
    return {
        "key": claim,
        "question": QUESTIONS[claim],
        "finding": overall,
        "sentences": sentences.explain(overall, scope),
        "notes": _notes(dict(zip(labels, shown, strict=True))),
        "rows": list(zip(labels, shown, tracks(shown), strict=True)),
    }


def _notes(findings: Mapping[str, Finding]) -> list[dict[str, str]]:
    """Each note once, with whom it speaks of; a lone checkpoint needs no name."""
    names: dict[str, list[str]] = {}
    for name, finding in findings.items():
        if finding.note:
            names.setdefault(finding.note, []).append(name)
    return [{"name": _enumerate(who) if len(findings) > 1 else "", "text": text} for text, who in names.items()]


def _enumerate(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _tasks(tuning: Tuning | None) -> dict[str, str]:
    """Each task with its metric."""
    if tuning is None:
        return {}
    return {str(task): rows["metric"].iloc[0] for task, rows in tuning.rows.groupby("task", sort=False)}


def _optional_figures(tuning: Tuning | None, shared: Sharing | None, runs: Sequence[RunEntry]) -> dict[str, Figure]:
    """The figures of the sections that not every page has."""
    drawn = {f"tuning-{i}": tuning_figure(tuning.rows, task) for i, task in enumerate(_tasks(tuning)) if tuning}
    if shared is not None and groups.FEWEST_DRAWN <= len(shared.names) <= groups.MOST_DRAWN:
        drawn["sharing-map"] = groups.sharing_figure(shared)
    if runs:
        drawn |= {panel.key: groups.trajectory_figure(panel, runs) for panel in groups.PANELS}
    return drawn


def _payload(
    results: Results,
    numbers: Headline,
    columns: Sequence[sentences.Column],
    shown: Spectra | None,
    optional: Mapping[str, Figure],
) -> Mapping[str, Any]:
    drawn = {
        panel.key: figures.curve_figure(panel, figures.panel_curves(results, panel), numbers.selections)
        for panel in (*figures.OVERLAP, *figures.COVERAGE)
    }
    drawn |= optional
    drawn["heatmap"] = figures.heatmap_figure()
    drawn["spectrum-values"], drawn["spectrum-change"] = figures.spectrum_figures()
    return {
        "figures": drawn,
        "labels": [plotly_text(name) for name in numbers.matrices["matrix"]],
        "selections": numbers.selections,
        "measures": {measure.key: asdict(measure) for measure in numbers.measures},
        "grids": {key: {name: packed(grid) for name, grid in grids.items()} for key, grids in numbers.grids.items()},
        "cells": figures.heatmap_cells(numbers.matrices),
        "columns": [asdict(column) for column in columns],
        "spectra": None if shown is None else _packed_spectra(shown),
    }


def _packed_spectra(shown: Spectra) -> dict[str, Any]:
    grids = {name: packed(getattr(shown, name)) for name in ("base", "tuned", "low", "high")}
    return grids | {"directions": [int(direction) for direction in shown.directions], "selections": len(shown.tuned)}
