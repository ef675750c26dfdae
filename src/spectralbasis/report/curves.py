"""A metric against k: the mean over matrices, beside what the null and unrelated subspaces give."""

from collections.abc import Callable
from dataclasses import dataclass

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


SMALLEST = 1e-12
"""Where the bands end below, so that a logarithmic scale can show them."""


def panel_curves(results: Results, panel: Panel) -> list[pd.DataFrame]:
    """One curve per selection: all checkpoints together where there are several, then each of them.

    A curve holds means over matrices, at each k (its index) that at least half of them reach: columns `count, value,
    low, high` (the middle 80 % of matrices), `null_mean, null_low, null_high` (two standard deviations of a typical
    matrix: the median of theirs) and `unrelated`.
    """
    rows = results.measurements
    rows = rows[(rows["metric"] == panel.metric) & rows["side"].isin([panel.side, "both"])]
    rows = rows.assign(unrelated=panel.unrelated(rows["k"], rows["m"], rows["n"]))
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
