"""The best approximation of low rank of a matrix, with a certificate of the energy that it may miss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spectralbasis.linalg.certificates import energy_error_bound
from spectralbasis.linalg.row_blocks import MatrixLike, frobenius_norm, gram
from spectralbasis.linalg.solvers import BLOCK, leading_eigenpairs, leading_right_space
from spectralbasis.linalg.svd import check_k, gram_pays, krylov_pays, plain_numbers, rayleigh_ritz

ENERGY_BLOCKS = 60
"""Blocks of a Krylov space that `low_rank` tries: of a matrix of noise they cost a third of its Gram matrix."""
_EXACT = 1e-12
"""Share of energy that a full decomposition in float64 may be wrong by."""


@dataclass(frozen=True)
class LowRank:
    """The k leading singular triplets of an (m, n) matrix as its best approximation of rank k, with a certificate.

    Attributes:
        U: (m, k), columns orthonormal.
        S: (k,), descending, float64.
        Vh: (k, n), rows orthonormal.
        total: `‖A‖_F²`, the energy of the matrix.
        error_bound: largest share of the best possible energy `Σ_{i≤k} σ_i²` that the triplets may miss, in [0, 1].
        solver: "krylov", "gram" or "dense", as in `LeadingSVD`.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import low_rank
        >>> found = low_rank(torch.diag(torch.tensor([3.0, 2.0, 1.0])), k=1)
        >>> found.U.shape, found.S, found.Vh.shape
        (torch.Size([3, 1]), tensor([3.], dtype=torch.float64), torch.Size([1, 3]))
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    total: float
    error_bound: float
    solver: str

    @property
    def k(self) -> int:
        """Number of triplets."""
        return self.S.numel()

    @property
    def held(self) -> float:
        """The energy of the approximation, `Σ S_i²`."""
        return float(self.S.square().sum())


def low_rank(A: MatrixLike, k: int, *, tolerance: float = 1e-5) -> LowRank:
    """The best approximation of rank k of a dense matrix, certified to a share of its energy.

    Much cheaper than `leading_svd` where the spectrum has no gap after σ_k: the subspace of such a matrix is uncertain,
    but the energy in it is not (`certificates.energy_error_bound`). The solvers are those of `leading_svd`. A full
    decomposition runs only for small matrices, and for a k of more than a quarter of the smaller side.

    Args:
        A: the matrix, (m, n), any floating dtype.
        k: number of triplets, 1 ≤ k ≤ min(m, n).
        tolerance: the largest share of the best energy that may be missed.

    Raises:
        ValueError: `A` is not a finite matrix, or k is out of range.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import low_rank
        >>> found = low_rank(torch.diag(torch.tensor([3.0, 2.0, 1.0])), k=2)
        >>> found.held, found.total, found.error_bound <= 1e-12
        (13.0, 14.0, True)
    """
    m, n = check_k(A, k)
    if isinstance(A, Tensor):
        A = plain_numbers(A)
    total = float(frobenius_norm(A).square())
    if isinstance(A, Tensor) and not (krylov_pays(m, n, k) or gram_pays(m, n, k)):
        U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
        return _approximation(A, (U[:, :k], S[:k], Vh[:k]), total, _EXACT, "dense")

    def error_bound(S: Tensor, R: Tensor, k: int) -> float:
        left = max(1 - float(S[:k].square().sum()) / total, 0.0) if total > 0 else 0.0
        return min(left, energy_error_bound(S, R, k))  # they miss no more than what they leave of the matrix

    tall = A if m >= n else A.T
    found, solver = None, "krylov"
    if krylov_pays(m, n, k):
        V = leading_right_space(tall, k, tolerance, error_bound, most_blocks=ENERGY_BLOCKS)
        found = None if V is None else rayleigh_ritz(tall, V.double())
    if found is None or error_bound(found[1], found[3], k) > tolerance:
        V = leading_eigenpairs(gram(tall), min(k + BLOCK, min(m, n)))[1]
        found, solver = rayleigh_ritz(tall, V), "gram"
    U, S, V, R = found
    bound = error_bound(S, R, k)
    triplets = (U[:, :k], S[:k], V[:, :k].T) if m >= n else (V[:, :k], S[:k], U[:, :k].T)
    return _approximation(A, triplets, total, bound, solver)


def _approximation(
    A: MatrixLike, triplets: tuple[Tensor, Tensor, Tensor], total: float, bound: float, solver: str
) -> LowRank:
    """The triplets in the dtype that they are returned in."""
    dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
    U, S, Vh = triplets
    return LowRank(
        U.to(dtype), S, Vh.to(dtype), total, bound, solver if isinstance(A, Tensor) else f"{solver} (row blocks)"
    )
