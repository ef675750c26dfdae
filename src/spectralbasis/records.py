"""Reading JSON that may be damaged or hostile, and checking it against a schema before anything uses it.

A schema is any type that pydantic can check: a `TypedDict`, a dataclass, `dict[str, int]`. Each format of ours has one,
beside the code that writes it.
"""

import json
import math
import re
import stat
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from annotated_types import Ge, Le, Predicate

from spectralbasis.errors import InputError
from spectralbasis.printable import shortened

Schema = TypeVar("Schema")
LARGEST = 64 << 20
"""Bytes of JSON that are read at most: the indexes and records of the largest models take a few per cent of it."""

_LONE = re.compile("[\ud800-\udfff]")
"""Halves of a character, which JSON can hold and UTF-8 cannot: how Python names a file whose name is no UTF-8."""
_PLAIN = (
    ("Predicate isfinite failed", "a finite number"),
    ("Input should be ", ""),
    ("Value error, ", ""),
    ("greater than or equal to ", "at least "),
    ("greater than ", "more than "),
    ("less than or equal to ", "at most "),
    ("Predicate 'isfinite' failed", "a finite number"),
    ("a valid dictionary or instance of ", "an object, as of "),
    ("a valid dictionary", "an object"),
    ("a valid array", "a list"),
    ("a valid tuple", "a list"),
    ("a valid list", "a list"),
    ("a valid set", "a list"),
    ("a valid boolean", "true or false"),
    ("String should match pattern ", "a text that matches "),
)
"""How pydantic says what it expects → how a person would."""
_COUNTED = re.compile(r" should have (at (?:most|least) \d+ \w+)")

Finite = Annotated[float, Predicate(math.isfinite)]
"""A number that is neither NaN nor infinite."""
Count = Annotated[int, Ge(0), Le(2**63 - 1)]
"""A whole number from 0 on, of 64 bits."""
Positive = Annotated[int, Ge(1), Le(2**63 - 1)]
"""A whole number from 1 on, of 64 bits."""


def parse_json(text: str | bytes, where: str, remedy: str = "restore it from the original") -> Any:
    """What JSON says.

    Args:
        text: the JSON.
        where: what it is and where it comes from; messages begin with it.
        remedy: what a person can do about damage.

    Raises:
        InputError: it is no JSON, nests too deeply, holds a number of too many digits, or gives one key two values.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_contradictions)
    except RecursionError as error:
        raise InputError(f"{where} nests more deeply than any such file does; {remedy}") from error
    except ValueError as error:
        raise InputError(f"{where} is no valid JSON ({error}); {remedy}") from error


def read_json(path: Path, remedy: str = "restore it from the original") -> Any:
    """What a JSON file says.

    Raises:
        InputError: the file cannot be read or is larger than `LARGEST`, or `parse_json` refuses what it holds.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is no regular file; {remedy}")
        if status.st_size > LARGEST:
            raise InputError(f"{path} has {status.st_size} bytes, expected at most {LARGEST} of JSON; {remedy}")
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return parse_json(text, str(path), remedy)


def read_record(path: Path, schema: type[Schema], remedy: str = "restore it from the original") -> Schema:
    """What a JSON file says, as `schema` describes it.

    Raises:
        InputError: see `read_json` and `checked`.
    """
    return checked(read_json(path, remedy), schema, str(path), remedy)


def checked(content: object, schema: type[Schema], where: str, remedy: str = "restore it from the original") -> Schema:
    """The content, once it is what `schema` describes.

    Numbers must be numbers and texts texts: nothing is converted but whole numbers to floating ones, and lists to
    tuples and sets.

    Raises:
        InputError: the content differs; the message names the first field that does, its value and what was expected.

    Example:
        >>> checked({"k": 3}, dict[str, int], "basis.json")
        {'k': 3}
        >>> checked({"k": "x"}, dict[str, int], "basis.json")
        Traceback (most recent call last):
        ...
        spectralbasis.errors.InputError: basis.json: k is 'x', expected a valid integer; restore it from the original
    """
    from pydantic import ValidationError

    try:
        text = json.dumps(content, ensure_ascii=False)
    except RecursionError as error:
        raise InputError(f"{where} nests more deeply than any such file does; {remedy}") from error
    try:
        found: Schema = _adapter(cast(Hashable, schema)).validate_json(_LONE.sub(_spelled, text), strict=True)
    except ValidationError as error:
        raise InputError(f"{where}: {_difference(content, error)}; {remedy}") from error
    return found


def _spelled(half: re.Match[str]) -> str:
    """Half a character as a text of six characters, which a reader sees."""
    return f"\\\\u{ord(half[0]):04x}"


def _difference(content: object, error: Any) -> str:
    """The difference as a clause: field, value, expectation.

    Where a value may be of several kinds, each gives an error: those of the place deepest in the content come from the
    kind that fits best, and all that they expect is said.
    """
    errors = [(_location(content, one["loc"], one["type"]), one) for one in error.errors(include_url=False)]
    place, first = max(errors, key=lambda one: len(one[0]))
    field = _path(place) or "the whole"
    if first["type"] == "missing":
        return f"{field} is missing"
    if first["type"] == "extra_forbidden":
        return f"{field} is not known"
    if first["type"] == "json_invalid":
        return "it nests more deeply than any such file does"
    expected = dict.fromkeys(_plain(one["msg"]) for where, one in errors if where == place)
    value = f"the key {field}" if first["loc"][-1:] == ("[key]",) else field
    return f"{value} is {shortened(repr(first['input']), 80)}, expected {' or '.join(expected)}"


def _plain(message: str) -> str:
    if counted := _COUNTED.search(message):
        return counted[1]
    for technical, plain in _PLAIN:
        message = message.replace(technical, plain)
    return message


def _location(content: object, location: Sequence[str | int], kind: str) -> tuple[str | int, ...]:
    """The part of pydantic's location that leads through the content; the rest names kinds that the value may be of."""
    found: list[str | int] = []
    for part in location:
        if isinstance(content, Mapping) and part in content:
            content = content[part]
        elif isinstance(content, Sequence) and not isinstance(content, str) and isinstance(part, int):
            content = content[part] if part < len(content) else None
        else:
            continue
        found.append(part)
    return (*found, location[-1]) if kind == "missing" and found[-1:] != [location[-1]] else tuple(found)


def _path(location: Sequence[str | int]) -> str:
    """A field as a person would write it: `claims[2].effect`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return shortened(text.removeprefix("."), 120)


@lru_cache
def _adapter(schema: Hashable) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cast(Any, schema))


def _without_contradictions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values.

    Raises:
        ValueError: a key is given twice with different values.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(
                    f"the key {shortened(repr(key), 80)} is given twice, as {shortened(repr(value), 80)} and as "
                    f"{shortened(repr(found[key]), 80)}"
                )
    return found
