"""The verdicts over all matrices, and the facts needed to reproduce them."""

import math
import platform
import resource
import sys
from importlib.metadata import version
from typing import Any

import pandas as pd

from spectralbasis.comparison.pair import Settings
from spectralbasis.comparison.statistics import Finding, find

CEILING = 0.99
"""Above this null overlap, stability has next to no room to show in."""
_PACKAGES = ("spectralbasis", "torch", "numpy", "scipy", "pandas", "safetensors", "transformers", "peft")


def summarise(
    table: pd.DataFrame,
    settings: Settings,
    base: str,
    tuned: dict[str, str],
    skipped: dict[str, str],
    seconds: float,
) -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        table: all rows of the comparison.
        settings: what was measured.
        base: the base, as it was named.
        tuned: label → source of each finetuned checkpoint.
        skipped: matrix → reason.
        seconds: wall-clock time that the comparison took.
    """
    return {
        "base": base,
        "tuned": list(tuned),
        "tuned_sources": tuned,
        "leading": settings.leading,
        "null": settings.null,
        "draws": settings.draws if settings.null else 0,
        "tolerance": settings.tolerance,
        "matrices": int(table["matrix"].nunique()),
        "skipped": skipped,
        **findings(table, settings.seed),
        "per_tuned": {label: findings(rows, settings.seed) for label, rows in table.groupby("tuned", sort=False)},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "seed": settings.seed,
        "seconds": round(seconds, 3),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def findings(table: pd.DataFrame, seed: int) -> dict[str, dict[str, Any]]:
    """Stability and coverage with their intervals and verdicts, over the rows of a table."""
    stability = find(_headline(table, "subspace_overlap"), seed)
    coverage = find(_headline(table, "coverage_core"), seed)
    return {
        "stability": {**stability.to_dict(), **_reading(rotation_avoided(stability), _stability_note(stability))},
        "coverage": {**coverage.to_dict(), **_reading(ratio_to_null(coverage), "")},
    }


def _headline(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row per matrix at its full number of leading directions, left and right averaged."""
    rows = table[table["metric"] == metric]
    keys = ["tuned", "layer", "matrix"]
    rows = rows[rows["k"] == rows.groupby(keys)["k"].transform("max")]
    return rows.groupby(keys, as_index=False)[["value", "null_mean"]].mean()


def rotation_avoided(finding: Finding) -> float:
    """Share of the null's rotation that did not happen, `1 − (1 − φ) / (1 − φ_null)`; negative where there was more."""
    room = 1 - finding.null_mean
    return 1 - (1 - finding.value) / room if room > 0 else math.nan


def ratio_to_null(finding: Finding) -> float:
    """How many times the coverage that chance gives."""
    return finding.value / finding.null_mean if finding.null_mean > 0 else math.nan


def _reading(relative: float, note: str) -> dict[str, Any]:
    return {"relative_effect": relative if math.isfinite(relative) else None, "note": note}


def _stability_note(finding: Finding) -> str:
    if not finding.null_mean > CEILING:
        return ""
    return (
        f"An update of this size leaves {finding.null_mean:.4f} of the leading subspace in place even when its "
        "alignment is left to chance, so that high overlap here says only that the step was small."
    )


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
