"""Reading what a comparison left in its folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from spectralbasis.checkpoints.folder_files import inside
from spectralbasis.comparison.summary import Summary
from spectralbasis.errors import InputError
from spectralbasis.records import Count, Finite, Schema, read_record

CURVES = ("subspace_overlap", "coverage_core", "coverage_diagonal", "coverage_left", "coverage_right")
SCALARS = ("update_norm_relative", "stable_rank_base", "stable_rank_update", "effective_rank_update", "intruders")
SPECTRA = ("singular_value_base", "singular_value_tuned")

_NAMES = ("tuned", "matrix", "kind", "metric", "side", "null")
_LEAST = {"layer": -1, "m": 1, "n": 1, "k": 1, "index": -1}
"""Column of whole numbers → the smallest that it may hold."""
_MEASUREMENT_COLUMNS = (*_NAMES, "layer", "m", "n", "k", "value", "null_mean", "null_std", "z", "p_value")
_SPECTRUM_COLUMNS = ("tuned", "matrix", "metric", "index", "value")
_SPARSEST = 1_000_000
"""Pairs of a checkpoint and a matrix that a page holds without asking whether the table has rows of them."""
_AGAIN = "run `spectralbasis compare BASE TUNED... -o {directory}` to write it"


class TuningRow(TypedDict):
    """One run in `tuning.json` beside a comparison."""

    task: str
    method: str
    coefficients: str
    metric: str
    score: Finite
    parameters_backbone: Count
    parameters_head: Count
    share_backbone: Finite
    share_head: NotRequired[Finite]
    adapter_bytes: Count
    seconds_per_step: Finite
    seed: int


class TuningTable(TypedDict):
    """The content of `tuning.json` beside a comparison."""

    rows: list[TuningRow]
    note: str


@dataclass(frozen=True)
class Tuning:
    """Scores of tuned adapters: one row per run, and what a reader should know of how they were made."""

    rows: pd.DataFrame
    note: str = ""


@dataclass(frozen=True)
class Results:
    """One comparison as its folder holds it, cut down to what the page draws.

    `measurements` holds the metrics of `CURVES` and `SCALARS`, `spectra` those of `SPECTRA`; both keep the columns
    of `comparison.parquet`, names as categories. `tuning` is None where the folder has no `tuning.json`.
    """

    measurements: pd.DataFrame
    spectra: pd.DataFrame
    summary: Summary
    tuning: Tuning | None = None

    @property
    def tuned(self) -> tuple[str, ...]:
        """The finetuned checkpoints that have measurements, in the summary's order."""
        measured = list(self.measurements["tuned"].cat.categories)
        listed = [name for name in self.summary["tuned"] if name in measured]
        return tuple(dict.fromkeys(listed + measured))


def read_results(directory: Path | str) -> Results:
    """Read `comparison.parquet`, `summary.json` and, where present, `tuning.json` of `directory`.

    Raises:
        InputError: a file is missing, cannot be read, or holds something else than `compare` writes there.
    """
    folder = Path(directory)
    table = folder / "comparison.parquet"
    for name in ("summary.json", table.name, "tuning.json"):
        inside(folder, name)
    summary = _read_record(folder / "summary.json", Summary)
    measurements = _read_rows(table, _MEASUREMENT_COLUMNS, (*CURVES, *SCALARS))
    if measurements.empty:
        raise InputError(f"{table} holds no measurement, so there is nothing to draw; {_again(folder)}")
    spectra = _read_rows(table, _SPECTRUM_COLUMNS, SPECTRA)
    _check_measurements(table, measurements)
    _check_spectra(table, spectra, measurements)
    return Results(measurements, spectra, summary, _read_tuning(folder / "tuning.json"))


def _read_tuning(path: Path) -> Tuning | None:
    if not path.exists():
        return None
    content = read_record(path, TuningTable, "remove the file, or write it again")
    if not content["rows"]:
        raise InputError(f"{path} has no rows; remove the file, or write it again")
    return Tuning(pd.DataFrame(content["rows"]), content["note"])


def _read_record(path: Path, schema: type[Schema]) -> Schema:
    if not path.exists():
        raise InputError(f"there is no {path}; {_again(path.parent)}")
    return read_record(path, schema, _again(path.parent))


_MOST_ROWS = 20_000_000
"""Of a table: thousands of matrices of dozens of checkpoints have fewer; packed, more take no room in a file."""


