"""Read and check the results in a comparison folder, compute the headline numbers, and prepare both for a page.

Names and tables may come from an unknown source.
"""

import base64
import hashlib
import html
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NotRequired

import jinja2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from markupsafe import Markup
from numpy.typing import ArrayLike
from typing_extensions import TypedDict

from spectralbasis.checkpoints.weight_files import inside
from spectralbasis.comparison.nulls import HAAR
from spectralbasis.comparison.summary import Summary
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path, claim_files
from spectralbasis.printable import printable
from spectralbasis.records import Count, Finite, read_record
from spectralbasis.version import __version__

_HERE = Path(__file__).parent


def write_page(folder: Path, page: str) -> Path:
    """Write `index.html` into a folder that is ours, and return its path.

    Raises:
        InputError: the page cannot be written, or the file there is another's.
    """
    target = folder / "index.html"
    claim_files(folder, target.name)
    with atomic_path(target) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))
    return target


def render_page(
    template: str, script: str, functions: Iterable[Callable[..., str]], payload: Any, **values: Any
) -> str:
    """A page of this folder as HTML that holds its style, scripts and numbers, and lets no other script run.

    Args:
        template: file of the template.
        script: file of the page's own script.
        functions: what the template calls, by name.
        payload: what the script reads, as JSON.
        **values: what the template shows.
    """
    from plotly.offline import get_plotlyjs  # imported once the results were read: it is slow

    templates = environment()
    templates.globals |= {function.__name__: function for function in functions}
    plotly, own = Markup(get_plotlyjs()), Markup((_HERE / script).read_text(encoding="utf-8"))
    return templates.get_template(template).render(
        version=__version__,
        policy=f"{script_hash(plotly)} {script_hash(own)}",
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        plotly=plotly,
        script=own,
        payload=script_json(payload),
        **values,
    )


def environment() -> jinja2.Environment:
    """Templates of this folder, whose names and texts stay text: markup is escaped, and nothing is invisible."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        finalize=_visible_text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _visible_text(value: Any) -> Any:
    """A value of a template with its invisible characters as escapes; what is markup already stays as it is."""
    return printable(value, lines=True) if type(value) is str else value


def _visible(value: Any) -> Any:
    if isinstance(value, dict):
        return {_visible_text(key): _visible(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_visible(one) for one in value]
    return _visible_text(value)


def script_json(value: Any) -> Markup:
    """`value` as JSON that is safe inside a `<script>` element: no character can end it or start markup.

    Characters that a reader cannot see, such as those that turn the direction of writing, are written as escapes.
    """
    text = json.dumps(_visible(value), allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def script_hash(script: str) -> str:
    """The Content-Security-Policy source that allows this inline script and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def plotly_text(name: str) -> str:
    """`name` as Plotly shows it literally: its labels interpret tags, entities and, between dollars, TeX."""
    text = html.escape(name, quote=False).replace("$", "&#36;")
    return f"&#118;{text[1:]}" if text.startswith("var(") else text  # or the page's script would take it for a colour


def packed(values: ArrayLike) -> str:
    """An array as base64 of little-endian float32, row by row."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


def rounded(values: Iterable[float], digits: int = 5) -> list[float | None]:
    """The values to so many significant digits; None for what JSON cannot say."""
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values]


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each path where that tells them apart, else the names as they are."""
    last = [PurePosixPath(name).name or name for name in names]
    return last if len(set(last)) == len(last) else list(names)


STATISTICS = ("value", "null_mean", "z", "p_value")


@dataclass(frozen=True)
class Measure:
    """One number of a matrix: where it stands in the table of measurements, and how the page writes it.

    Attributes:
        key: its name in the page.
        metric: of the table's rows.
        side: of the table's rows; "both" always counts.
        label: heading of its column.
        digits: decimals that are shown.
        percent: whether it is a share, shown in percent.
        title: of its chart against k; empty where there is none.
        formula: beside the title.
    """

    key: str
    metric: str
    side: str
    label: str
    digits: int
    percent: bool = False
    title: str = ""
    formula: str = ""

    @property
    def chart(self) -> str:
        """Id of the element that its chart is drawn in."""
        return self.key.replace("_", "-")

    def rows(self, measurements: pd.DataFrame) -> pd.DataFrame:
        """The rows of this measure."""
        return measurements[(measurements["metric"] == self.metric) & measurements["side"].isin([self.side, "both"])]

    def unrelated(self, k: Any, m: Any, n: Any) -> Any:
        """Its mean where nothing relates the directions."""
        return HAAR.closed_forms[self.metric, self.side](k, m, n)


