"""The verdicts over all matrices, and the facts needed to reproduce them."""

import math
import platform
import resource
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pandas as pd

from spectralbasis.comparison.measuring import Settings
from spectralbasis.comparison.methods import methods_paragraph
from spectralbasis.comparison.statistics import FALSE_DISCOVERY_RATE, Finding, find, full_k

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
    versions = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
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
        "methods": methods_paragraph(table, settings, base, tuned, skipped, versions),
        "versions": versions,
        "seed": settings.seed,
        "seconds": round(seconds, 3),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def findings(table: pd.DataFrame, seed: int) -> dict[str, dict[str, Any]]:
    """Stability and coverage with their intervals and verdicts, over the rows of a table."""
    return {
        "stability": _finding(table, "subspace_overlap", seed, rotation_avoided, _stability_note),
        "coverage": _finding(table, "coverage_core", seed, ratio_to_null, lambda _: ""),
    }


def _finding(
    table: pd.DataFrame,
    metric: str,
    seed: int,
    relative: Callable[[Finding], float],
    note: Callable[[Finding], str],
) -> dict[str, Any]:
    rows = table[(table["metric"] == metric) & (table["k"] == full_k(table))]
    keys = ["tuned", "layer", "matrix"]
    finding = find(rows.groupby(keys, as_index=False)[["value", "null_mean"]].mean(), seed)
    share = relative(finding)
    return {
        **finding.to_dict(),
        "relative_effect": share if math.isfinite(share) else None,
        "significant": _significant(rows),
        "note": note(finding),
    }


def _significant(rows: pd.DataFrame) -> dict[str, int | float]:
    """How many single measurements stand out from their null after correction, on either side of it."""
    found = rows[rows["q_value"] <= FALSE_DISCOVERY_RATE]
    return {
        "above_null": int((found["z"] > 0).sum()),
        "below_null": int((found["z"] < 0).sum()),
        "of": int(rows["q_value"].notna().sum()),
        "false_discovery_rate": FALSE_DISCOVERY_RATE,
    }


def rotation_avoided(finding: Finding) -> float:
    """Share of the null's rotation that did not happen, `1 − (1 − φ) / (1 − φ_null)`; negative where there was more."""
    room = 1 - finding.null_mean
    return 1 - (1 - finding.value) / room if room > 0 else math.nan


def ratio_to_null(finding: Finding) -> float:
    """How many times the coverage that chance gives."""
    return finding.value / finding.null_mean if finding.null_mean > 0 else math.nan


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
