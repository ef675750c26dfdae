"""A matrix on its way to another process: where it lies in a file, or its numbers themselves."""

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.matrix import Cut, Matrix
from spectralbasis.errors import InputError

_NAME = "sent"


def by_place(matrix: Matrix) -> Matrix | None:
    """The matrix as something small that reads it from its file; None where it is in memory or computed when read."""
    alone = matrix.checkpoint.alone(matrix.cut.tensor)
    return None if alone is None else replace(matrix, checkpoint=alone)


def by_content(matrix: Matrix) -> Matrix:
    """The matrix with its numbers; what hinders reading it is raised where it is read."""
    try:
        W = matrix.read()
    except ValueError as error:
        return replace(matrix, checkpoint=SentTensor(torch.empty(matrix.shape), str(error)), cut=Cut(_NAME))
    return replace(matrix, checkpoint=SentTensor(W), cut=Cut(_NAME))


class SentTensor(Checkpoint):
    """One tensor that travels as an array of bytes, which other processes can map instead of copying.

    Args:
        W: any shape, on the CPU.
        error: why it could not be read; `read` raises it.
    """

    def __init__(self, W: Tensor, error: str = "") -> None:
        self.source = _NAME
        self.config = {}
        self._shape = tuple(W.shape)
        self._dtype = W.dtype
        self._error = error
        self._bytes = None if error else W.contiguous().reshape(-1).view(torch.uint8).numpy()

    def names(self) -> tuple[str, ...]:
        return (_NAME,)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def read(self, name: str) -> Tensor:
        if self._bytes is None:
            raise InputError(self._error)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a mapped array is read-only, as every tensor read is to us
            return torch.from_numpy(self._bytes).view(self._dtype).reshape(self._shape)
