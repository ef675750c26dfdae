"""The HTML page of a study: every claim with its verdict, tables and figures."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from spectralbasis.checkpoints.weight_files import inside
from spectralbasis.errors import InputError
from spectralbasis.records import Count, Finite, read_record
from spectralbasis.report.results import render_page, script_json, write_page

RESULTS = "results.json"
FIGURES = "figures.json"
OVERVIEW = "index.md"
Stated = Literal["before", "changed", "after"]
STATED: Mapping[str, str] = {
    "before": "",
    "changed": "asked before the scores were seen; its error, family or examples were changed after",
    "after": "asked after the scores were seen",
}
"""When a claim was made → in words, where it was not wholly before its scores were seen."""


class ClaimEntry(TypedDict):
    """One claim in `results.json`; None where a number does not exist."""

    name: str
    text: str
    verdict: Literal["supported", "contradicted", "undecided"]
    effect: Finite | None
    low: Finite | None
    high: Finite | None
    p_value: Finite | None
    unit: str
    would_change: str
    runs: Count
    units: str
    margin: Finite
    stated: Stated
    primary: bool


class TableEntry(TypedDict):
    """One table in `results.json`: its columns, and its rows."""

    columns: list[str]
    data: list[list[bool | int | Finite | str | None]]


class PartEntry(TypedDict):
    """One experiment in `results.json`."""

    title: str
    question: str
    answer: str
    planned: Count
    finished: Count
    failed: dict[str, str]
    seconds: Finite
    devices: dict[str, Count]
    claims: list[ClaimEntry]
    tables: dict[str, TableEntry]
    note: str


class StudyResults(TypedDict):
    """The content of `results.json`."""

    preset: str
    command: str
    commit: str
    versions: dict[str, str]
    experiments: dict[str, PartEntry]


class FigureEntry(TypedDict):
    """One figure in `figures.json`, as Plotly writes it."""

    data: list[dict[str, Any]]
    layout: dict[str, Any]


StudyFigures = dict[str, dict[str, FigureEntry]]
"""The content of `figures.json`: experiment → title → figure."""


def write_study_report(directory: Path | str) -> Path:
    """Write `index.html` into the folder of a study and return its path.

    Reads `results.json` and, where present, `figures.json`. The page needs nothing beside itself.

    Raises:
        InputError: a file is missing or cannot be read, or the page cannot be written.
    """
    folder = Path(directory)
    results, figures = read_study(folder), read_figures(folder)
    numbered = {name: [(f"{name}-{i}", title) for i, title in enumerate(drawn)] for name, drawn in figures.items()}
    payload = {key: figures[name][title] for name, drawn in numbered.items() for key, title in drawn}
    page = render_page(
        "study_page.html",
        "study_page.js",
        (cell, devices_used, two_digits),
        payload,
        results=results,
        figures=numbered,
        stated=STATED,
    )
    return write_page(folder, page)


def cell(value: Any) -> str:
    """A cell of a table: whole numbers in full, others to four significant digits, nothing for what is not there."""
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,d}"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def two_digits(value: float) -> str:
    """A number with its sign and two significant digits, without an exponent; whole from 100 on.

    Example:
        >>> two_digits(-0.0080123), two_digits(0.5), two_digits(12.3), two_digits(1234.5)
        ('-0.0080', '+0.50', '+12', '+1,234')
    """
    if abs(value) >= 100:
        return f"{value:+,.0f}"
    if value == 0:
        return "0"
    return f"{value:+.{max(0, 1 - math.floor(math.log10(abs(float(f'{value:.1e}')))))}f}"


def devices_used(devices: Mapping[str, int]) -> str:
    """Where the finished runs were done, as the end of a sentence."""
    if len(devices) < 2:
        return "".join(f" on {name}" for name in devices)
    return " on " + " and ".join(f"{name} ({number} runs)" for name, number in devices.items())


def read_study(folder: Path) -> StudyResults:
    """The content of `results.json` of a folder.

    Raises:
        InputError: it is missing, cannot be read, or is not what a study writes.
    """
    results = read_record(inside(folder, RESULTS), StudyResults, _study_again(folder))
    for name, part in results["experiments"].items():
        for title, table in part["tables"].items():
            wrong = next((row for row in table["data"] if len(row) != len(table["columns"])), None)
            if wrong is not None:
                raise InputError(
                    f"{folder / RESULTS}: a row of the table {title!r} of {name} has {len(wrong)} cells, expected "
                    f"{len(table['columns'])}; {_study_again(folder)}"
                )
    return results


def read_figures(folder: Path) -> StudyFigures:
    """The content of `figures.json` of a folder; empty where there is none.

    Raises:
        InputError: it cannot be read, or is not what a study writes.
    """
    file = inside(folder, FIGURES)
    if not file.exists():
        return {}
    figures = read_record(file, StudyFigures, _study_again(folder))
    try:
        script_json(figures)
    except ValueError as error:
        raise InputError(
            f"{file} holds NaN or an infinite number, expected finite ones; {_study_again(folder)}"
        ) from error
    return figures


def _study_again(folder: Path) -> str:
    return f"`spectralbasis study ... -o {folder}` writes it"
