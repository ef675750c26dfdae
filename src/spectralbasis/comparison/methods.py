"""The methods paragraph: what ran, in the words that a referee needs to run it again."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pandas as pd

from spectralbasis.comparison.measuring import UNCHANGED, Settings
from spectralbasis.comparison.metrics import INTRUDER_COSINE
from spectralbasis.comparison.statistics import CONFIDENCE, FALSE_DISCOVERY_RATE, RESAMPLES
from spectralbasis.linalg.thresholds import AUTO_LEADING

_RULES = {
    "auto": f"{AUTO_LEADING}, or half of min(m, n) where that is less",
    "mp": "the number of singular values above the Marchenko–Pastur edge of noise fitted to the median one",
    "gd": "the number of singular values above the Gavish–Donoho threshold",
}
_NULLS = {
    "scrambled": "the scrambled null (W0 + D1 P1 ΔW P2 D2, random permutations P and signs D)",
    "gaussian": "the gaussian null (independent normal entries of the norm of ΔW)",
}


def methods_paragraph(
    table: pd.DataFrame, settings: Settings, base: str, tuned: Mapping[str, str], skipped: Mapping[str, str], facts: Any
) -> str:
    """One paragraph on models, matrices, solver, leading directions, nulls, tests and versions.

    Args:
        table: all rows of the comparison.
        settings: what was measured.
        base: the base, as it was named.
        tuned: label → source of each finetuned checkpoint.
        skipped: matrix → reason.
        facts: version of each package by name.
    """
    return " ".join(
        (
            _models(base, tuned),
            _matrices(table, skipped),
            _leading(table, settings),
            _solver(settings),
            _tests(settings),
            "Versions: " + ", ".join(f"{name} {number}" for name, number in facts.items()) + ".",
        )
    )


def _models(base: str, tuned: Mapping[str, str]) -> str:
    checkpoints = "1 finetuned checkpoint" if len(tuned) == 1 else f"{len(tuned)} finetuned checkpoints"
    return f"The base {base} was compared with {checkpoints} ({', '.join(tuned.values())})."


def _matrices(table: pd.DataFrame, skipped: Mapping[str, str]) -> str:
    matrices = table.drop_duplicates("matrix")
    kinds = ", ".join(f"{count} × {kind}" for kind, count in matrices["kind"].value_counts(sort=False).items())
    layers = matrices.loc[matrices["layer"] >= 0, "layer"].nunique()
    text = f"{len(matrices)} weight matrices of {layers} numbered layers were measured ({kinds})."
    if skipped:
        groups = Counter("unchanged" if reason == UNCHANGED else reason.split(":")[0] for reason in skipped.values())
        listed = "; ".join(f"{count} × {reason}" for reason, count in groups.most_common(5))
        text += f" {len(skipped)} were skipped ({listed})."
    return text


def _leading(table: pd.DataFrame, settings: Settings) -> str:
    counts = table[table["metric"] == "subspace_overlap"].groupby("matrix")["k"].max()
    span = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    windows = "leading and as many trailing" if settings.trailing else "leading"
    if isinstance(settings.leading, int):
        fewer = "" if counts.min() == settings.leading else f" (all of a matrix that has fewer: {span})"
        return f"The {settings.leading} {windows} directions were taken{fewer}."
    rule = _RULES.get(str(settings.leading), f"a fraction of {settings.leading} of min(m, n)")
    return f"The number of {windows} directions was set by {rule}: {span}."


def _solver(settings: Settings) -> str:
    return (
        "Singular triplets were computed by block Lanczos, from the Gram matrix or densely, whichever was the cheapest "
        f"to meet the tolerance, a sine of {settings.tolerance:g} between computed and true leading subspaces, bounded "
        "by residuals in float64 (Wedin); no solve was started from another matrix's vectors. Tuned left vectors among "
        f"the top 10 whose cosine to every base vector is below {INTRUDER_COSINE} count as intruders (2410.21228)."
    )


def _tests(settings: Settings) -> str:
    if settings.null is None:
        return "No null was drawn, so nothing was tested."
    return (
        f"Overlap and coverage were held against {settings.draws} draws of {_NULLS[settings.null]} for each matrix, "
        f"seed {settings.seed}; p-values of single matrices are Student's t for one further draw, adjusted over "
        f"matrices by Benjamini–Hochberg (rate {FALSE_DISCOVERY_RATE:g}). The mean effect over matrices has a "
        f"{CONFIDENCE:.0%} interval from a hierarchical bootstrap ({RESAMPLES} resamples; matrices within layers "
        "within checkpoints) with Student's t over the outermost groups."
    )
