"""Carrying names and numbers into the page, where a name can be anything and must stay text."""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike


def script_json(value: Any) -> Markup:
    """`value` as JSON that is safe inside a `<script>` element: no character can end it or start markup."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def script_hash(script: str) -> str:
    """The Content-Security-Policy source that allows this inline script and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def plotly_text(name: str) -> str:
    """`name` as Plotly shows it literally: its labels interpret tags, entities and, between dollars, TeX."""
    return html.escape(name, quote=False).replace("$", "&#36;")


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
