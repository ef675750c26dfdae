"""Read JSON that may be damaged or hostile against a schema, and match regular expressions within a time limit.

A schema is any type that pydantic checks, and stands beside the code that writes the format. Patterns in the config of
an adapter can keep Python's `re` busy for years, so they are matched here; PEFT gets the matching names instead
(`names_only`).
"""

import json
import math
import re
import stat
import time
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import regex
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
SECONDS = 2.0
"""How long all slow matches of one pattern may take together; a usual one takes microseconds."""
_SLOW = 0.01
_LONGEST = 100_000
_ALL_LINEAR = "all-linear"
_ONLY_REGEX = re.compile(r"(?<!\\)(?:\\\\)*\{(?!\d*,?\d*\})")
"""Braces that are fuzzy matching to the library `regex`; what else it adds is an error or a warning of `re`."""
_NAME = regex.compile(r"[\w. -]+")


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
        raise InputError(f"{where} is nested too deeply; {remedy}") from error
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON ({error}); {remedy}") from error


def read_json(path: Path, remedy: str = "restore it from the original") -> Any:
    """What a JSON file says.

    Raises:
        InputError: the file cannot be read or is larger than `LARGEST`, or `parse_json` refuses what it holds.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is not a regular file; {remedy}")
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

    Examples:
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
        raise InputError(f"{where} is nested too deeply; {remedy}") from error
    # Half a character becomes a text of six characters, which a reader sees.
    text = _LONE.sub(lambda half: f"\\\\u{ord(half[0]):04x}", text)
    try:
        found: Schema = _adapter(cast(Hashable, schema)).validate_json(text, strict=True)
    except ValidationError as error:
        raise InputError(f"{where}: {_difference(content, error)}; {remedy}") from error
    return found


def _difference(content: object, error: Any) -> str:
    """The difference as a clause: field, value, expectation.

    Where a value may be of several kinds, each gives an error: those of the place deepest in the content come from the
    kind that fits best, and all that they expect is said.
    """
    errors = [(_location(content, one["loc"], one["type"]), one) for one in error.errors(include_url=False)]
    place, first = max(errors, key=lambda one: len(one[0]))
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)  # `claims[2].effect`
    field = shortened(path.removeprefix("."), 120) or "the whole"
    if first["type"] == "missing":
        return f"{field} is missing"
    if first["type"] == "extra_forbidden":
        return f"{field} is not known"
    if first["type"] == "json_invalid":
        return "it is nested too deeply"
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


class Expression:
    """A regular expression for whole names.

    Raises:
        InputError: it is none, or is too long.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self._left = SECONDS
        if len(pattern) > _LONGEST:
            raise InputError(f"a pattern of {len(pattern)} characters is too long, expected at most {_LONGEST}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                re.compile(pattern)
            self._compiled = regex.compile(pattern)
        except (re.error, regex.error, RecursionError, OverflowError, ValueError, Warning) as error:
            raise InputError(
                f"{shortened(repr(pattern))} is not a regular expression ({error}); write names of modules"
            ) from error
        if _ONLY_REGEX.search(pattern):
            raise InputError(
                f"{shortened(repr(pattern))} has a brace that is not a count, and libraries read it differently; write "
                "\\{ for it, or names of modules"
            )

    def matches(self, name: str) -> bool:
        """Whether the whole name matches.

        Raises:
            InputError: the pattern takes too long.
        """
        return self.group(name, "") is not None

    def group(self, name: str, group: str) -> str | None:
        """What a named group holds (empty where no group is asked for), None where the name does not match.

        Raises:
            InputError: the pattern takes too long.
        """
        started = time.perf_counter()
        try:
            found = self._compiled.fullmatch(name, timeout=max(self._left, 0.001))
        except TimeoutError as error:
            raise InputError(
                f"the pattern {shortened(repr(self.pattern))} takes more than {SECONDS:g} seconds to match "
                f"{shortened(name)}; write the names of the modules as a list"
            ) from error
        taken = time.perf_counter() - started
        if taken > _SLOW:
            self._left -= taken
        if found is None:
            return None
        return str(found[group]) if group else ""


@lru_cache(maxsize=256)
def expression(pattern: str) -> Expression:
    """The expression, compiled once."""
    return Expression(pattern)


def pattern_of(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern for the end of a name, as `rank_pattern` and `alpha_pattern` have them; None without one."""
    return next((key for key in patterns if expression(rf"(.*\.)?({key})").matches(name)), None)


def excludes(config: Any, name: str) -> bool:
    """Whether a config of PEFT leaves a module out: by `exclude_modules`, or since it is trained in full."""
    excluded = getattr(config, "exclude_modules", None) or ()
    if expression(excluded).matches(name) if isinstance(excluded, str) else _ends_with(name, excluded):
        return True
    saved = getattr(config, "modules_to_save", None) or ()
    return any(expression(rf"(.*\.)?({module})(\..*)?").matches(name) for module in saved)


def targets(config: Any, name: str) -> bool:
    """Whether a config of PEFT means a module by `target_modules`, with `layers_to_transform`."""
    wanted = getattr(config, "target_modules", None)
    if wanted is None:
        return False
    if isinstance(wanted, str):
        return expression(wanted).matches(name)
    if name in wanted:
        return True
    if not _ends_with(name, wanted):
        return False
    layers = getattr(config, "layers_to_transform", None)
    if layers is None or layers == []:
        return True
    return _layer_of(config, name) in ([layers] if isinstance(layers, int) else layers)


def _layer_of(config: Any, name: str) -> int | None:
    """The number of the layer that a module belongs to, None where it belongs to none."""
    named = getattr(config, "layers_pattern", None) or [r"[^.]*"]
    for pattern in [named] if isinstance(named, str) else named:
        before = r".*?\." if pattern == r"[^.]*" else r"(?:.*?\.)?"
        found = expression(rf"{before}(?:{pattern})\.(?P<number>\d+)\..*").group(name, "number")
        if found is not None:
            return int(found)
    return None


def _ends_with(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def names_only(config: Any, names: Sequence[str]) -> None:
    """Replace the expressions of a PEFT config by the names of modules that they match.

    What says names stays as it is, since PEFT knows some by which an older release of transformers called modules.

    Args:
        config: is changed.
        names: of all modules of the model.

    Raises:
        InputError: an expression is none, takes too long, or matches nothing.
    """
    for module in getattr(config, "modules_to_save", None) or ():
        if not _NAME.fullmatch(str(module)):
            raise InputError(f"modules_to_save has {shortened(repr(module))}, expected names of modules")
    wanted = getattr(config, "target_modules", None)
    everything = isinstance(wanted, str) and wanted.lower() == _ALL_LINEAR
    found = [name for name in names if not excludes(config, name) and (everything or targets(config, name))]
    if (isinstance(wanted, str) and not everything) or _has_expressions(getattr(config, "layers_pattern", None)):
        if not found:
            raise InputError(f"target_modules={shortened(repr(wanted))} matches no module of the model")
        config.target_modules = set(found)
        for field in ("layers_to_transform", "layers_pattern"):
            if hasattr(config, field):
                setattr(config, field, None)
    for field in ("exclude_modules", "feedforward_modules"):
        value = getattr(config, field, None)
        if isinstance(value, str):
            setattr(config, field, {name for name in names if expression(value).matches(name)})
    for field, value in list(vars(config).items()):
        if field.endswith("_pattern") and isinstance(value, Mapping) and _has_expressions(value):
            # The longest name comes first, since PEFT takes a key for the end of a name.
            keys = {name: key for name in found if (key := pattern_of(value, name)) is not None}
            longest = sorted(keys, key=len, reverse=True)
            setattr(config, field, {regex.escape(name): value[keys[name]] for name in longest})


def _has_expressions(patterns: Any) -> bool:
    """Whether one of these is more than a name."""
    if patterns is None or isinstance(patterns, str):
        return bool(patterns) and not _NAME.fullmatch(patterns)
    return not all(_NAME.fullmatch(str(pattern)) for pattern in patterns)
