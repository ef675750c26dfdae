"""The matrix that a layer's weight is: (m, n) with `output = input Wᵀ`, whatever the layout it is stored in."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layers = nn.Linear | Conv1D | nn.Embedding | Convolutions
"""Layers whose weight is one matrix."""


def to_matrix(weight: Tensor, layer: nn.Module) -> Tensor:
    """The matrix of a weight: transposed for `Conv1D`, (out, in·kernel) for a convolution, else as stored."""
    return weight.T if isinstance(layer, Conv1D) else weight.flatten(1)


def to_weight(matrix: Tensor, layer: nn.Module) -> Tensor:
    """The inverse of `to_matrix`: a matrix in the layout of the layer's weight."""
    if isinstance(layer, Conv1D):
        return matrix.T
    return matrix.unflatten(1, kernel_shape(layer)) if isinstance(layer, Convolutions) else matrix


def kernel_shape(layer: Convolutions) -> tuple[int, ...]:
    """What a row of a convolution's matrix is: (in, *kernel)."""
    return tuple(layer.weight.shape[1:])
