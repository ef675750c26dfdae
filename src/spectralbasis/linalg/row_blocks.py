"""Matrices that are never completely in memory: rows are read or computed on request.

Products with them are computed block by block in float64, without a float64 copy of the matrix.
"""

from collections.abc import Callable, Iterator, Sequence
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
        """The transpose, which products take."""
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


Factor = MatrixLike | Transposed


def times(A: Factor, X: Tensor) -> Tensor:
    """`A X` in float64, (m, j), for A (m, n) of any floating dtype and X (n, j) in float64."""
    if isinstance(A, Transposed):
        return transposed_times(A.T, X)
    product = X.new_empty(A.shape[0], X.shape[1])
    for rows, block in _row_blocks(A):
        product[rows] = block @ X
    return product


def transposed_times(A: Factor, X: Tensor) -> Tensor:
    """`Aᵀ X` in float64, (n, j), for A (m, n) of any floating dtype and X (m, j) in float64."""
    if isinstance(A, Transposed):
        return times(A.T, X)
    product = X.new_zeros(A.shape[1], X.shape[1])
    for rows, block in _row_blocks(A):
        product.addmm_(block.T, X[rows])
    return product


def times_and_back(A: Factor, X: Tensor) -> tuple[Tensor, Tensor]:
    """`A X` (m, j) and `Aᵀ A X` (n, j) in float64, from one reading of A, or from two where it is a transpose."""
    if isinstance(A, Transposed):
        product = transposed_times(A.T, X)
        return product, times(A.T, product)
    there, back = X.new_empty(A.shape[0], X.shape[1]), X.new_zeros(A.shape[1], X.shape[1])
    for rows, block in _row_blocks(A):
        there[rows] = block @ X
        back.addmm_(block.T, there[rows])
    return there, back


def back_and_forth(A: Factor, X: Tensor, scale: float) -> Tensor:
    """`Aᵀ A X / scale²` (n, j) in the dtype that A and X have in common, divided step by step against overflow."""
    if isinstance(A, Tensor):
        return (A.T @ (A @ X).div_(scale)).div_(scale)
    if isinstance(A, Transposed):
        product = X.new_zeros(A.shape[0], X.shape[1])
        for rows in row_slices(A.T):
            product.addmm_(A.T[rows].T, X[rows])
        product.div_(scale)
        result = X.new_empty(A.shape[1], X.shape[1])
        for rows in row_slices(A.T):
            result[rows] = A.T[rows] @ product
        return result.div_(scale)
    product = X.new_zeros(A.shape[1], X.shape[1])
    for rows in row_slices(A):
        block = A[rows]
        product.addmm_(block.T, (block @ X).div_(scale))
    return product.div_(scale)


def gram(A: Factor) -> Tensor:
    """`Aᵀ A` in float64, (n, n)."""
    if isinstance(A, Transposed):
        return _outer_gram(A.T)
    product = torch.zeros(A.shape[1], A.shape[1], dtype=torch.float64, device=A.device)
    for _, block in _row_blocks(A):
        product.addmm_(block.T, block)
    return product


def frobenius_norm(A: MatrixLike) -> Tensor:
    """`‖A‖_F`, summed in float64."""
    if isinstance(A, Tensor):
        return torch.linalg.matrix_norm(A, dtype=torch.float64)
    # As numbers: a small tensor kept of each block would come to lie between large ones, where it splits free memory.
    norms = [float(torch.linalg.matrix_norm(block)) for _, block in _row_blocks(A)]
    return torch.tensor(norms, dtype=torch.float64).norm()


def largest_modulus(A: Factor) -> float:
    """The largest `|a_ij|`."""
    if isinstance(A, Transposed):
        return largest_modulus(A.T)
    if isinstance(A, RowSource):
        return max(largest_modulus(A[rows]) for rows in row_slices(A))
    return max(abs(float(end)) for end in torch.aminmax(A))


def _outer_gram(A: RowSource) -> Tensor:
    """`A Aᵀ` in float64, (m, m), from pairs of row blocks; one block of each pair may be as large as the result."""
    m = A.shape[0]
    product = torch.empty(m, m, dtype=torch.float64, device=A.device)
    for rows in row_slices(A, 2 * m * m):
        held = torch.empty(rows.stop - rows.start, A.shape[1], dtype=A.dtype, device=A.device)
        for part in row_slices(held):  # what reading takes in between is not as large as the result
            held[part] = A[rows.start + part.start : rows.start + part.stop]
        for others, block in _row_blocks(A, rows.start):  # rows before are done
            part_product = block.new_zeros(len(block), len(held))
            for columns in row_slices(held.T):  # some columns are widened at a time
                part_product.addmm_(block[:, columns], held[:, columns].double().T)
            product[others, rows] = part_product
            product[rows, others] = part_product.T
    return product


def _row_blocks(A: MatrixLike, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """The rows in float64, block by block, from the one with the number `first` on."""
    for rows in row_slices(A):
        if rows.stop > first:
            rows = slice(max(rows.start, first), rows.stop)
            yield rows, A[rows].double()


def inner_products(reads: Sequence[Callable[[], MatrixLike]]) -> Tensor:
    """The Frobenius inner product of every two matrices, (t, t), float64; two of them are in memory at a time.

    Args:
        reads: t functions, each of which gives its matrix anew; all are of one shape.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import inner_products
        >>> inner_products([lambda: torch.eye(2), lambda: torch.ones(2, 2)])
        tensor([[2., 2.],
                [2., 4.]], dtype=torch.float64)
    """
    gram = torch.zeros(len(reads), len(reads), dtype=torch.float64)
    for i, read in enumerate(reads):
        A = read()
        for j in range(i + 1):
            B = A if i == j else reads[j]()
            product = sum(float((A[rows].double() * B[rows]).sum()) for rows in row_slices(A))
            gram[i, j] = gram[j, i] = product
    return gram


def gram_cosines(gram: Tensor) -> Tensor:
    """Cosines between matrices from their inner products, (t, t), in [-1, 1]; NaN beside a matrix of zeros.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import gram_cosines
        >>> gram_cosines(torch.tensor([[4.0, 2.0], [2.0, 4.0]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """
    norms = gram.diagonal().sqrt()
    return (gram / torch.outer(norms, norms)).clamp(-1.0, 1.0)
