"""The HTML page of a study: every claim with its verdict, and the tables and figures that show why."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from typing_extensions import TypedDict

from spectralbasis.checkpoints.weight_files import inside
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path, claim_files
from spectralbasis.records import Count, Finite, Schema, read_record
from spectralbasis.report.results import environment, script_hash, script_json
from spectralbasis.version import __version__

RESULTS = "results.json"
FIGURES = "figures.json"
_HERE = Path(__file__).parent


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


class TableEntry(TypedDict):
    """One table in `results.json`: its columns, and its rows."""

    columns: list[str]
    data: list[list[bool | int | Finite | str | None]]


class PartEntry(TypedDict):
    """One experiment in `results.json`."""

    question: str
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
    page = render_study(read_study(folder), read_figures(folder))
    target = folder / "index.html"
    claim_files(folder, target.name)
    with atomic_path(target) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))
    return target


def render_study(results: StudyResults, figures: StudyFigures) -> str:
    """The page as HTML, from the content of `results.json` and of `figures.json`."""
    plotly, script = Markup(get_plotlyjs()), Markup((_HERE / "study_page.js").read_text(encoding="utf-8"))
    numbered = {name: [(f"{name}-{i}", title) for i, title in enumerate(drawn)] for name, drawn in figures.items()}
    payload = {key: figures[name][title] for name, drawn in numbered.items() for key, title in drawn}
    return _template().render(
        results=results,
        figures=numbered,
        version=__version__,
        policy=f"{script_hash(plotly)} {script_hash(script)}",
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        plotly=plotly,
        script=script,
        payload=script_json(payload),
    )


def cell(value: Any) -> str:
    """A cell of a table: whole numbers in full, others to four significant digits, nothing for what is not there."""
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,d}"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def devices_used(devices: Mapping[str, int]) -> str:
    """Where the finished runs were done, as the end of a sentence."""
    if len(devices) < 2:
        return "".join(f" on {name}" for name in devices)
    return " on " + " and ".join(f"{name} ({number} runs)" for name, number in devices.items())


def _template() -> jinja2.Template:
    templates = environment()
    templates.globals |= {"cell": cell, "devices_used": devices_used}
    return templates.get_template("study_page.html")


def read_study(folder: Path) -> StudyResults:
    """The content of `results.json` of a folder.

    Raises:
        InputError: it is missing, cannot be read, or is not what a study writes.
    """
    results = _read(inside(folder, RESULTS), StudyResults)
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
    figures = _read(file, StudyFigures)
    try:
        script_json(figures)
    except ValueError as error:
        raise InputError(
            f"{file} holds NaN or an infinite number, expected finite ones; {_study_again(folder)}"
        ) from error
    return figures


def _read(file: Path, schema: type[Schema]) -> Schema:
    return read_record(file, schema, _study_again(file.parent))


def _study_again(folder: Path) -> str:
    return f"`spectralbasis study ... -o {folder}` writes it"
