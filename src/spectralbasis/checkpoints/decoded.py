"""Read encoded weights (quantized, normalised or pruned) as plain matrices, or list why they cannot be read.

`decoded` replaces encoded weights by real ones. `quantized.py` finds quantized weights; this file finds weight
normalisation, spectral normalisation and pruning as `torch.nn.utils` stores them, with and without `parametrize`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from spectralbasis.checkpoints.checkpoint import Checkpoint, View
from spectralbasis.checkpoints.dequantize import EncodedWeight, pruned, spectral_norm, spectral_rows, weight_norm
from spectralbasis.checkpoints.quantized import Listed, find_quantized
from spectralbasis.errors import InputError

_NEW = re.compile(r"(?P<layer>(.+\.)?)parametrizations\.(?P<leaf>[^.]+)\.(?P<part>original\d*)")
_INNER = re.compile(r"(.+\.)?parametrizations\.[^.]+\.")
_REMOVE = "remove the parametrization before saving"
_SPLIT = f"split into magnitude and direction by weight normalisation: {_REMOVE}"


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with real weights in place of encoded ones; the same object where it has none.

    The tensors of a weight of which it is not certain what they stand for are named once, as that weight, with the
    reason why it cannot be read.

    Raises:
        InputError: a description of an encoding is damaged.
    """
    quantized, listed = find_quantized(checkpoint)
    parametrized, unknown = find_parametrized(checkpoint)
    weights: list[EncodedWeight] = [*quantized, *parametrized]
    return DecodedCheckpoint(checkpoint, weights, [*listed, *unknown]) if weights or listed or unknown else checkpoint


class DecodedCheckpoint(View):
    """A checkpoint whose encoded weights are made float32 one at a time, when they are read.

    Attributes:
        stored: the checkpoint as it is stored.
    """

    def __init__(self, stored: Checkpoint, encoded: Sequence[EncodedWeight], listed: Sequence[Listed] = ()) -> None:
        self.source = stored.source
        self.config = stored.config
        self.stored = stored
        self._encoded = {weight.name: weight for weight in encoded}
        self._listed = {group.name: group for group in listed}
        self._groups: tuple[EncodedWeight | Listed, ...] = (*encoded, *listed)
        self._first = {group.parts[0]: group.name for group in self._groups}
        others = {part for group in self._groups for part in group.parts[1:]}
        self._names = tuple(self._first.get(name, name) for name in stored.names() if name not in others)
        count = Counter(self._names)
        for group in self._groups:
            if count[group.name] > 1:
                alike = [name for name in stored.names() if self._first.get(name, name) == group.name]
                raise InputError(
                    f"{self.source} holds {group.name} more than once, in {' and in '.join(alike)}; remove the others"
                )

    def parts(self, name: str) -> tuple[str, ...]:
        """Names in `stored` of what a tensor is read from."""
        group = self._encoded.get(name) or self._listed.get(name)
        return (name,) if group is None else group.parts

    def names(self) -> tuple[str, ...]:
        return self._names

    def _place(self, name: str) -> tuple[Checkpoint, str]:
        return self.stored, self._listed[name].parts[0] if name in self._listed else name

    def shape(self, name: str) -> tuple[int, ...]:
        return self._encoded[name].shape if name in self._encoded else super().shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._encoded else super().dtype(name)

    def read(self, name: str) -> Tensor:
        if name in self._listed:
            raise InputError(f"{name} of {self.source} cannot be read: {self._listed[name].reason}")
        return self._encoded[name].read(self.stored) if name in self._encoded else self.stored.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._encoded:
            return self._encoded[name].read_rows(self.stored, start, stop)
        return self.read(name) if name in self._listed else self.stored.read_rows(name, start, stop)

    def take_rows(self, name: str, rows: Tensor, width: int) -> Tensor:
        if self._is_computed(name):
            return self.read(name).reshape(-1, width)[rows]
        return self.stored.take_rows(name, rows, width)

    def holds_rows(self, name: str) -> bool:
        return not self._is_computed(name) and self.stored.holds_rows(name)

    def alone(self, name: str) -> Checkpoint | None:
        return None if self._is_computed(name) else self.stored.alone(name)

    def tied(self) -> Mapping[str, str]:
        """Ties of plain tensors, and of weights whose every part is tied."""
        ties = self.stored.tied()
        parts = {part for group in self._groups for part in group.parts}
        whole = {
            group.name: ties[group.parts[0]] for group in self._groups if all(part in ties for part in group.parts)
        }
        plain = {name: first for name, first in ties.items() if name not in parts and first not in parts}
        return plain | {name: self._first[first] for name, first in whole.items() if first in self._first}

    def module_type(self, name: str) -> type[nn.Module] | None:
        return None if self._is_computed(name) else self.stored.module_type(name)

    def unreadable(self, name: str) -> str | None:
        if name in self._listed:
            return self._listed[name].reason
        return None if name in self._encoded else self.stored.unreadable(name)

    def _is_computed(self, name: str) -> bool:
        return name in self._encoded or name in self._listed


