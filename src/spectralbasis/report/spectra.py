"""Singular values before and after finetuning, cut down to what a page can carry."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from spectralbasis.report.measures import category_positions, with_mean
from spectralbasis.report.results import Results

_CARRIED = 400_000
_FEWEST_DIRECTIONS = 16


@dataclass(frozen=True)
class Spectra:
    """`base`, `low`, `high` of shape (matrices, directions), `tuned` of shape (selections, matrices, directions).

    With several checkpoints the first selection is their mean, and `low` to `high` their range. Where all of it would
    be too much to carry, that mean is the only selection, and `directions` are spaced evenly in their logarithm.
    """

    directions: np.ndarray
    base: np.ndarray
    tuned: np.ndarray
    low: np.ndarray
    high: np.ndarray


def spectra(results: Results, matrices: pd.Series, carried: int = _CARRIED) -> Spectra | None:
    """The leading singular values of `matrices` in every checkpoint; None where the comparison has none."""
    rows = results.spectra
    if rows.empty:
        return None
    depth = int(rows["index"].max()) + 1
    directions = _directions(depth, max(carried // (4 * len(matrices)), _FEWEST_DIRECTIONS))
    rows = rows[rows["index"].isin(directions)]
    every = (len(results.tuned), len(matrices), len(directions))
    where = _positions(rows, results.tuned, matrices, directions)
    is_base = (rows["metric"] == "singular_value_base").to_numpy()
    base, tuned = np.full(every[1:], np.nan), np.full(every, np.nan)
    base[where[1][is_base], where[2][is_base]] = rows["value"][is_base]
    tuned[tuple(axis[~is_base] for axis in where)] = rows["value"][~is_base]
    low, high = np.fmin.reduce(tuned), np.fmax.reduce(tuned)
    selections = with_mean(tuned)
    return Spectra(directions, base, selections if selections.size <= carried else selections[:1], low, high)


def _directions(depth: int, most: int) -> np.ndarray:
    if depth <= most:
        return np.arange(depth)
    return np.unique(np.geomspace(1, depth, most).round().astype(int)) - 1


def _positions(
    rows: pd.DataFrame, tuned: tuple[str, ...], matrices: pd.Series, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        category_positions(rows["tuned"], tuned),
        category_positions(rows["matrix"], matrices),
        np.searchsorted(directions, rows["index"].to_numpy()),
    )
