"""Quantized weights of which it is certain what they stand for, read as the real matrices that they encode."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.four_bits import find_four_bits
from spectralbasis.checkpoints.scaled import find_scaled


class Encoded(Protocol):
    """A quantized weight.

    Attributes:
        parts: the stored tensors that encode it, besides the one that has its name.
        shape: of the real weight.
    """

    @property
    def parts(self) -> tuple[str, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The real weight, float32."""


_FINDERS: tuple[Callable[[Checkpoint, str, frozenset[str]], Encoded | None], ...] = (find_four_bits, find_scaled)


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with real weights in place of quantized ones; the same object where it has none.

    Weights in other encodings stay as they are stored, and are skipped with a reason when matrices are made.

    Raises:
        InputError: a description of an encoding is damaged.
    """
    names = frozenset(checkpoint.names())
    found = {name: encoded for name in checkpoint.names() if (encoded := _encoded(checkpoint, name, names))}
    return DequantizedCheckpoint(checkpoint, found) if found else checkpoint


def _encoded(checkpoint: Checkpoint, name: str, names: frozenset[str]) -> Encoded | None:
    return next((found for finder in _FINDERS if (found := finder(checkpoint, name, names))), None)


class DequantizedCheckpoint(Checkpoint):
    """A checkpoint whose quantized weights are decoded to float32 one at a time, when they are read."""

    def __init__(self, stored: Checkpoint, encoded: Mapping[str, Encoded]) -> None:
        self.source = stored.source
        self.config = stored.config
        self._stored = stored
        self._encoded = dict(encoded)
        parts = {part for weight in encoded.values() for part in weight.parts}
        self._names = tuple(name for name in stored.names() if name not in parts)

    def names(self) -> tuple[str, ...]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._encoded[name].shape if name in self._encoded else self._stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._encoded else self._stored.dtype(name)

    def read(self, name: str) -> Tensor:
        return self._encoded[name].read(self._stored) if name in self._encoded else self._stored.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[start:stop] if name in self._encoded else self._stored.read_rows(name, start, stop)

    def tied(self) -> Mapping[str, str]:
        return self._stored.tied()

    def module_type(self, name: str) -> type[nn.Module] | None:
        return self._stored.module_type(name)
