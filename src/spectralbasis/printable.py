"""Text of unknown origin, made safe for the place where it is shown.

Names of tensors, files, tasks and labels come from files that others wrote. Every one passes through the function of
the place that it reaches: `printable` for a terminal, a log or a message, `in_markup` for a table drawn with rich,
`in_markdown` for a model card. Pages escape names in their templates (`report/page.py`).
"""

import re
import unicodedata

_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that a reader does not see as they are: control and format characters, surrogates, separators."""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+!|~$&-])")
_LONGEST = 300


def printable(text: object, *, lines: bool = False) -> str:
    r"""The text with every character that a terminal acts on, or that a reader cannot see, written as an escape.

    Args:
        text: what to show.
        lines: keep line breaks and tabs; for text that this package wrote itself.

    Example:
        >>> printable("layer\x1b[31m.weight")
        'layer\\x1b[31m.weight'
    """
    kept = "\n\t" if lines else ""
    return "".join(
        character if character in kept or unicodedata.category(character) not in _UNSEEN else _escaped(character)
        for character in str(text)
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def shortened(text: object, longest: int = _LONGEST) -> str:
    """The printable text, cut in its middle where it is longer than a message can carry."""
    shown = printable(text)
    if len(shown) <= longest:
        return shown
    half = longest // 2 - 1
    return f"{shown[:half]}…{shown[-half:]}"


def in_markup(text: object) -> str:
    """The text for a table drawn with rich, which then shows it as it is."""
    from rich.markup import escape  # takes longer to import than a command that fails at once

    return escape(printable(text, lines=True))


def in_markdown(text: object) -> str:
    """The text for a Markdown file, which then shows it as it is, on one line."""
    return _MARKDOWN.sub(r"\\\1", printable(text))
