"""The values of a user's rows, each checked: texts, pictures, conversations, and labels as words or numbers.

A value that cannot be used is refused with its file, line and column.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from spectralbasis.errors import InputError
from spectralbasis.extras import require_extra
from spectralbasis.printable import shortened, warn
from spectralbasis.training.data_files import first_line
from spectralbasis.training.table_files import Table
from spectralbasis.training.tasks import Layout

FEW = 20
"""Up to so many different whole numbers may be names of classes."""
MOST_BLANK = 0.1
"""Share of the rows that may be without text."""
_NUMBER = re.compile(r"[-+]?(?:0|[1-9]\d*)?(?:\.\d*)?(?:[eE][-+]?\d+)?")
_COMMA = re.compile(r"[-+]?\d+,\d+")
_ROLES = ("system", "user", "assistant", "tool")


def is_blank(value: Any) -> bool:
    """Whether a row has no text: nothing, or only blanks."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def input_of(table: Table, kind: str, number: int, column: str, value: Any) -> Any:
    """What the model reads of a row, checked; see `is_blank` for what comes before.

    Raises:
        InputError: it is of another type.
    """
    if kind == "images":
        return picture(table, number, column, value)
    if kind == "instructions" and not isinstance(value, str):
        return conversation(table, number, column, value)
    if not isinstance(value, str):
        raise InputError(
            f"{table.at(number, column)}: found {shortened(repr(value), 60)}, {type_of(value)}, expected text"
        )
    return value


class Blanks:
    """Counts the rows without text, which are left out: a few are usual in real tables, many are a wrong column."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.count = 0
        self.first = ""

    def takes(self, number: int, columns: Sequence[str], values: Sequence[Any]) -> bool:
        """Whether a row lacks the text of one of its columns; it is counted then."""
        for column, value in zip(columns, values, strict=True):
            if is_blank(value):
                self.count += 1
                self.first = self.first or self.table.at(number, column)
                return True
        return False

    def said(self, rows: int) -> list[str]:
        """The sentence about them, beside so many rows with text; nothing where there are none.

        Raises:
            InputError: more than a tenth of all rows have no text.
        """
        if not self.count:
            return []
        if self.count > MOST_BLANK * (rows + self.count):
            raise InputError(
                f"{self.first}: the text is empty, as in {self.count:,} of {rows + self.count:,} rows; fill it in, "
                "name another column with --text, or remove these rows"
            )
        left_out = "1 row without text is" if self.count == 1 else f"{self.count:,} rows without text are"
        return [f"{self.first}: the text is empty; {left_out} left out."]


def picture(table: Table, number: int, column: str, value: Any) -> Any:
    """A picture of a row: its path, or an image of Pillow; one that cannot be opened is refused."""
    require_extra("images", "reading pictures")
    from PIL import Image

    if isinstance(value, str):
        try:
            with Image.open(value) as opened:
                opened.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{value} cannot be read as a picture: {first_line(error)}; remove or mend it") from error
    elif not isinstance(value, Image.Image):
        raise InputError(f"{table.at(number, column)}: found a {type(value).__name__}, expected a picture")
    return value


def conversation(table: Table, number: int, column: str, value: Any) -> list[dict[str, str]]:
    """The messages of a row: a list of objects with a role and a content.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, list) or not value:
        raise InputError(
            f"{table.at(number, column)}: found {shortened(repr(value), 60)}, expected a list of messages, each "
            'like {"role": "user", "content": "…"}'
        )
    for message in value:
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if role not in _ROLES or not isinstance(content, str) or (not content.strip() and role != "system"):
            raise InputError(
                f"{table.at(number, column)}: found the message {shortened(repr(message), 80)}, expected a role out of "
                f"{', '.join(_ROLES)} and a content of text"
            )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def is_number(value: Any) -> bool:
    """Whether a value is a number, or a text that writes one; a code with leading zeros, such as 007, is none."""
    if isinstance(value, str):
        word = value.strip()
        return _NUMBER.fullmatch(word) is not None and any(one.isdigit() for one in word.lower().partition("e")[0])
    return isinstance(value, int | float) and not isinstance(value, bool)


