"""A metric against k: the mean over matrices, beside what the null and unrelated subspaces give."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from spectralbasis.report.results import Results


@dataclass(frozen=True)
class Panel:
    """One chart of a metric against k; `unrelated` is the Haar expectation for k, m and n."""

    key: str
    title: str
    formula: str
    metric: str
    side: str
    unrelated: Callable[[pd.Series, pd.Series, pd.Series], pd.Series]
    percent: bool = False


OVERLAP = (
    Panel("overlap-left", "Left vectors", "‖U₀ᵀU₁‖² / k", "subspace_overlap", "left", lambda k, m, n: k / m),
    Panel("overlap-right", "Right vectors", "‖V₀ᵀV₁‖² / k", "subspace_overlap", "right", lambda k, m, n: k / n),
)
COVERAGE = (
    Panel("coverage-core", "Core", "‖UᵀΔWV‖²", "coverage_core", "both", lambda k, m, n: k * k / (m * n), True),
    Panel(
        "coverage-diagonal", "Diagonal", "Σ(uᵢᵀΔWvᵢ)²", "coverage_diagonal", "both", lambda k, m, n: k / (m * n), True
    ),
    Panel("coverage-left", "Left", "‖UᵀΔW‖²", "coverage_left", "left", lambda k, m, n: k / m, True),
    Panel("coverage-right", "Right", "‖ΔWV‖²", "coverage_right", "right", lambda k, m, n: k / n, True),
)


def panel_curves(results: Results, panel: Panel) -> list[pd.DataFrame]:
    """One curve per selection: all checkpoints together where there are several, then each of them."""
    rows = results.measurements
    rows = rows[(rows["metric"] == panel.metric) & rows["side"].isin([panel.side, "both"])]
    parts = dict(iter(rows.groupby("tuned", observed=True)))
    single = [curve(parts.get(name, rows.iloc[:0]), panel) for name in results.tuned]
    return single if len(single) == 1 else [curve(rows, panel), *single]


def curve(rows: pd.DataFrame, panel: Panel) -> pd.DataFrame:
    """Means over matrices at each k that at least half of them reach.

    Index k; columns `count, value, low, high` (the middle 80 % of matrices), `null_mean, null_low, null_high`
    (two standard deviations of a typical matrix: root mean square of theirs) and `unrelated`.
    """
    rows = rows.assign(unrelated=panel.unrelated(rows["k"], rows["m"], rows["n"]), variance=rows["null_std"] ** 2)
    groups = rows.groupby("k")
    means = groups[["value", "null_mean", "unrelated", "variance"]].mean()
    spread = 2 * np.sqrt(means.pop("variance"))
    curve = means.assign(
        count=groups.size(),
        low=groups["value"].quantile(0.1),
        high=groups["value"].quantile(0.9),
        null_low=(means["null_mean"] - spread).clip(lower=0),
        null_high=(means["null_mean"] + spread).clip(upper=1),
    )
    return curve[curve["count"] >= curve["count"].max() / 2]
