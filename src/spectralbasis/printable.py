"""Make text of unknown origin (names of tensors, files, tasks, labels) safe for the place that shows it.

Use `printable` for a terminal, a log or a message, `warn` for a warning, `in_markup` for rich tables, `in_markdown` and
`in_code` for model cards; page templates escape names themselves. No such name becomes part of a path. `track` draws
progress on stderr, so that stdout holds only results.
"""

import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that a reader does not see as they are: control and format characters, surrogates, separators."""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$&])")
_BACKTICKS = re.compile("`+")
_LONGEST = 300
_LONGEST_WARNING = 4000
T = TypeVar("T")


def printable(text: object, *, lines: bool = False) -> str:
    r"""The text with every character that a terminal acts on, or that a reader cannot see, written as an escape.

    Args:
        text: what to show.
        lines: keep line breaks and tabs; for text that this package wrote itself.

    Examples:
        >>> printable("layer\x1b[31m.weight")
        'layer\\x1b[31m.weight'
    """
    shown, kept = str(text), "\n\t" if lines else ""
    if shown.isprintable():
        return shown
    return "".join(
        character
        if character in kept or unicodedata.category(character) not in _UNSEEN
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in shown
    )


def shortened(text: object, longest: int = _LONGEST) -> str:
    """The printable text, cut in its middle where it is longer than a message can carry."""
    shown = printable(text)
    if len(shown) <= longest:
        return shown
    half = longest // 2 - 1
    return f"{shown[:half]}…{shown[-half:]}"


def warn(message: str, stacklevel: int = 2) -> None:
    """As `warnings.warn`, of a message that may quote names out of files."""
    warnings.warn(shortened(message, _LONGEST_WARNING), stacklevel=stacklevel + 1)


def in_markup(text: object) -> str:
    """The text for a table drawn with rich, which then shows it as it is."""
    from rich.markup import escape  # takes longer to import than a command that fails at once

    return escape(printable(text, lines=True))


def in_markdown(text: object) -> str:
    """The text for a Markdown file, which then shows it as it is, on one line."""
    return _MARKDOWN.sub(r"\\\1", printable(text))


def in_code(text: object) -> str:
    """The text as a span of code in a Markdown file, on one line, whatever backticks it holds."""
    shown = printable(text)
    fence = "`" * (max(map(len, _BACKTICKS.findall(shown)), default=0) + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def track(items: Iterable[T], description: str, *, total: int, enabled: bool) -> Iterator[T]:
    """Yield `items`, drawing a bar with the expected time where `enabled`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not enabled, transient=True) as bar:
        yield from bar.track(items, total=total, description=description)
