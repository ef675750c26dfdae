"""Find quantized weights, so that the tensors of each weight are computed or listed together.

A checkpoint is searched for the groups of tensors that `schemes.py` describes. A group that cannot be computed is
listed once under the name of its weight.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import torch

from spectralbasis.checkpoints.checkpoint import FLOAT8, INTEGERS, PARTS_ONLY, Checkpoint
from spectralbasis.checkpoints.dequantize import EncodedWeight
from spectralbasis.checkpoints.schemes import NAMED, SCHEMES, Group, Scheme, method_of, settings_of
from spectralbasis.errors import InputError

_ADVICE = "compare the checkpoint that it was made from"
# What a quantized layer holds besides its weight: it concerns the bias, activations or the cache only.
_APART = re.compile(
    r"(^|[._])(bias|input_\w*|output_\w*|activation_scale|act_scale|[kv]_scale|kv_scale|workspace|weight_format)$"
)
# What tensors beside unknown integers are called where they give them their meaning.
_COMPANION = re.compile(
    r"(^|_)(q|w|ch)?(scales?(_\w+|\d)?|scaling(_\w+)?|zeros?|zero_?points?|zp|biases|shifts?|offsets?|codebooks?|centroids?"
    r"|absmax|amax|quant_map|luts?|tables?|tlut|grid|norms?|s[uv]h?|scb|sf|lora_(up|down)|proj_(up|down))\d?$",
    re.IGNORECASE,
)
_PAYLOAD = re.compile(r"(^|[._])(q?weights?|blocks|packed)$")
# Whole numbers that ordinary models keep beside their weights.
_INDEX = re.compile(r"(^|_)(ids?|idx|index|indices|masks?|bias|positions?|coords|tracked|step|num_\w+)$")


@dataclass(frozen=True)
class Listed:
    """A group that is not computed.

    Attributes:
        name: of its weight.
        parts: stored names; the first is the one that holds the numbers.
        reason: why it is not measured.
    """

    name: str
    parts: tuple[str, ...]
    reason: str


def find_quantized(checkpoint: Checkpoint) -> tuple[list[EncodedWeight], list[Listed]]:
    """The quantized weights of a checkpoint: those that can be computed, and those that are only listed.

    A tensor of 8-bit floats stands for its values where nothing but a bias lies beside it in its layer and the config
    names no quantization.

    Raises:
        InputError: the description of a weight is damaged.
    """
    search = _Search(checkpoint)
    for name in checkpoint.names():
        search.try_formats(name)
    search.list_unknown_groups()
    return search.weights, search.listed


class _Search:
    """A walk over a checkpoint that claims the tensors of one group after the other."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.weights: list[EncodedWeight] = []
        self.listed: list[Listed] = []
        self._checkpoint = checkpoint
        self._settings = settings_of(checkpoint.config)
        self._method = method_of(self._settings)
        self._names = frozenset(checkpoint.names())
        self._claimed: set[str] = set()

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self._names)

    def try_formats(self, name: str) -> None:
        """Claim the group whose numbers the tensor holds, if it is one of a known format."""
        kind = self._checkpoint.dtype(name)
        ordinary = kind.is_floating_point and kind.itemsize > 1
        if ordinary and not f".{name}".endswith(NAMED) and f"{name}.absmax" not in self._names:
            return
        for form in SCHEMES:
            if name in self._claimed:
                return
            if form.methods and self._method not in form.methods:
                continue
            if (form.kinds is None or kind in form.kinds) and (group := self._group(form, name)) is not None:
                self._settle(form, group, name)

    def _group(self, form: Scheme, name: str) -> Group | None:
        dotted = f".{name}"  # a tensor without a module has no dot in its name
        if not dotted.endswith(form.payload) or len(dotted) == len(form.payload) == 1:
            return None
        base = dotted.removesuffix(form.payload)
        plain = [need.split("|") for need in form.needs if "*" not in need]
        if any(all((base + end)[1:] not in self._names for end in ends) for ends in plain):
            return None
        weight = (base + form.weight)[1:]
        ends = [end for need in (*form.needs, *form.others) for end in need.split("|")]
        beside = {
            rest: full for rest, full in self._beside(base) if full != weight and any(_fits(rest, end) for end in ends)
        }
        globs = (need for need in form.needs if "*" in need)
        if any(not any(_fits(rest, need) for rest in beside) for need in globs):
            return None
        roles = {rest: full for rest, full in beside.items() if full != name and not _APART.search(rest)}
        roles |= {rest: full for rest, full in beside.items() if rest in form.others and full != name}
        return Group(self._checkpoint, weight, base[1:], {form.payload: name, **roles}, self._settings)

    def _beside(self, base: str) -> Iterator[tuple[str, str]]:
        """Rest of the name and name of every tensor that is called as the base and more."""
        for place in range(bisect_left(self._sorted, base[1:]), len(self._sorted)):
            name = self._sorted[place]
            dotted = f".{name}"
            if not dotted.startswith(base):
                return
            rest = dotted.removeprefix(base)
            if rest[:1] in ("", ".", "_") and name not in self._claimed:
                yield rest, name

    def _settle(self, form: Scheme, group: Group, name: str) -> None:
        """Compute or list the group, and claim its tensors."""
        strangers = self._strangers(group)
        dense = group.weight in strangers
        unknown = [stranger for stranger in strangers if stranger != group.weight]
        found: EncodedWeight | str | None = None
        if form.plan and not strangers:
            try:  # the scheme may have to read small tensors to know
                found = form.plan(group)
            except InputError:
                raise
            except (RuntimeError, ValueError, TypeError, KeyError, IndexError, ArithmeticError):
                found = "whose description is damaged"
        if isinstance(found, EncodedWeight):
            self.weights.append(found)
            self._claimed |= {*group.roles.values(), *found.parts}
            return
        more = f"with {_quoted(unknown)}" if unknown else "a copy of the dense weight" if dense else found
        parts = (name, *group.roles.values(), *unknown)
        self._list(name if dense else group.weight, parts, f"{form.name}, {more}" if more else form.name)

    def _strangers(self, group: Group) -> list[str]:
        """Tensors of the same layer that the format does not know."""
        module, _, leaf = f".{group.weight}".rpartition(".")
        known = set(group.roles.values())
        own = leaf == "weight"
        return [
            name
            for rest, name in self._beside(module if own else f".{group.weight}")
            if name not in known
            and not _APART.search(rest)
            and (not own or rest.startswith(".weight.") or (rest.count(".") == 1 and rest[0] == "."))
        ]

    def _list(self, name: str, parts: Iterable[str], facts: str) -> None:
        parts = tuple(dict.fromkeys(parts))
        self.listed.append(Listed(name, parts, f"quantized ({facts}): {_ADVICE}"))
        self._claimed |= set(parts)

    def list_unknown_groups(self) -> None:
        """List integers, and what lies beside them and gives them their meaning, where no format is known."""
        layers: dict[str, list[str]] = {}
        for name in self._checkpoint.names():
            if name not in self._claimed:
                layers.setdefault(name.rpartition(".")[0], []).append(name)
        for module, names in layers.items():
            numbers = [name for name in names if self._holds_numbers(name)]
            if numbers:
                self._list_layer(module, names, numbers)

    def _holds_numbers(self, name: str) -> bool:
        """Whether the tensor is no ordinary one of floats, and no index or mask."""
        kind, shape, leaf = self._checkpoint.dtype(name), self._checkpoint.shape(name), name.rpartition(".")[2]
        if kind in FLOAT8 or kind in PARTS_ONLY:
            return len(shape) > 0
        named = bool(_PAYLOAD.search(leaf)) and len(shape) > 0
        if kind == torch.bool:
            return named
        return kind in INTEGERS and not _INDEX.search(leaf) and (named or len(shape) > 1)

    def _list_layer(self, module: str, names: list[str], numbers: list[str]) -> None:
        named = {name for name in names if self._is_companion(name)}
        numbers = [name for name in numbers if name not in named] or numbers
        companions = [name for name in names if name in named and name not in numbers]
        if any(self._checkpoint.dtype(name) in FLOAT8 for name in numbers):  # whatever lies beside them may scale them
            companions = [name for name in names if name not in numbers and not name.endswith("bias")]
        weight = f"{module}.weight" if module else "weight"
        for name in numbers:
            kind = str(self._checkpoint.dtype(name)).removeprefix("torch.")
            if self._checkpoint.dtype(name) in FLOAT8 and not companions and not self._settings:
                continue  # what it holds is the weight
            if self._checkpoint.dtype(name) == torch.int64 and not companions and not _PAYLOAD.search(name):
                continue
            listed = weight if len(numbers) == 1 and companions and weight not in self._names else name
            leaves = [companion.rpartition(".")[2] for companion in companions]
            told = f"{kind} with {_quoted(leaves)}, of an unknown format" if companions else kind
            self._list(listed, (name, *companions), f"{self._method}, {told}" if self._method else told)

    def _is_companion(self, name: str) -> bool:
        """Whether the tensor is called like one that gives others their meaning."""
        kind, leaf = self._checkpoint.dtype(name), name.rpartition(".")[2]
        known = kind.is_floating_point or kind in INTEGERS
        return known and bool(_COMPANION.search(leaf)) and not _APART.search(f".{name}")


def _fits(rest: str, end: str) -> bool:
    return rest == end or (rest.count(".") == end.count(".") and fnmatchcase(rest, end))


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name.rpartition('.')[2]}`" for name in names)