OVERLAP = (
    Measure("overlap_left", "subspace_overlap", "left", "Overlap, left", 4, False, "Left vectors", "‖U₀ᵀU₁‖² / k"),
    Measure("overlap_right", "subspace_overlap", "right", "Overlap, right", 4, False, "Right vectors", "‖V₀ᵀV₁‖² / k"),
)
COVERAGE = (
    Measure("coverage_core", "coverage_core", "both", "Coverage, core", 2, True, "Core", "‖UᵀΔWV‖²"),
    Measure("coverage_diagonal", "coverage_diagonal", "both", "Coverage, diagonal", 3, True, "Diagonal", "Σ(uᵢᵀΔWvᵢ)²"),
    Measure("coverage_left", "coverage_left", "left", "Coverage, left", 2, True, "Left", "‖UᵀΔW‖²"),
    Measure("coverage_right", "coverage_right", "right", "Coverage, right", 2, True, "Right", "‖ΔWV‖²"),
)
SCALAR = (
    Measure("step", "update_norm_relative", "both", "Relative step", 2, percent=True),
    Measure("stable_rank_base", "stable_rank_base", "both", "Stable rank of W₀", 1),
    Measure("stable_rank_update", "stable_rank_update", "both", "Stable rank of ΔW", 1),
    Measure("effective_rank_update", "effective_rank_update", "both", "Effective rank of ΔW", 1),
    Measure("intruders", "intruders", "left", "Intruders", 1),
)
MEASURES = (*OVERLAP, *COVERAGE, *SCALAR)
CURVES = tuple(dict.fromkeys(measure.metric for measure in (*OVERLAP, *COVERAGE)))
SPECTRA = ("singular_value_base", "singular_value_tuned")

_NAMES = ("tuned", "matrix", "kind", "metric", "side", "null")
_LEAST = {"layer": -1, "m": 1, "n": 1, "k": 1, "index": -1}
"""Column of whole numbers → the smallest that it may hold."""
_MEASUREMENT_COLUMNS = (*_NAMES, "layer", "m", "n", "k", "value", "null_mean", "null_std", "z", "p_value")
_SPECTRUM_COLUMNS = ("tuned", "matrix", "metric", "index", "value")
_SPARSEST = 1_000_000
"""Pairs of a checkpoint and a matrix that a page holds without asking whether the table has rows of them."""


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

    `measurements` holds the metrics of `MEASURES`, `spectra` those of `SPECTRA`; both keep the columns of
    `comparison.parquet`, names as categories. `tuning` is None where the folder has no `tuning.json`.
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
    if not (folder / "summary.json").exists():
        raise InputError(f"there is no {folder / 'summary.json'}; {_again(folder)}")
    summary = read_record(folder / "summary.json", Summary, _again(folder))
    measurements = _read_rows(table, _MEASUREMENT_COLUMNS, [measure.metric for measure in MEASURES])
    if measurements.empty:
        raise InputError(f"{table} holds no measurement, so there is nothing to draw; {_again(folder)}")
    spectra = _read_rows(table, _SPECTRUM_COLUMNS, SPECTRA)
    _check_measurements(table, measurements)
    _check_spectra(table, spectra, measurements)
    tuning = folder / "tuning.json"
    if not tuning.exists():
        return Results(measurements, spectra, summary)
    content = read_record(tuning, TuningTable, "remove the file, or write it again")
    if not content["rows"]:
        raise InputError(f"{tuning} has no rows; remove the file, or write it again")
    return Results(measurements, spectra, summary, Tuning(pd.DataFrame(content["rows"]), content["note"]))


_MOST_ROWS = 20_000_000
"""Of a table: thousands of matrices of dozens of checkpoints have fewer; packed, more take no room in a file."""


def _read_rows(path: Path, columns: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    if not path.exists():
        raise InputError(f"there is no {path}; {_again(path.parent)}")
    if not path.is_file():
        raise InputError(f"{path} is not a regular file; {_again(path.parent)}")
    try:
        # Batch by batch: read_table with a filter can hang on a damaged file.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_columns(path, file.schema_arrow, columns)
            if file.metadata.num_rows > _MOST_ROWS:
                raise InputError(f"{path} has {file.metadata.num_rows} rows, expected at most {_MOST_ROWS}")
            wanted = pa.array(metrics, pa.string())
            batches = (pa.Table.from_batches([batch]) for batch in file.iter_batches(columns=list(columns)))
            found = (batch.filter(pc.is_in(batch["metric"].cast(pa.string()), value_set=wanted)) for batch in batches)
            table = pa.concat_tables([file.schema_arrow.empty_table().select(columns), *found])
            typed = {name: _typed(name, table[name]) for name in columns}
    except InputError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path} is not a readable Parquet file ({error}); {_again(path.parent)}") from error
    for name, least in _LEAST.items():
        if name in columns and table.num_rows:
            empty, smallest = typed[name].null_count, pc.min(typed[name]).as_py()
            if empty or smallest < least:
                got = "empty" if empty else str(smallest)
                raise InputError(
                    f"{name} of a row of {path} is {got}, expected at least {least}; {_again(path.parent)}"
                )
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


def _again(directory: Path) -> str:
    return f"run `spectralbasis compare BASE TUNED... -o {directory}` to write it"


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
        grids[measure.key] = _grids(measure.rows(rows), results.tuned, matrices["matrix"])
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
