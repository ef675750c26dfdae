"""The content of `summary.json`: verdicts over all matrices, notes, the methods paragraph and how to reproduce it."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NotRequired

import psutil
from typing_extensions import TypedDict

from spectralbasis.checkpoints.matching import describe_unpaired, share_text
from spectralbasis.comparison.measuring import DRAWN, UNCHANGED, Settings
from spectralbasis.comparison.metrics import INTRUDER_COSINE
from spectralbasis.comparison.nulls import COVERAGES, Null
from spectralbasis.comparison.sharing import (
    RunEntry,
    SharingEntry,
    sharing_findings,
    sharing_methods,
    training_runs,
    trajectories,
)
from spectralbasis.comparison.statistics import (
    CONFIDENCE,
    FALSE_DISCOVERY_RATE,
    RESAMPLES,
    Finding,
    FindingEntry,
    find,
    full_k,
)
from spectralbasis.linalg.thresholds import AUTO_LEADING
from spectralbasis.records import Count, Finite
from spectralbasis.version import library_versions

if TYPE_CHECKING:
    import pandas as pd

    from spectralbasis.comparison.pairing import Pairing

CEILING = 0.99
"""Above this null overlap, stability has next to no room to show in."""
LARGE_STEP = 0.5
"""From this ‖ΔW‖/‖W0‖ on, what the update takes away of the base makes up much of its coverage."""
STRANGE_STEP = 1.0
"""From this ‖ΔW‖/‖W0‖ on, two matrices are as far apart as unrelated ones, or one of them was emptied."""
_RULES = {
    "auto": f"{AUTO_LEADING}, or half of min(m, n) where that is less",
    "mp": "the number of singular values above the Marchenko–Pastur edge of noise fitted to the median one",
    "gd": "the number of singular values above the Gavish–Donoho threshold",
}


class SignificantEntry(TypedDict):
    """How many single measurements stand out from their null."""

    above_null: Count
    below_null: Count
    of: Count
    false_discovery_rate: Finite


class ForcedEntry(TypedDict):
    """In how many matrices the size of the update forces the overlap."""

    matrices: Count
    of: Count


class ClaimEntry(FindingEntry):
    """A finding with what a reader should know of it."""

    relative_effect: Finite | None
    significant: SignificantEntry
    note: NotRequired[str]
    forced_by_size: NotRequired[ForcedEntry]


class FindingsEntry(TypedDict):
    """The findings over all rows, or over those of one checkpoint."""

    stability: ClaimEntry
    coverage: ClaimEntry
    trailing_stability: NotRequired[ClaimEntry]
    trailing_coverage: NotRequired[ClaimEntry]


class UnpairedEntry(TypedDict):
    """A group of matrices that found no partner; the fields of `Unpaired`."""

    tuned: str
    side: str
    group: str
    matrices: Count
    parameters: Count
    share: Finite
    reason: str


class Summary(FindingsEntry):
    """The content of `summary.json`."""

    base: str
    tuned: list[str]
    tuned_sources: dict[str, str]
    leading: int | Finite | str
    null: str | None
    draws: Count
    null_from: dict[str, Count]
    tolerance: Finite
    matrices: Count
    skipped: dict[str, str]
    failed: NotRequired[dict[str, dict[str, str]]]
    unpaired: list[UnpairedEntry]
    measured_share: Finite
    notes: list[str]
    per_tuned: dict[str, FindingsEntry]
    sharing: NotRequired[SharingEntry]
    trajectory: NotRequired[list[RunEntry]]
    methods: str
    versions: dict[str, str]
    seed: int
    seconds: Finite
    peak_rss_bytes: Count


def summarise(
    table: "pd.DataFrame",
    sharing: "pd.DataFrame | None",
    settings: Settings,
    pairing: "Pairing",
    tasks: dict[str, str],
    seconds: float,
) -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        table: all rows of the comparison.
        sharing: all rows of what finetuned checkpoints share; None where there is one checkpoint.
        settings: what was measured.
        pairing: what was compared, what was skipped, and what found no partner.
        tasks: label → task of each, or empty.
        seconds: wall-clock time that the comparison took.
    """
    sources = null_sources(table)
    tuned = {label: checkpoint.source for label, checkpoint in pairing.tuned.items()}
    per_tuned = {str(label): findings(rows, settings.seed) for label, rows in table.groupby("tuned", sort=False)}
    runs = training_runs(tuned)
    between: dict[str, Any] = {}
    if sharing is not None and len(sharing):
        earlier = {label for steps in runs.values() for label in list(steps.values())[:-1]}
        between["sharing"] = sharing_findings(sharing, tasks, earlier, settings.seed)
    if runs:
        between["trajectory"] = trajectories(runs, per_tuned, table)
    versions = library_versions()
    methods = "" if table.empty else methods_paragraph(table, settings, pairing, versions)
    return {
        "base": pairing.base.source,
        "tuned": list(tuned),
        "tuned_sources": tuned,
        "leading": settings.leading,
        "null": settings.null_name or None,
        "draws": settings.most_draws if DRAWN in sources else 0,
        "null_from": {source: sources.count(source) for source in dict.fromkeys(sources)},
        "tolerance": settings.tolerance,
        "matrices": int(table["matrix"].nunique()),
        "skipped": pairing.skipped,
        "failed": pairing.failed,
        "unpaired": [
            {"tuned": label, **asdict(group)} for label, groups in pairing.unpaired.items() for group in groups
        ],
        "measured_share": min(map(pairing.measured_share, pairing.shares)),
        "notes": _notes(table, settings, pairing),
        **(next(iter(per_tuned.values())) if len(per_tuned) == 1 else findings(table, settings.seed)),
        "per_tuned": per_tuned,
        **between,
        "methods": f"{methods} {sharing_methods(between['sharing'])}" if "sharing" in between else methods,
        "versions": versions,
        "seed": settings.seed,
        "seconds": round(seconds, 3),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def methods_paragraph(
    table: "pd.DataFrame", settings: Settings, pairing: "Pairing", versions: Mapping[str, str]
) -> str:
    """What ran, in the words that a referee needs to run it again: models, matrices, solver, nulls, tests, versions."""
    sources = [checkpoint.source for checkpoint in pairing.tuned.values()]
    checkpoints = "1 finetuned checkpoint" if len(sources) == 1 else f"{len(sources)} finetuned checkpoints"
    said = [f"The base {pairing.base.source} was compared with {checkpoints} ({', '.join(sources)})."]
    matrices = table.drop_duplicates("matrix")
    kinds = ", ".join(f"{count} × {kind}" for kind, count in matrices["kind"].value_counts(sort=False).items())
    layers = matrices.loc[matrices["layer"] >= 0, "layer"].nunique()
    said.append(f"{len(matrices)} weight matrices of {layers} numbered layers were measured ({kinds}).")
    if pairing.skipped:
        reasons = pairing.skipped.values()
        groups = Counter("unchanged" if reason == UNCHANGED else reason.split(":")[0] for reason in reasons)
        listed = "; ".join(f"{count} × {reason}" for reason, count in groups.most_common(5))
        said.append(f"{len(pairing.skipped)} were skipped ({listed}).")
    said.append(_leading(table, settings))
    said.append(
        "Singular triplets were computed by block Lanczos, from the Gram matrix or densely, whichever met the "
        f"tolerance at the lowest cost: a sine of {settings.tolerance:g} between computed and true leading subspaces, "
        "bounded by residuals in float64 (Wedin); no solve was started from another matrix's vectors. Tuned left "
        f"vectors among the top 10 whose cosine to every base vector is below {INTRUDER_COSINE} count as intruders "
        "(2410.21228)."
    )
    if settings.null is None:
        said.append("There was no null, so nothing was tested.")
    else:
        said.append(
            f"{_null(table, settings, settings.null)}, adjusted over matrices by Benjamini–Hochberg (rate "
            f"{FALSE_DISCOVERY_RATE:g}). The mean effect over matrices has a {CONFIDENCE:.0%} interval from a "
            f"hierarchical bootstrap ({RESAMPLES} resamples; matrices within layers within checkpoints) with Student's "
            "t over the outermost groups."
        )
    said.append("Versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".")
    return " ".join(said)


def null_sources(table: "pd.DataFrame") -> list[str]:
    """What the null of the overlap comes from, "closed form" or "draws", for each matrix of each checkpoint."""
    overlaps = table[(table["metric"] == "subspace_overlap") & (table["null_from"] != "")]
    return overlaps.drop_duplicates(["tuned", "matrix"])["null_from"].tolist()


def _null(table: "pd.DataFrame", settings: Settings, null: Null) -> str:
    """What overlap and coverage were compared with, up to the law of the p-values."""
    sources = null_sources(table)
    drawn, all_ = sources.count(DRAWN), len(sources)
    draws = f"{settings.most_draws} draws of the {null.name} null ({null.description}) for each matrix"
    kept = f", which keeps {', '.join(sorted(null.keeps))}, so that there is nothing to test in them" * bool(null.keeps)
    law = "p-values of single matrices are Student's t for one further draw"
    if settings.draws is not None or (null.coverage is None and drawn == all_):
        what = "Overlap was" if null.keeps.issuperset(COVERAGES) else "Overlap and coverage were"
        return f"{what} compared with {draws}, seed {settings.seed}{kept}; {law}"
    beta = "p-values of single matrices are those of the Beta law with the null's mean and standard deviation"
    if null.self_energy is None:
        return (
            f"Coverage was compared with the {null.name} null ({null.description}) in closed form, which is exact, and "
            f"overlap with {settings.most_draws} draws of it for each matrix, seed {settings.seed}{kept}; {beta}, and "
            "with draws those of Student's t for one further draw"
        )
    coverage = "exact for coverage; " if null.coverage is not None else ""
    said = (
        f"Overlap and coverage were compared with the {null.name} null ({null.description}) in closed form: {coverage}"
    )
    limit = "for the overlap the limit of large matrices, corrected for pairs of nearly equal singular values"
    if not drawn:
        return f"{said}{limit}; {beta}"
    return (
        f"{said}{limit}, in {all_ - drawn} of {all_} matrices. In the other {drawn}, where that limit is uncertain, "
        f"the overlap was compared with {settings.most_draws} draws, seed {settings.seed}; {beta}, and with draws "
        "those of Student's t for one further draw"
    )


def _leading(table: "pd.DataFrame", settings: Settings) -> str:
    counts = table[table["metric"] == "subspace_overlap"].groupby("matrix")["k"].max()
    span = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    windows = "leading and as many trailing" if settings.trailing else "leading"
    if isinstance(settings.leading, int):
        fewer = "" if counts.min() == settings.leading else f" (all of a matrix that has fewer: {span})"
        return f"The {settings.leading} {windows} directions were taken{fewer}."
    rule = _RULES.get(str(settings.leading), f"a fraction of {settings.leading} of min(m, n)")
    return f"The number of {windows} directions was set by {rule}: {span}."


def _notes(table: "pd.DataFrame", settings: Settings, pairing: "Pairing") -> list[str]:
    """What a reader of the verdicts has to know before them."""

    def whom(label: str) -> str:
        return f" ({label})" if len(pairing.tuned) > 1 else ""

    notes = []
    for label, groups in pairing.unpaired.items():
        if groups and not pairing.shares[label]:
            notes.append(f"Nothing was compared{whom(label)}: {describe_unpaired(groups)}.")
        elif groups:
            notes.append(
                f"The verdicts cover {share_text(pairing.shares[label])} of the model{whom(label)}, by parameters of "
                f"its weight matrices. Not compared: {describe_unpaired(groups)}."
            )
    for label, failed in pairing.failed.items():
        name, reason = next(iter(failed.items()))
        notes.append(
            f"{len(failed)} {'pair' if len(failed) == 1 else 'pairs'} of matrices{whom(label)} could not be measured, "
            f"so {share_text(pairing.measured_share(label))} of the model was measured: {name}: {reason}."
        )
    steps = table[table["metric"] == "update_norm_relative"]
    for tuned, rows in steps.groupby("tuned", sort=False):
        large = rows[rows["value"] >= STRANGE_STEP]
        if len(large):
            notes.append(
                f"In {len(large)} of {len(rows)} matrices (such as "
                f"{large['matrix'].iloc[0]}){f' ({tuned})' if steps['tuned'].nunique() > 1 else ''} the update is at "
                "least as large as the weights, which is typical of unrelated matrices: check that the finetuned "
                "checkpoint was made from this base, that these matrices were not trained again from scratch, and that "
                "both checkpoints number their layers in the same way."
            )
    if isinstance(settings.leading, int):
        counts = table[table["metric"] == "subspace_overlap"].groupby("matrix", sort=False)["k"].max()
        small = counts[counts < settings.leading].index
        if len(small):
            notes.append(
                f"k={settings.leading} exceeds the smaller side of {len(small)} "
                f"{'matrix' if len(small) == 1 else 'matrices'} (such as {small[0]}): all their directions were "
                "taken, so the overlap of that side is always 1."
            )
    return notes


def findings(table: "pd.DataFrame", seed: int) -> dict[str, dict[str, Any]]:
    """Stability and coverage with their intervals and verdicts, over the rows of a table."""
    forced = forced_by_size(table)
    stability, finding = _finding(table, "subspace_overlap", seed, rotation_avoided)
    coverage, _ = _finding(table, "coverage_core", seed, ratio_to_null)
    found = {
        "stability": {**stability, "forced_by_size": forced, "note": _stability_note(finding, forced)},
        "coverage": {**coverage, "note": _coverage_note(table)},
    }
    if (table["metric"] == "trailing_overlap").any():
        found["trailing_stability"] = _finding(table, "trailing_overlap", seed, rotation_avoided)[0]
        found["trailing_coverage"] = _finding(table, "trailing_coverage", seed, ratio_to_null)[0]
    return found


def _finding(
    table: "pd.DataFrame", metric: str, seed: int, relative: Callable[[Finding], float]
) -> tuple[dict[str, Any], Finding]:
    rows = table[(table["metric"] == metric) & (table["k"] == full_k(table))]
    keys = ["tuned", "layer", "matrix"]
    finding = find(rows.groupby(keys, as_index=False)[["value", "null_mean"]].mean(), seed)
    share = relative(finding)
    found = rows[rows["q_value"] <= FALSE_DISCOVERY_RATE]
    entry = {
        **finding.to_dict(),
        "relative_effect": share if math.isfinite(share) else None,
        "significant": {  # single measurements that stand out from their null after correction
            "above_null": int((found["z"] > 0).sum()),
            "below_null": int((found["z"] < 0).sum()),
            "of": int(rows["q_value"].notna().sum()),
            "false_discovery_rate": FALSE_DISCOVERY_RATE,
        },
    }
    return entry, finding


def rotation_avoided(finding: Finding) -> float:
    """Share of the null's rotation that did not happen, `1 − (1 − φ) / (1 − φ_null)`; negative where there was more."""
    room = 1 - finding.null_mean
    return 1 - (1 - finding.value) / room if room > 0 else math.nan


def ratio_to_null(finding: Finding) -> float:
    """How many times the coverage that chance gives."""
    return finding.value / finding.null_mean if finding.null_mean > 0 else math.nan


def forced_by_size(table: "pd.DataFrame") -> dict[str, int]:
    """In how many matrices Wedin's bound, which knows only the size of ΔW, forces an overlap of at least `CEILING`.

    A largest sine of s leaves an overlap of at least 1 − s².
    """
    bounds = table[(table["metric"] == "wedin_bound") & (table["k"] == full_k(table))]["value"]
    return {"matrices": int((1 - bounds**2 >= CEILING).sum()), "of": len(bounds)}


def _stability_note(finding: Finding, forced: dict[str, int]) -> str:
    notes = []
    if finding.null_mean > CEILING:
        notes.append(
            f"An update of this size leaves {finding.null_mean:.4f} of the leading subspace in place even if the "
            "update is placed at random. A high overlap here only shows that the update is small."
        )
    if forced["matrices"]:
        notes.append(
            f"In {forced['matrices']} of {forced['of']} matrices the size of the update alone (Wedin's bound) forces "
            f"an overlap of at least {CEILING}: high stability is not a finding there."
        )
    return " ".join(notes)


def _coverage_note(table: "pd.DataFrame") -> str:
    nulls = {metric: set(rows["null"]) - {""} for metric, rows in table.groupby("metric")}
    kept = nulls.get("subspace_overlap", set()) - nulls.get("coverage_core", set())
    if kept:
        return (
            f"The null {', '.join(sorted(kept))} keeps the coverage of each update exactly, so this coverage cannot be "
            "tested with it."
        )
    step = table[table["metric"] == "update_norm_relative"]["value"].mean()
    if not step >= LARGE_STEP:
        return ""
    return (
        f"The update is {step:.2f} times as large as the weights. It removes a part of the base, and this part lies "
        "in the base's own directions. So this coverage does not show a shared basis."
    )


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # which Windows lacks

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
