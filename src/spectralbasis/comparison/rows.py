"""One measurement of one matrix: the rows of `comparison.parquet`, and between two checkpoints of `sharing.parquet`."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

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


@dataclass(frozen=True, slots=True)
class SharedRow:
    """A measurement between two finetuned checkpoints; as `Row`, but for `tuned_a` and `tuned_b`.

    `base_overlap_a` and `base_overlap_b` are what the base's leading subspace overlaps with each of theirs, beside a
    `subspace_overlap`.
    """

    tuned_a: str
    tuned_b: str
    matrix: str
    layer: int
    kind: str
    m: int
    n: int
    k: int
    metric: str
    side: str
    value: float
    null: str = ""
    null_mean: float = math.nan
    null_std: float = math.nan
    z: float = math.nan
    p_value: float = math.nan
    base_overlap_a: float = math.nan
    base_overlap_b: float = math.nan


_PANDAS = {int: "int64", float: "float64"}


_VALUES = {kind: attrgetter(*(field.name for field in fields(kind))) for kind in (Row, SharedRow)}


def row_values(row: Row | SharedRow) -> tuple[Any, ...]:
    """The values of a row, in the order of its fields."""
    return _VALUES[type(row)](row)


def to_frame(rows: Iterable[Row | SharedRow], kind: type[Row | SharedRow] = Row) -> pd.DataFrame:
    """The rows, all of one kind, as a table with one column per field, also where there are none."""
    columns = fields(kind)
    frame = pd.DataFrame([row_values(row) for row in rows], columns=[field.name for field in columns])
    return frame.astype({field.name: _PANDAS[field.type] for field in columns if field.type in _PANDAS})
