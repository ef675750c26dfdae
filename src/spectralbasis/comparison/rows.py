"""One measurement of one matrix: the row of `comparison.parquet`."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from operator import attrgetter

import pandas as pd


@dataclass(frozen=True, slots=True)
class Row:
    """A measurement; the fields are the table's columns in their order.

    `k` is the number of leading directions that the row speaks of, `side` is "left", "right" or "both", `index` is the
    direction (from 0) or -1. The last five are empty where no null was drawn for the measurement.
    """

    tuned: str
    matrix: str
    layer: int
    kind: str
    m: int
    n: int
    k: int
    metric: str
    side: str
    index: int
    value: float
    null: str = ""
    null_mean: float = math.nan
    null_std: float = math.nan
    z: float = math.nan
    p_value: float = math.nan


COLUMNS = tuple(field.name for field in fields(Row))
row_values = attrgetter(*COLUMNS)
"""The values of a row, in the order of `COLUMNS`."""


def to_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """The rows as a table with one column per field, also where there are none."""
    frame = pd.DataFrame([row_values(row) for row in rows], columns=list(COLUMNS))
    integers = dict.fromkeys(("layer", "m", "n", "k", "index"), "int64")
    floats = dict.fromkeys(("value", "null_mean", "null_std", "z", "p_value"), "float64")
    return frame.astype(integers | floats)