def _read_rows(path: Path, columns: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    if not path.exists():
        raise InputError(f"there is no {path}; {_again(path.parent)}")
    if not path.is_file():
        raise InputError(f"{path} is no regular file; {_again(path.parent)}")
    try:
        # Batch by batch: read_table with a filter can hang on a damaged file.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_columns(path, file.schema_arrow, columns)
            if file.metadata.num_rows > _MOST_ROWS:
                raise InputError(f"{path} has {file.metadata.num_rows} rows, expected at most {_MOST_ROWS}")
            wanted = pa.array(metrics, pa.string())
            batches = map(_as_table, file.iter_batches(columns=list(columns)))
            found = (batch.filter(pc.is_in(batch["metric"].cast(pa.string()), value_set=wanted)) for batch in batches)
            table = pa.concat_tables([file.schema_arrow.empty_table().select(columns), *found])
            typed = {name: _typed(name, table[name]) for name in columns}
    except InputError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path} is not a readable Parquet file ({error}); {_again(path.parent)}") from error
    for name, least in _LEAST.items():
        if name in columns and table.num_rows:
            _check_whole(path, name, typed[name], least)
    return pa.table(typed).to_pandas()  # without the file's metadata: plain columns need none, and it may be damaged


def _check_columns(path: Path, schema: pa.Schema, columns: Sequence[str]) -> None:
    lacking = sorted(set(columns) - set(schema.names))
    if lacking:
        raise InputError(f"{path} lacks the columns {', '.join(lacking)}; {_again(path.parent)}")
    for name in columns:
        if schema.names.count(name) > 1:
            raise InputError(f"{path} has the column {name} twice; {_again(path.parent)}")
        expected = "text" if name in _NAMES else "whole numbers" if name in _LEAST else "numbers"
        if not _is_of(schema.field(name).type, expected):
            raise InputError(
                f"the column {name} of {path} is of type {schema.field(name).type}, expected {expected}; "
                f"{_again(path.parent)}"
            )


def _is_of(kind: pa.DataType, expected: str) -> bool:
    if expected == "text":
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        # A column that is empty from top to bottom, as `null` of a comparison without one, has no type or that of NaN.
        return any(is_kind(plain) for is_kind in texts) or pa.types.is_null(plain) or pa.types.is_floating(plain)
    return pa.types.is_integer(kind) or (
        expected == "numbers" and (pa.types.is_floating(kind) or pa.types.is_null(kind))
    )


def _typed(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if name in _LEAST:
        return column.cast(pa.int64())
    if name not in _NAMES:
        return column.cast(pa.float64())
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    return pc.fill_null(column.cast(pa.string()), "").dictionary_encode()


def _check_whole(path: Path, name: str, column: pa.ChunkedArray, least: int) -> None:
    smallest = pc.min(column).as_py()
    if column.null_count or smallest < least:
        found = "empty" if column.null_count else str(smallest)
        raise InputError(f"{name} of a row of {path} is {found}, expected at least {least}; {_again(path.parent)}")


def _check_measurements(path: Path, rows: pd.DataFrame) -> None:
    """Refuse a table whose rows contradict each other, or would take a page of far more cells than it has rows."""
    twice = rows.duplicated(["tuned", "matrix", "metric", "side", "k"])
    if twice.any():
        row = rows[twice].iloc[0]
        raise InputError(
            f"{path} has two rows of {row['metric']} (side {row['side']}, k={row['k']}) of {row['matrix']} in "
            f"{row['tuned']}, expected one; {_again(path.parent)}"
        )
    places = rows[["matrix", "layer", "kind", "m", "n"]].drop_duplicates()
    if places["matrix"].duplicated().any():
        name = places.loc[places["matrix"].duplicated(), "matrix"].iloc[0]
        raise InputError(f"{path} has {name} in two layers, kinds or shapes; {_again(path.parent)}")
    sides = (("checkpoints", "tuned", "matrices", "matrix"), ("kinds of matrix", "kind", "layers", "layer"))
    for first, one, second, other in sides:
        cells = rows[one].nunique() * rows[other].nunique()
        if cells > max(_SPARSEST, 4 * len(rows)):
            raise InputError(
                f"{path} has {rows[one].nunique()} {first} and {rows[other].nunique()} {second} in {len(rows)} rows, "
                f"expected a row for most pairs of them; {_again(path.parent)}"
            )


def _check_spectra(path: Path, rows: pd.DataFrame, measurements: pd.DataFrame) -> None:
    """Refuse singular values without a direction, or of what was not measured."""
    if rows.empty:
        return
    if rows["index"].min() < 0:
        raise InputError(f"index of a singular value in {path} is negative, expected at least 0; {_again(path.parent)}")
    for name in ("tuned", "matrix"):
        strangers = set(rows[name].unique()) - set(measurements[name].unique())
        if strangers:
            raise InputError(
                f"{path} has singular values of {min(strangers)} and no measurement of it; {_again(path.parent)}"
            )


def _as_table(batch: pa.RecordBatch) -> pa.Table:
    return pa.Table.from_batches([batch])


def _again(directory: Path) -> str:
    return _AGAIN.format(directory=directory)
