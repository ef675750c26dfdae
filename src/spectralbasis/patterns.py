"""Regular expressions that come with a file, matched within a time limit.

The config of an adapter may name modules by regular expressions, and one written for it keeps Python's `re` busy for
years. Whatever takes such a pattern from a config matches it here. PEFT, which uses `re`, gets names in their place
(`names_only`).
"""

import re
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import regex

from spectralbasis.errors import InputError
from spectralbasis.printable import shortened

SECONDS = 2.0
"""How long all slow matches of one pattern may take together; a usual one takes microseconds."""
_SLOW = 0.01
_LONGEST = 100_000
_ALL_LINEAR = "all-linear"
_ONLY_REGEX = re.compile(r"(?<!\\)(?:\\\\)*\{(?!\d*,?\d*\})")
"""Braces that are fuzzy matching to the library `regex`; what else it adds is an error or a warning of `re`."""
_NAME = regex.compile(r"[\w. -]+")


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
                f"{shortened(repr(pattern))} is no regular expression ({error}); write names of modules"
            ) from error
        if _ONLY_REGEX.search(pattern):
            raise InputError(
                f"{shortened(repr(pattern))} has a brace that is no count, and libraries read it differently; write "
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
    if isinstance(excluded, str):
        if expression(excluded).matches(name):
            return True
    elif _ends_with(name, excluded):
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
    layers = getattr(config, "layers_to_transform", None)
    if not _ends_with(name, wanted):
        return False
    return (
        layers is None or layers == [] or _layer_of(config, name) in ([layers] if isinstance(layers, int) else layers)
    )


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
    _check_saved(config)
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
            setattr(config, field, _of_names(value, found))


def _check_saved(config: Any) -> None:
    for module in getattr(config, "modules_to_save", None) or ():
        if not _NAME.fullmatch(str(module)):
            raise InputError(f"modules_to_save has {shortened(repr(module))}, expected names of modules")


def _has_expressions(patterns: Any) -> bool:
    """Whether one of these is more than a name."""
    if patterns is None or isinstance(patterns, str):
        return bool(patterns) and not _NAME.fullmatch(patterns)
    return not all(_NAME.fullmatch(str(pattern)) for pattern in patterns)


def _of_names(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Values by pattern as values by name, the longest name first, since PEFT takes a key for the end of a name."""
    found = {name: pattern for name in names if (pattern := pattern_of(values, name)) is not None}
    return {regex.escape(name): values[found[name]] for name in sorted(found, key=len, reverse=True)}