def find_parametrized(checkpoint: Checkpoint) -> tuple[list[EncodedWeight], list[Listed]]:
    """Weights that are computed from other tensors, and those that the file does not tell how to compute."""
    weights: dict[str, EncodedWeight] = {}
    listed: dict[str, Listed] = {}
    names = frozenset(checkpoint.names())
    inner: dict[str, list[str]] = {}
    for name in checkpoint.names():
        if (match := _INNER.match(name)) is not None:
            inner.setdefault(match[0], []).append(name)
    for name in checkpoint.names():
        (before, part), new = _by_hooks(name), _NEW.fullmatch(name)
        if len(checkpoint.shape(name)) < 2:
            continue
        if new is not None and (weight := new["layer"] + new["leaf"]) not in names:
            parts = inner[name.removesuffix(new["part"])]
            found = _parametrized_now(checkpoint, name, weight, new["part"], parts)
            if isinstance(found, str):
                listed.setdefault(weight, Listed(weight, (name, *(part for part in parts if part != name)), found))
        elif before and before not in names:
            found = _parametrized_before(checkpoint, name, before, part, names)
            if isinstance(found, str):
                listed[name] = Listed(name, (name,), found)
        else:
            continue
        if found is not None and not isinstance(found, str):
            other = weights.setdefault(found.name, found)
            if other is not found:
                raise InputError(
                    f"{checkpoint.source} holds {found.name} more than once, in {other.parts[0]} and in "
                    f"{found.parts[0]}; remove one of them"
                )
    return list(weights.values()), list(listed.values())


def _by_hooks(name: str) -> tuple[str, str]:
    """Name of the weight, and of the part that a tensor is of it; both empty where it is none."""
    before, _, part = name.rpartition("_")
    fits = part in ("v", "orig") and "weight" in before.rpartition(".")[2]
    return (before, part) if fits else ("", "")


def _parametrized_before(
    checkpoint: Checkpoint, name: str, weight: str, part: str, names: frozenset[str]
) -> EncodedWeight | str | None:
    """By hooks: `weight_g` and `weight_v`, `weight_orig` with `weight_u` and `weight_v`, or with `weight_mask`."""
    shape = checkpoint.shape(name)
    if part == "v":
        if f"{weight}_orig" in names:
            return None  # a vector of spectral normalisation
        length = f"{weight}_g"
        if length in names and _fits_length(checkpoint.shape(length), shape):
            return EncodedWeight(weight, {"direction": name, "length": length}, shape, weight_norm)
        return _SPLIT if weight.rpartition(".")[2] == "weight" else None
    if f"{weight}_mask" in names:
        if checkpoint.shape(f"{weight}_mask") != shape:
            return f"pruned, with a misshapen mask: {_REMOVE}"
        return EncodedWeight(weight, {"original": name, "mask": f"{weight}_mask"}, shape, pruned)
    if f"{weight}_u" in names:
        return _spectral(checkpoint, weight, name, f"{weight}_u", f"{weight}_v", names)
    return None


def _parametrized_now(
    checkpoint: Checkpoint, name: str, weight: str, part: str, inner: Iterable[str]
) -> EncodedWeight | str | None:
    """By `torch.nn.utils.parametrize`: `parametrizations.weight.original` and the tensors of what is applied to it."""
    shape, prefix, names = checkpoint.shape(name), name.removesuffix(part), frozenset(inner)
    if names == {prefix + "original0", prefix + "original1"}:
        length, direction = (checkpoint.shape(prefix + original) for original in ("original0", "original1"))
        if not _fits_length(length, direction):
            return _SPLIT
        roles = {"direction": name, "length": prefix + "original0"}
        return EncodedWeight(weight, roles, shape, weight_norm) if part == "original1" else None
    if names == {prefix + "original", prefix + "0._u", prefix + "0._v"}:
        return _spectral(checkpoint, weight, name, prefix + "0._u", prefix + "0._v", names)
    if part == "original1" and prefix + "original0" not in names:
        return _SPLIT
    return f"parametrized in a way that the file does not describe: {_REMOVE}"


def _spectral(
    checkpoint: Checkpoint, weight: str, original: str, left: str, right: str, names: frozenset[str]
) -> EncodedWeight | str:
    shape = checkpoint.shape(original)
    if right in names:
        vectors = (torch.empty(checkpoint.shape(vector), device="meta") for vector in (left, right))
        if spectral_rows(shape, *vectors):
            roles = {"original": original, "left": left, "right": right}
            return EncodedWeight(weight, roles, shape, spectral_norm)
    return f"divided by its spectral norm, whose vectors are missing or misshapen: {_REMOVE}"


def _fits_length(sides: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether lengths belong to one dimension of a direction, or to the whole of it."""
    if len(sides) not in (0, len(shape)):
        return False
    long = [(a, b) for a, b in zip(sides, shape, strict=False) if a != 1]
    return len(long) <= 1 and all(a == b for a, b in long)
