"""The HTML page of a study: every claim with its verdict, and the tables and figures that show why."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path
from spectralbasis.report.embed import script_hash, script_json
from spectralbasis.version import __version__

RESULTS = "results.json"
FIGURES = "figures.json"
_HERE = Path(__file__).parent


def write_study_report(directory: Path | str) -> Path:
    """Write `index.html` into the folder of a study and return its path.

    Reads `results.json` and, where present, `figures.json`. The page needs nothing beside itself.

    Raises:
        InputError: a file is missing or cannot be read, or the page cannot be written.
    """
    folder = Path(directory)
    page = render_study(_read(folder / RESULTS), _read(folder / FIGURES) if (folder / FIGURES).exists() else {})
    target = folder / "index.html"
    with atomic_path(target) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))
    return target


def render_study(results: dict[str, Any], figures: dict[str, dict[str, Any]]) -> str:
    """The page as HTML, from the content of `results.json` and, by experiment and title, Plotly figures."""
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
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def devices_used(devices: Mapping[str, int]) -> str:
    """Where the finished runs were done, as the end of a sentence."""
    if len(devices) < 2:
        return "".join(f" on {name}" for name in devices)
    return " on " + " and ".join(f"{name} ({number} runs)" for name, number in devices.items())


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"cell": cell, "devices_used": devices_used}
    return environment.get_template("study_page.html")


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} cannot be read ({error}); `spectralbasis study ... -o {file.parent}` writes it"
        ) from error