def kind_of_labels(table: Table, layout: Layout, values: Sequence[Any], numbers: Sequence[int]) -> str:
    for number, value in zip(numbers, values, strict=True):
        _check_there(table, layout, number, value)
    numeric = [is_number(value) for value in values]
    if all(numeric):
        return "regression"
    first = numeric.index(False)
    place, found = table.at(numbers[first], layout.label), shortened(repr(values[first]), 60)
    if all(isinstance(value, str) and (_COMMA.fullmatch(value.strip()) or is_number(value)) for value in values):
        raise InputError(f"{place}: the label is {found}; write numbers with a point, or pass --kind classification")
    others = len(values) - sum(numeric)
    if 0 < others <= len(values) / 10 and len({value for value, one in zip(values, numeric, strict=True) if one}) > FEW:
        raise InputError(
            f"{place}: the label is {found}, and {len(values) - others} of {len(values)} labels are numbers; correct "
            "it, or pass --kind classification"
        )
    return "classification"


def target_of(table: Table, layout: Layout, number: int, value: Any) -> float:
    target = float(value) if is_number(value) else math.nan
    if not math.isfinite(target):
        raise InputError(
            f"{table.at(number, layout.label)}: the label is {shortened(repr(value), 60)}, expected a finite number; "
            "correct it or remove the row, or pass --kind classification for classes"
        )
    return target


def class_of(table: Table, layout: Layout, number: int, value: Any) -> str:
    """The name of a label's class: a word as it is, without blanks around it; a number as it is written.

    Raises:
        InputError: there is none.
    """
    _check_there(table, layout, number, value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float):
        raise InputError(
            f"{table.at(number, layout.label)}: the label is {shortened(repr(value), 60)}, expected a word or a number"
        )
    return str(value).strip()


def _check_there(table: Table, layout: Layout, number: int, value: Any) -> None:
    absent = value is None or (isinstance(value, str) and not value.strip())
    if absent or (isinstance(value, float) and math.isnan(value)):
        raise InputError(
            f"{table.at(number, layout.label)}: the label is {'empty' if absent else value}, expected a word or a "
            "number; correct it, or remove the row"
        )


def type_of(value: Any) -> str:
    """What a value is, for people."""
    if isinstance(value, bool):
        return "true or false"
    kinds = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def check_types(table: Table, layout: Layout, values: Sequence[Any], numbers: Sequence[int]) -> None:
    """Refuse labels of several types: the text "1" and the number 1 may or may not be one class."""
    first = type_of(values[0])
    for number, value in zip(numbers, values, strict=True):
        if type_of(value) != first:
            raise InputError(
                f"{table.at(number, layout.label)}: the label is {shortened(repr(value), 60)}, {type_of(value)}, where "
                f"{table.unit} {numbers[0]} has {first}; give all labels one type"
            )


def ordered_classes(words: set[str]) -> tuple[str, ...]:
    """By value where all are numbers, else by spelling: the order does not depend on that of the rows."""
    if all(is_number(word) for word in words):
        return tuple(sorted(words, key=lambda word: (float(word), word)))
    return tuple(sorted(words))


def check_classes(table: Table, layout: Layout, words: Sequence[str], numbers: Sequence[int], *, split: bool) -> None:
    counts = Counter(words)
    if len(counts) < 2:
        raise InputError(f"{table.place}: every label in the column {layout.label!r} is {words[0]!r}, expected two")
    once = [word for word, count in counts.items() if count == 1]
    if not once:
        return
    message = (
        f"{table.at(numbers[words.index(once[0])], layout.label)}: the label {shortened(repr(once[0]), 60)} occurs once"
    )
    if len(once) > 1:
        message += f", as do {len(once) - 1} others of {len(counts)}"
    if split:
        raise InputError(
            f"{message}; a class needs two rows or more, one to train on and one to be held out: add rows, remove it, "
            "or give --validation"
        )
    warn(f"{message}, which is little to learn from")


def alike(names: Sequence[str]) -> list[str]:
    """A sentence about names of classes that differ in case alone, or write one number in two ways; else nothing.

    Examples:
        >>> alike(["False", "TRUE", "false"])
        ["The labels 'False' and 'false' are two classes; write them alike if they are one."]
    """
    seen: dict[object, str] = {}
    for name in names:
        key = float(name) if is_number(name) else name.casefold()
        if key in seen:
            return [f"The labels {seen[key]!r} and {name!r} are two classes; write them alike if they are one."]
        seen[key] = name
    return []
