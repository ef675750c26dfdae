"""Reading JSON that may be damaged or hostile, and checking it against a schema before anything uses it.

A schema is any type that pydantic can check: a `TypedDict`, a dataclass, `dict[str, int]`. Each format of ours has one,
beside the code that writes it.
"""

import json
import stat
from collections.abc import Hashable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

from spectralbasis.errors import InputError
from spectralbasis.printable import shortened

Schema = TypeVar("Schema")
LARGEST = 256 << 20
"""Bytes of JSON that are read at most: the indexes and records of the largest models take a few per cent of it."""


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
        found: Schema = _adapter(cast(Hashable, schema)).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise InputError(f"{where}: {_difference(error)}; {remedy}") from error
    return found


def _difference(error: Any) -> str:
    """The first difference as a clause: field, value, expectation."""
    first = error.errors(include_url=False)[0]
    field = _path(first["loc"])
    if first["type"] == "missing":
        return f"{field} is missing"
    if first["type"] == "extra_forbidden":
        return f"{field} is not known"
    expectation = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{field or 'the whole'} is {shortened(repr(first['input']), 80)}, expected {expectation}"


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
