"""Carrying names and numbers into the page, where a name can be anything and must stay text."""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike

from spectralbasis.printable import printable


def environment() -> jinja2.Environment:
    """Templates of this folder, whose names and texts stay text: markup is escaped, and nothing is invisible."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
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
