"""Headline numbers of each matrix: one value per measure, checkpoint and matrix."""

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd

from spectralbasis.report.embed import short_names
from spectralbasis.report.results import CURVES, Results

STATISTICS = ("value", "null_mean", "z", "p_value")


@dataclass(frozen=True)
class Measure:
    """One number of a matrix: where it stands in the table of measurements, and how it is written."""

    key: str
    metric: str
    side: str
    label: str
    digits: int
    percent: bool = False


MEASURES = (
    Measure("overlap_left", "subspace_overlap", "left", "Overlap, left", 4),
    Measure("overlap_right", "subspace_overlap", "right", "Overlap, right", 4),
    Measure("coverage_core", "coverage_core", "both", "Coverage, core", 2, percent=True),
    Measure("coverage_diagonal", "coverage_diagonal", "both", "Coverage, diagonal", 3, percent=True),
    Measure("coverage_left", "coverage_left", "left", "Coverage, left", 2, percent=True),
    Measure("coverage_right", "coverage_right", "right", "Coverage, right", 2, percent=True),
    Measure("step", "update_norm_relative", "both", "Relative step", 2, percent=True),
    Measure("stable_rank_base", "stable_rank_base", "both", "Stable rank of W₀", 1),
    Measure("stable_rank_update", "stable_rank_update", "both", "Stable rank of ΔW", 1),
    Measure("effective_rank_update", "effective_rank_update", "both", "Effective rank of ΔW", 1),
    Measure("intruders", "intruders", "left", "Intruders", 1),
)


@dataclass(frozen=True)
class Headline:
    """Every measure of every matrix at its largest k.

    `matrices` has one row per matrix: `matrix, layer, kind, m, n, k`. `grids[key][statistic]` has shape
    (selections, matrices): with several checkpoints the first selection is their mean (which has no p), then comes each
    of them. A measure or statistic that the comparison lacks has no grid.
    """

    matrices: pd.DataFrame
    selections: tuple[str, ...]
    measures: tuple[Measure, ...]
    grids: dict[str, dict[str, np.ndarray]]


def headline(results: Results) -> Headline:
    """The rows at each matrix's largest k, as one grid per measure and statistic."""
    rows = results.measurements
    matrices = list_matrices(rows)
    largest = matrices["k"].to_numpy()[category_positions(rows["matrix"], matrices["matrix"])]
    rows = rows[~rows["metric"].isin(CURVES) | (rows["k"] == largest)]
    grids = {}
    for measure in MEASURES:
        found = rows[(rows["metric"] == measure.metric) & rows["side"].isin([measure.side, "both"])]
        grids[measure.key] = _grids(found, results.tuned, matrices["matrix"])
    measures = tuple(measure for measure in MEASURES if grids[measure.key])
    return Headline(
        matrices, selections(results.tuned), measures, {key: found for key, found in grids.items() if found}
    )


def selections(tuned: tuple[str, ...]) -> tuple[str, ...]:
    """What a reader can look at: all checkpoints together where there are several, then each of them."""
    names = tuple(short_names(tuned))
    return names if len(names) == 1 else (f"All {len(names)} checkpoints", *names)


def list_matrices(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per matrix, in the order of the table, with its largest k."""
    largest = rows.groupby("matrix", observed=True)["k"].max()
    matrices = rows.drop_duplicates("matrix")[["matrix", "layer", "kind", "m", "n"]].astype(
        {"matrix": str, "kind": str}
    )
    return matrices.assign(k=matrices["matrix"].map(largest).astype(int)).reset_index(drop=True)


def category_positions(column: pd.Series, order: tuple[str, ...] | pd.Series) -> np.ndarray:
    """Where in `order` each entry of a categorical column stands."""
    return pd.Index(order).get_indexer(column.cat.categories)[column.cat.codes]


def with_mean(grid: np.ndarray) -> np.ndarray:
    """The grid with the mean over its checkpoints (the first axis) put first, where there are several."""
    if len(grid) == 1:
        return grid
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.concatenate([np.nanmean(grid, axis=0, keepdims=True), grid])


def _grids(rows: pd.DataFrame, tuned: tuple[str, ...], matrices: pd.Series) -> dict[str, np.ndarray]:
    where = category_positions(rows["tuned"], tuned), category_positions(rows["matrix"], matrices)
    grids = {}
    for statistic in STATISTICS:
        grid = np.full((len(tuned), len(matrices)), np.nan)
        grid[where] = rows[statistic]
        if not np.isnan(grid).all():
            grids[statistic] = with_mean(grid)
    if len(tuned) > 1 and "p_value" in grids:
        grids["p_value"][0] = np.nan
    return grids
