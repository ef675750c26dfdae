"""Means over matrices of what a trajectory measured, and how they stand to their nulls."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from spectralbasis.comparison.summary import CEILING
from spectralbasis.study.measures.trajectories import TRAIN_LOSS

NOISE = 1e-7
"""Rotation (1 − overlap) that float32 vectors cannot tell from none."""
WITH_NULL = {
    "overlap": "subspace_overlap",
    "trailing_overlap": "trailing_overlap",
    "core": "coverage_core",
    "diagonal": "coverage_diagonal",
    "trailing_core": "trailing_coverage",
}
_ALONE = {
    "matched_cosine": "matched_cosine",
    "assigned_cosine": "assigned_cosine",
    "overlap_haar": "overlap_haar",
    "norm": "update_norm_relative",
    "wedin_bound": "wedin_bound",
}


def summarise_steps(measurements: pd.DataFrame, by: Sequence[str] = ("step",)) -> pd.DataFrame:
    """Means over matrices and sides, a row for each value of `by`.

    Args:
        measurements: the rows of `TrajectoryCallback.table`, and columns of the caller's.
        by: columns that tell the rows apart: of the table (`step`, `layer`, `kind`, `matrix`) or the caller's.

    Returns:
        `by` and, as far as they were measured, `overlap`, `trailing_overlap`, `core`, `diagonal`, `trailing_core`,
        each with its null's mean as `NAME_null`; `matched_cosine`, `assigned_cosine`, `overlap_haar`, `norm`
        (`‖ΔW‖/‖W0‖`) and `wedin_bound`; `forced`, the share of matrices in which Wedin's bound alone forces an overlap
        of `CEILING`, and `stable`, the share whose overlap reaches it; then, in doublings, `held` and `trailing_held`
        (see `halvings`), and `core_gain` and `diagonal_gain`, the coverage over what chance gives.
    """
    keys = list(by)
    rows = measurements[measurements["metric"] != TRAIN_LOSS]
    means = rows.groupby([*keys, "metric"])[["value", "null_mean"]].mean().unstack("metric")
    columns = {name: means["value"].get(metric) for name, metric in (WITH_NULL | _ALONE).items()}
    columns |= {f"{name}_null": means["null_mean"].get(metric) for name, metric in WITH_NULL.items()}
    table = pd.DataFrame({name: column for name, column in columns.items() if column is not None}, index=means.index)
    table = table.join(_shares(rows, keys))
    if "overlap_null" in table:
        table["held"] = halvings(table["overlap"], table["overlap_null"])
        for name in ("core", "diagonal"):
            table[f"{name}_gain"] = np.log2(table[name] / table[f"{name}_null"])
    if "trailing_overlap_null" in table:
        table["trailing_held"] = halvings(table["trailing_overlap"], table["trailing_overlap_null"])
    return table.reset_index()


def halvings(overlap: pd.Series, null: pd.Series) -> pd.Series:
    """How many times the null's rotation was halved: `log2((1 − φ_null) / (1 − φ))`, negative where there was more.

    It compares rotations, since overlaps near 1 leave a difference no room.
    """
    return pd.Series(np.log2((1 - null).clip(lower=NOISE) / (1 - overlap).clip(lower=NOISE)))


def _shares(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    bounds = rows[rows["metric"] == "wedin_bound"]
    overlaps = rows[rows["metric"] == "subspace_overlap"]
    return pd.DataFrame(
        {
            "forced": (1 - bounds["value"] ** 2 >= CEILING).groupby([bounds[key] for key in keys]).mean(),
            "stable": (overlaps["value"] >= CEILING).groupby([overlaps[key] for key in keys]).mean(),
        }
    )
