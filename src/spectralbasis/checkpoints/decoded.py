"""Weights stored as something else (quantized, split into length and direction), read as the matrices that they are."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.four_bits import find_four_bits
from spectralbasis.checkpoints.scaled import find_scaled
from spectralbasis.checkpoints.weight_norm import find_weight_norm


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


_FINDERS: tuple[Callable[[Checkpoint, str, frozenset[str]], Encoded | None], ...] = (
    find_four_bits,
    find_scaled,
    find_weight_norm,
)


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with real weights in place of encoded ones; the same object where it has none.

    Weights of which it is not certain what they stand for stay as they are stored, and are skipped with a reason when
    matrices are made.

    Raises:
        InputError: a description of an encoding is damaged.
    """
    names = frozenset(checkpoint.names())
    found = [encoded for name in checkpoint.names() if (encoded := _encoded(checkpoint, name, names))]
    return DecodedCheckpoint(checkpoint, found) if found else checkpoint


def _encoded(checkpoint: Checkpoint, name: str, names: frozenset[str]) -> Encoded | None:
    return next((found for finder in _FINDERS if (found := finder(checkpoint, name, names))), None)


class DecodedCheckpoint(Checkpoint):
    """A checkpoint whose encoded weights are made float32 one at a time, when they are read.

    Attributes:
        stored: the checkpoint as it is stored.
    """

    def __init__(self, stored: Checkpoint, encoded: list[Encoded]) -> None:
        self.source = stored.source
        self.config = stored.config
        self.stored = stored
        self._encoded = {weight.name: weight for weight in encoded}
        first = {weight.parts[0]: weight.name for weight in encoded}
        others = {part for weight in encoded for part in weight.parts[1:]}
        self._names = tuple(first.get(name, name) for name in stored.names() if name not in others)

    def parts(self, name: str) -> tuple[str, ...]:
        """Names in `stored` of what a tensor is read from."""
        return self._encoded[name].parts if name in self._encoded else (name,)

    def names(self) -> tuple[str, ...]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._encoded[name].shape if name in self._encoded else self.stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._encoded else self.stored.dtype(name)

    def read(self, name: str) -> Tensor:
        return self._encoded[name].read(self.stored) if name in self._encoded else self.stored.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[start:stop] if name in self._encoded else self.stored.read_rows(name, start, stop)

    def take_rows(self, name: str, rows: Tensor, width: int) -> Tensor:
        if name in self._encoded:
            return super().take_rows(name, rows, width)
        return self.stored.take_rows(name, rows, width)

    def holds_rows(self, name: str) -> bool:
        return name not in self._encoded and self.stored.holds_rows(name)

    def alone(self, name: str) -> Checkpoint | None:
        return None if name in self._encoded else self.stored.alone(name)

    def tied(self) -> Mapping[str, str]:
        return self.stored.tied()

    def module_type(self, name: str) -> type[nn.Module] | None:
        return None if name in self._encoded else self.stored.module_type(name)
