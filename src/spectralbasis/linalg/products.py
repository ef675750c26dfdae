"""Products of a matrix in float64 without a float64 copy of it: rows are widened block by block."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ENTRIES = 1 << 20


def times(A: Tensor, X: Tensor) -> Tensor:
    """`A X` in float64, (m, j), for A (m, n) of any floating dtype and X (n, j) in float64."""
    return torch.cat([block @ X for _, block in _row_blocks(A)])


def transposed_times(A: Tensor, X: Tensor) -> Tensor:
    """`Aᵀ X` in float64, (n, j), for A (m, n) of any floating dtype and X (m, j) in float64."""
    product = X.new_zeros(A.shape[1], X.shape[1])
    for rows, block in _row_blocks(A):
        product.addmm_(block.T, X[rows])
    return product


def times_and_back(A: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """`A X` (m, j) and `Aᵀ A X` (n, j) in float64, from one reading of A."""
    there, back = [], X.new_zeros(A.shape[1], X.shape[1])
    for _, block in _row_blocks(A):
        there.append(block @ X)
        back.addmm_(block.T, there[-1])
    return torch.cat(there), back


def gram(A: Tensor) -> Tensor:
    """`Aᵀ A` in float64, (n, n)."""
    product = torch.zeros(A.shape[1], A.shape[1], dtype=torch.float64, device=A.device)
    for _, block in _row_blocks(A):
        product.addmm_(block.T, block)
    return product


def _row_blocks(A: Tensor) -> Iterator[tuple[slice, Tensor]]:
    height = max(1, BLOCK_ENTRIES // max(1, A.shape[1]))
    for start in range(0, A.shape[0], height):
        rows = slice(start, start + height)
        yield rows, A[rows].double()
