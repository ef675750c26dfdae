"""Matrices that are never in memory as a whole: their rows are read, or computed, when they are asked for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ENTRIES = 1 << 20
"""Entries of the rows that are taken at once."""
Rows = slice | Tensor
"""Which rows: a run of them, or their numbers, (count,) int64."""


@dataclass(frozen=True, eq=False)
class RowSource:
    """An (m, n) matrix in float32, indexed by rows as a tensor is.

    Its values are taken to be finite.

    Attributes:
        shape: (m, n).
        read: gives the rows asked for, (count, n), float32, in memory of their own, which may be written to.
        device: where they come to lie.
    """

    shape: tuple[int, int]
    read: Callable[[Rows], Tensor]
    device: torch.device

    dtype = torch.float32

    def __getitem__(self, rows: Rows) -> Tensor:
        return self.read(rows)

    @property
    def T(self) -> "Transposed":
        """The transpose, which functions of `linalg.products` take."""
        return Transposed(self)


@dataclass(frozen=True, eq=False)
class Transposed:
    """The transpose of a row source. It has no rows to read; products with it are products with its source."""

    T: RowSource

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m) of an (m, n) source."""
        return self.T.shape[1], self.T.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """That of the source."""
        return self.T.dtype

    @property
    def device(self) -> torch.device:
        """That of the source."""
        return self.T.device


MatrixLike = Tensor | RowSource
"""What can be indexed by rows."""


def row_slices(A: MatrixLike, at_least: int = 0) -> Iterator[slice]:
    """The rows of a matrix in runs of about `BLOCK_ENTRIES` entries, or of `at_least` so many, where that is more."""
    height = max(1, max(at_least, BLOCK_ENTRIES) // max(1, A.shape[1]))
    return (slice(start, min(start + height, A.shape[0])) for start in range(0, A.shape[0], height))


def plus(A: MatrixLike, B: MatrixLike) -> MatrixLike:
    """`A + B` of two tensors, or of two row sources of one shape, taken when rows are read."""
    if isinstance(A, Tensor) and isinstance(B, Tensor):
        return A + B
    one, other = _row_sources(A, B)
    return RowSource(one.shape, lambda rows: one[rows].add_(other[rows]), one.device)


def minus(A: MatrixLike, B: MatrixLike) -> MatrixLike:
    """`A − B`, as `plus`."""
    if isinstance(A, Tensor) and isinstance(B, Tensor):
        return A - B
    one, other = _row_sources(A, B)
    return RowSource(one.shape, lambda rows: one[rows].sub_(other[rows]), one.device)


def _row_sources(A: MatrixLike, B: MatrixLike) -> tuple[RowSource, RowSource]:
    if isinstance(A, RowSource) and isinstance(B, RowSource):
        return A, B
    raise TypeError("one matrix is in memory and the other is not; take both as tensors, or both as row sources")


def equal(A: MatrixLike, B: MatrixLike) -> bool:
    """Whether two matrices hold the same values."""
    return A.shape == B.shape and all(torch.equal(A[rows], B[rows]) for rows in row_slices(A))


def equal_rounded(A: MatrixLike, B: MatrixLike, dtype: torch.dtype) -> bool:
    """Whether the float32 values of B are those of A rounded to a dtype."""
    return A.shape == B.shape and all(torch.equal(A[rows].to(dtype).float(), B[rows]) for rows in row_slices(A))
