"""Inner products of matrices that are too large to hold all at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectralbasis.linalg.row_source import MatrixLike, row_slices


def inner_products(reads: Sequence[Callable[[], MatrixLike]]) -> Tensor:
    """The Frobenius inner product of every two matrices, (t, t), float64; two of them are in memory at a time.

    Args:
        reads: t functions, each of which gives its matrix anew; all are of one shape.
    """
    gram = torch.zeros(len(reads), len(reads), dtype=torch.float64)
    for i, read in enumerate(reads):
        A = read()
        gram[i, i] = _inner_product(A, A)
        for j in range(i):
            gram[i, j] = gram[j, i] = _inner_product(A, reads[j]())
    return gram


def _inner_product(A: MatrixLike, B: MatrixLike) -> float:
    return sum(float((A[rows].double() * B[rows]).sum()) for rows in row_slices(A))


def gram_cosines(gram: Tensor) -> Tensor:
    """Cosines between matrices from their inner products, (t, t), in [-1, 1]; NaN beside a matrix of zeros."""
    norms = gram.diagonal().sqrt()
    return (gram / torch.outer(norms, norms)).clamp(-1.0, 1.0)
