"""Reading what a comparison left in its folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spectralbasis.errors import InputError

CURVES = ("subspace_overlap", "coverage_core", "coverage_diagonal", "coverage_left", "coverage_right")
SCALARS = ("update_norm_relative", "stable_rank_base", "stable_rank_update", "effective_rank_update", "intruders")
SPECTRA = ("singular_value_base", "singular_value_tuned")

_NAMES = ("tuned", "matrix", "kind", "metric", "side", "null")
_MEASUREMENT_COLUMNS = (*_NAMES, "layer", "m", "n", "k", "value", "null_mean", "null_std", "z", "p_value")
_SPECTRUM_COLUMNS = ("tuned", "matrix", "metric", "index", "value")
_TUNING_KEYS = (
    "task",
    "method",
    "coefficients",
    "metric",
    "score",
    "parameters_backbone",
    "parameters_head",
    "share_backbone",
    "adapter_bytes",
    "seconds_per_step",
    "seed",
)
_AGAIN = "run `spectralbasis compare BASE TUNED... -o {directory}` to write it"


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
    summary: Mapping[str, Any]
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
        InputError: a file is missing, cannot be read, or lacks a column or key that the page needs.
    """
    folder = Path(directory)
    table = folder / "comparison.parquet"
    summary = _read_json(folder / "summary.json", ("base", "tuned", "stability", "coverage"))
    measurements = _read_rows(table, _MEASUREMENT_COLUMNS, (*CURVES, *SCALARS))
    if measurements.empty:
        raise InputError(f"{table} holds no measurement, so there is nothing to draw; {_again(folder)}")
    return Results(
        measurements=measurements,
        spectra=_read_rows(table, _SPECTRUM_COLUMNS, SPECTRA),
        summary=summary,
        tuning=_read_tuning(folder / "tuning.json"),
    )


def _read_tuning(path: Path) -> Tuning | None:
    if not path.exists():
        return None
    content = _read_json(path, ("rows",))
    rows = pd.DataFrame(content["rows"])
    lacking = [key for key in _TUNING_KEYS if key not in rows]
    if lacking:
        raise InputError(f"the rows of {path} lack {', '.join(lacking)}; remove the file, or write it again")
    return Tuning(rows, str(content.get("note") or ""))


def _read_json(path: Path, keys: Sequence[str]) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}; {_again(path.parent)}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); {_again(path.parent)}") from error
    lacking = [key for key in keys if not isinstance(content, dict) or key not in content]
    if lacking:
        raise InputError(f"{path} lacks {', '.join(lacking)}; {_again(path.parent)}")
    return content


def _read_rows(path: Path, columns: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    try:
        # Batch by batch: read_table with a filter can hang on a damaged file.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            lacking = set(columns) - set(file.schema_arrow.names)
            if lacking:
                raise InputError(f"{path} lacks the columns {', '.join(sorted(lacking))}; {_again(path.parent)}")
            wanted = pa.array(metrics, pa.string())
            batches = map(_as_table, file.iter_batches(columns=list(columns)))
            found = (batch.filter(pc.is_in(batch["metric"].cast(pa.string()), value_set=wanted)) for batch in batches)
            table = pa.concat_tables(
                [file.schema_arrow.empty_table().select(columns), *(one.select(columns) for one in found)]
            )
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}; {_again(path.parent)}") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path} is not a readable Parquet file ({error}); {_again(path.parent)}") from error
    names = [name for name in _NAMES if name in columns]
    for name in names:
        position = table.column_names.index(name)
        column = pc.fill_null(table[name].cast(pa.string()), "").dictionary_encode()
        table = table.set_column(position, name, column)
    return table.replace_schema_metadata(None).to_pandas()  # plain columns need none, and it may be damaged


def _as_table(batch: pa.RecordBatch) -> pa.Table:
    return pa.Table.from_batches([batch])


def _again(directory: Path) -> str:
    return _AGAIN.format(directory=directory)
