"""Leading singular triplets that carry their own certificate."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from scipy.linalg import eigh, eigvalsh
from threadpoolctl import ThreadpoolController
from torch import Tensor

from spectralbasis.linalg.certificates import subspace_error_bound, triplet_residuals
from spectralbasis.linalg.products import gram, times

DENSE_SIDE = 64
"""Up to this smaller side a dense decomposition costs less than the calls around any other."""
THREADED_SIDE = 1536
"""From this side on, an eigenvalue problem gains more from several threads than it loses by waiting for torch's."""


@dataclass(frozen=True)
class LeadingSVD:
    """The k leading singular triplets of an (m, n) matrix, with the evidence that they are right.

    Attributes:
        U: left singular vectors, (m, k), columns orthonormal.
        S: singular values, (k,), descending.
        Vh: right singular vectors, (k, n), rows orthonormal.
        residuals: `sqrt(‖A v − σ u‖² + ‖Aᵀ u − σ v‖²)` of each triplet, (k,), in the units of `S`, measured in float64
            before the factors are rounded to the dtype they are returned in.
        next_singular_value: σ_{k+1}; 0 where k = min(m, n).
        subspace_error_bound: bound on the largest sine between the computed and the true leading subspaces (left and
            right), in [0, 1]; 1 says that nothing is certain, as where σ_k = σ_{k+1} and no leading subspace exists.
        solver: "gram" or "dense": what produced the triplets; "dense (gram missed the tolerance)" after a fallback.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    next_singular_value: float
    subspace_error_bound: float
    solver: str


def leading_svd(A: Tensor, k: int, *, tolerance: float = 1e-4) -> LeadingSVD:
    """The k leading singular triplets of a dense matrix, certified to a subspace error.

    Work is done in float64: with float32 the residuals alone, about 1e-5 σ_1, exceed the gaps of real weight matrices
    by too little to bound anything below 1e-3. The cheaper of two solvers runs first: the Gram matrix of the smaller
    side with LAPACK's `syevr` on the leading index range, or a dense decomposition; what the Gram matrix cannot
    certify (it squares the condition number) is decomposed again, densely.

    Args:
        A: the matrix, (m, n), any floating dtype.
        k: number of triplets, 1 ≤ k ≤ min(m, n).
        tolerance: the largest sine accepted between computed and true leading subspaces.

    Returns:
        Factors in float32 (float64 if `A` is), on the device of `A`. Where the spectrum has no gap after σ_k no solver
        can reach the tolerance; then `subspace_error_bound` says what can be said.

    Raises:
        ValueError: `A` is not a finite matrix, or k is out of range.
    """
    check_matrix(A)
    m, n = A.shape
    if not 1 <= k <= min(m, n):
        raise ValueError(f"k={k} is outside 1..min(m, n)={min(m, n)} of this {m}x{n} matrix; pass k<={min(m, n)}")
    A = A.detach()
    if not gram_pays(m, n, k):
        return _certified(A, *_dense(A, k), solver="dense")
    result = _certified(A, *_gram(A, k), solver="gram")
    if result.subspace_error_bound <= tolerance:
        return result
    return _certified(A, *_dense(A, k), solver="dense (gram missed the tolerance)")


def singular_values(A: Tensor) -> Tensor:
    """All singular values of an (m, n) matrix, (min(m, n),), descending, float64.

    From the Gram matrix in float64, without vectors: values below 1e-8 σ_1 are noise.

    Raises:
        ValueError: `A` is not a finite matrix.
    """
    check_matrix(A)
    G = gram(A.detach() if A.shape[0] >= A.shape[1] else A.detach().T)
    if G.device.type == "cpu":
        with _blas_threads(len(G)):
            eigenvalues = torch.from_numpy(eigvalsh(G.numpy().T, overwrite_a=True, check_finite=False))
    else:
        eigenvalues = torch.linalg.eigvalsh(G)
    return eigenvalues.flip(0).clamp_min(0).sqrt()


def gram_pays(m: int, n: int, k: int) -> bool:
    """Whether the Gram matrix is the cheaper way to k triplets; the crossovers were measured on a CPU in float64."""
    short, long = min(m, n), max(m, n)
    return short > DENSE_SIDE and k <= (short // 2 if long >= 2 * short else short // 4)


def check_matrix(A: Tensor) -> None:
    """Raise ValueError unless `A` is a non-empty matrix of finite real numbers."""
    if A.ndim != 2 or A.numel() == 0 or not A.is_floating_point():
        raise ValueError(f"expected a non-empty real matrix (m, n), got {A.dtype} of shape {tuple(A.shape)}")
    if not bool(torch.isfinite(A).all()):
        raise ValueError("the matrix holds NaN or infinite values, so it has no singular value decomposition")


def _dense(A: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets by a full decomposition; S has one value more than k where the matrix has."""
    U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    return U[:, :k], S[: k + 1], Vh[:k]


def _gram(A: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets from the leading eigenvectors of the smaller Gram matrix, then Rayleigh–Ritz on `A` itself.

    Rayleigh–Ritz gives singular values to full relative accuracy, which the squared ones do not have.
    """
    if A.shape[0] < A.shape[1]:
        V, S, Uh = _gram(A.T, k)
        return Uh.T, S, V.T
    V = leading_eigenvectors(gram(A), k + 1)
    Q, R = torch.linalg.qr(times(A, V))
    left, S, right = torch.linalg.svd(R)
    return (Q @ left)[:, :k], S, (right @ V.T)[:k]


def leading_eigenvectors(G: Tensor, k: int) -> Tensor:
    """The k leading eigenvectors of a symmetric (p, p) matrix, (p, k), by descending eigenvalue; overwrites `G`."""
    p = G.shape[0]
    if G.device.type != "cpu":
        return torch.linalg.eigh(G)[1][:, -k:].flip(1)
    # The transpose has LAPACK's own memory order, so that it is not copied.
    with _blas_threads(p):
        _, V = eigh(G.numpy().T, subset_by_index=(p - k, p - 1), driver="evr", overwrite_a=True, check_finite=False)
    return torch.from_numpy(V).flip(1)


def _blas_threads(p: int) -> AbstractContextManager[object]:
    """One BLAS thread for SciPy on matrices of a side below `THREADED_SIDE`.

    Its threads and torch's wait for each other in turns, which costs small problems more than the threads gain them.
    """
    return _pools().limit(limits=1, user_api="blas") if p < THREADED_SIDE else nullcontext()


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()


def _certified(A: Tensor, U: Tensor, S: Tensor, Vh: Tensor, *, solver: str) -> LeadingSVD:
    k = U.shape[1]
    dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
    next_value = float(S[k]) if S.numel() > k else 0.0
    residuals = triplet_residuals(A, U, S[:k], Vh)
    bound = subspace_error_bound(S[:k], residuals, next_value, (A.shape[0], A.shape[1]))
    return LeadingSVD(
        U=U.to(dtype),
        S=S[:k].to(dtype),
        Vh=Vh.to(dtype),
        residuals=residuals.to(dtype),
        next_singular_value=next_value,
        subspace_error_bound=bound,
        solver=solver,
    )
