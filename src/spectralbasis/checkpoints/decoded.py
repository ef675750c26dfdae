"""Weights stored as something else (quantized, normalised, pruned), read as the matrices that they are, or listed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.dequantize import QuantizedWeight
from spectralbasis.checkpoints.parametrized import find_parametrized
from spectralbasis.checkpoints.quantized import Listed, find_quantized
from spectralbasis.errors import InputError


class Encoded(Protocol):
    """A weight that is stored as something else."""

    @property
    def name(self) -> str:
        """Name of the real weight."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Every stored tensor that encodes it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the real weight."""

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The real weight, float32."""


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with real weights in place of encoded ones; the same object where it has none.

    The tensors of a weight of which it is not certain what they stand for are named once, as that weight, with the
    reason why it cannot be read.

    Raises:
        InputError: a description of an encoding is damaged.
    """
    quantized, listed = find_quantized(checkpoint)
    parametrized, unknown = find_parametrized(checkpoint)
    weights: list[Encoded] = [*quantized, *parametrized]
    return DecodedCheckpoint(checkpoint, weights, [*listed, *unknown]) if weights or listed or unknown else checkpoint


class DecodedCheckpoint(Checkpoint):
    """A checkpoint whose encoded weights are made float32 one at a time, when they are read.

    Attributes:
        stored: the checkpoint as it is stored.
    """

    def __init__(self, stored: Checkpoint, encoded: Sequence[Encoded], listed: Sequence[Listed] = ()) -> None:
        self.source = stored.source
        self.config = stored.config
        self.stored = stored
        self._encoded = {weight.name: weight for weight in encoded}
        self._listed = {group.name: group for group in listed}
        self._groups: tuple[Encoded | Listed, ...] = (*encoded, *listed)
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

    def shape(self, name: str) -> tuple[int, ...]:
        return self._encoded[name].shape if name in self._encoded else self.stored.shape(self._place(name))

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._encoded else self.stored.dtype(self._place(name))

    def read(self, name: str) -> Tensor:
        if name in self._listed:
            raise InputError(f"{name} of {self.source} cannot be read: {self._listed[name].reason}")
        return self._encoded[name].read(self.stored) if name in self._encoded else self.stored.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        encoded = self._encoded.get(name)
        if isinstance(encoded, QuantizedWeight):
            return encoded.read_rows(self.stored, start, stop)
        return self.read(name)[start:stop] if self._computed(name) else self.stored.read_rows(name, start, stop)

    def take_rows(self, name: str, rows: Tensor, width: int) -> Tensor:
        if self._computed(name):
            return super().take_rows(name, rows, width)
        return self.stored.take_rows(name, rows, width)

    def holds_rows(self, name: str) -> bool:
        return not self._computed(name) and self.stored.holds_rows(name)

    def alone(self, name: str) -> Checkpoint | None:
        return None if self._computed(name) else self.stored.alone(name)

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
        return None if self._computed(name) else self.stored.module_type(name)

    def unreadable(self, name: str) -> str | None:
        if name in self._listed:
            return self._listed[name].reason
        return None if name in self._encoded else self.stored.unreadable(name)

    def _computed(self, name: str) -> bool:
        return name in self._encoded or name in self._listed

    def _place(self, name: str) -> str:
        """Stored tensor that tells the shape and dtype of a weight that is not computed."""
        return self._listed[name].parts[0] if name in self._listed else name
