"""The two solvers behind `leading_svd`: eigenpairs of a Gram matrix, and block Lanczos.

Eigenpairs come from one reduction to tridiagonal form. Block Lanczos in float32 finds the leading singular subspace
with a few hundred products.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal, lapack
from threadpoolctl import ThreadpoolController
from torch import Tensor

from spectralbasis.linalg.certificates import ritz_error_bound
from spectralbasis.linalg.row_blocks import Factor, back_and_forth, largest_modulus

THREADED_SIDE = 1536
"""From this side on, an eigenvalue problem gains more from several threads than it loses by waiting for torch's."""


VALUES_ALONE = 1024
"""From this side on, torch's LAPACK finds eigenvalues in two thirds of the time of SciPy's; it gives no vectors."""
BLOCK = 16
"""Vectors a product takes at once: fewer need fewer dimensions in all, but use the processor less well."""
SAFETY = 2.0
"""How far below the tolerance the estimated error has to be: what is estimated in float32 is measured afterwards."""
RATE = 8.0
"""By how much one more block lessens the error once it has begun to fall; only the next look depends on it."""
SLOWEST = 1.5
"""The slowest decay of the error that is believed; only the next look depends on it."""
FOLLOWING = 1e-2
"""Relative error of σ²_{k+1} that is left to it, for bounds on what is not among the k are made with it."""
UNSEEN = 3
"""How many blocks pass before the next look where there is no estimate yet."""
AHEAD = 6
"""How many blocks may pass without a look."""
SPREAD = 1e-2
"""Of the diagonal of a Cholesky factor in float32, the smallest ratio that squaring does no harm at."""
EXHAUSTED = 1e-3
"""A block of this condition holds directions that are little but rounding, and is made orthogonal once more."""
NOISE = 1e-12
"""Share of the largest singular value below which one that was found in float32 is nothing but rounding."""
CLUSTER = 1e-4
"""Relative spread below which `BLOCK` singular values count as equal: such a block may hide more of them."""


def eigenvalues(G: Tensor) -> Tensor:
    """All eigenvalues of a symmetric matrix (p, p) in float64 or float32, (p,), descending; may overwrite `G`."""
    if len(G) >= VALUES_ALONE:
        return torch.linalg.eigvalsh(G, UPLO="U").flip(0)
    return leading_eigenpairs(G, 0)[0]


def leading_eigenpairs(G: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues of a symmetric matrix and its k leading eigenvectors; reads its upper triangle.

    LAPACK reduces to tridiagonal form once (`sytrd`), takes every eigenvalue of it (`sterf`) and the vectors of the
    leading ones by inverse iteration (`stein`). SciPy's `eigh` on an index range reduces too, but finds the eigenvalues
    of the range alone, and more slowly.

    Args:
        G: (p, p), float64 or float32, which takes half the time; overwritten.
        k: number of eigenvectors.

    Returns:
        Eigenvalues (p,) and eigenvectors (p, k), both by descending eigenvalue, in the dtype and on the device of `G`.
    """
    if G.device.type != "cpu":
        values, vectors = torch.linalg.eigh(G, UPLO="U")
        return values.flip(0), vectors[:, len(G) - k :].flip(1)
    # The transpose has LAPACK's own memory order, so that it is not copied.
    with _one_blas_thread(len(G)):
        values, vectors = _tridiagonal(G.numpy().T, k)
    return torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1)


def eigenvector_products(G: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenvalues of a symmetric float64 matrix and `Zᵀ X` for its eigenvectors Z, in p² numbers beside `G`.

    Args:
        G: (p, p), overwritten; its upper triangle is read.
        X: (p, j) float64.

    Returns:
        Eigenvalues (p,) and inner products (p, j), both by descending eigenvalue, on the device of `G`.
    """
    if G.device.type != "cpu" or len(G) == 1:
        values, vectors = torch.linalg.eigh(G, UPLO="U")
        return values.flip(0), (vectors.T @ X).flip(0)
    with _one_blas_thread(len(G)):
        reflectors, diagonal, off, scales, _ = lapack.dsytrd(G.numpy().T, lower=1, lwork=32 * len(G), overwrite_a=1)
        turned = X.numpy().copy(order="F")
        turned[1:] = _reflected("T", reflectors, scales, turned[1:])
        values, vectors = eigh_tridiagonal(diagonal, off)
    return torch.from_numpy(values).flip(0), torch.from_numpy(vectors.T @ turned).flip(0)


def _tridiagonal(G: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending eigenvalues and the vectors of the last k."""
    p = len(G)
    if p == 1:
        return G[0].copy(), np.ones((1, k), G.dtype)
    sytrd, sterf, stein = (_routine(name, G) for name in ("sytrd", "sterf", "stein"))
    reflectors, diagonal, off, scales, _ = sytrd(G, lower=1, lwork=32 * p, overwrite_a=1)
    values, failed = sterf(diagonal, off)
    if k and not failed:
        one_block = np.ones(p, np.int32), np.full(p, p, np.int32)
        vectors, failed = stein(diagonal, off, values[p - k :], *one_block)
        failed = failed or not np.isfinite(vectors).all()  # a zero matrix
    if failed:
        values, vectors = eigh_tridiagonal(diagonal, off)
    if k == 0:
        return values, np.empty((p, 0), G.dtype)
    vectors = np.asfortranarray(vectors[:, -k:])
    vectors[1:] = _reflected("N", reflectors, scales, vectors[1:])
    return values, vectors


def _routine(name: str, G: np.ndarray) -> Callable[..., Any]:
    """LAPACK's routine for the dtype of G."""
    return getattr(lapack, f"{'s' if G.dtype == np.float32 else 'd'}{name}")


def _reflected(transposed: str, reflectors: np.ndarray, scales: np.ndarray, X: np.ndarray) -> np.ndarray:
    """`Q X` ("N") or `Qᵀ X` ("T") for the Q (p−1, p−1) of a reduction whose reflectors are the columns below row 0."""
    p = len(reflectors)
    # The columns from their second row on, each with the first entry of the next as a last one that LAPACK passes over:
    # a slice that leaves it out would be copied.
    below = reflectors.reshape(-1, order="F")[1 : 1 + p * (p - 1)].reshape(p, p - 1, order="F")
    return _routine("ormqr", reflectors)("L", transposed, below, scales, X, lwork=32 * X.shape[1])[0]


def _one_blas_thread(p: int) -> AbstractContextManager[object]:
    """One BLAS thread for SciPy on matrices of a side below `THREADED_SIDE`.

    Its threads and torch's wait for each other in turns, which costs small problems more than the threads gain them.
    """
    return _pools().limit(limits=1, user_api="blas") if p < THREADED_SIDE else nullcontext()


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()


ErrorBound = Callable[[Tensor, Tensor, int], float]
"""(Ritz values (p,), residual vectors, k) → what the first k triplets may be wrong by, in [0, 1]."""


def leading_right_space(
    A: Factor,
    k: int,
    tolerance: float,
    error_bound: ErrorBound = ritz_error_bound,
    *,
    G: Tensor | None = None,
    most_blocks: int = 20,
) -> Tensor | None:
    """A basis that holds the k leading right singular vectors of a tall (m, n) matrix, (n, p) float32 with p > k.

    Block Lanczos on `AᵀA` with full reorthogonalisation (Golub & Underwood, 1977) from a random block. A direction is
    found unless that block is orthogonal to it, which for 16 normal vectors has probability zero, or unless more
    singular values than the block has vectors are equal, where the search gives up. Nothing is known of the matrix
    beforehand, so no guess can pull the result towards itself.

    Args:
        A: (m, n), m ≥ n, any floating dtype; read once for every `BLOCK` dimensions (twice if a transposed source).
        k: number of directions.
        tolerance: the largest error that is accepted; `linalg.svd` measures what was reached.
        error_bound: what the error is: the sine of the subspace, or the share of energy that it misses.
        G: `AᵀA` up to a factor, (n, n) float32, where it is known: one product with it stands for two with A.
        most_blocks: of dimensions that are tried beside 6 k, at most.

    Returns:
        None where as many dimensions as pay do not suffice, or where singular values are equal.
    """
    if isinstance(A, Tensor) and G is None:
        A = A.float()
    m, n = A.shape
    most = min(n // 2, 6 * k + most_blocks * BLOCK)
    scale = max(largest_modulus(A if G is None else G), torch.finfo(torch.float32).tiny)
    Q = torch.empty(n, most + BLOCK, dtype=torch.float32, device=A.device)
    start = torch.randn(n, BLOCK, generator=torch.Generator().manual_seed(0))
    Q[:, :BLOCK] = torch.linalg.qr(start.to(Q))[0]
    T = torch.zeros(most, most, dtype=torch.float64)
    of_subspace = error_bound is ritz_error_bound
    check, before, checked = (3 if of_subspace else 2) * k + BLOCK, 1.0, 0
    for d in range(BLOCK, most + 1, BLOCK):
        space, recent = Q[:, :d], max(0, d - 2 * BLOCK)
        block = space[:, -BLOCK:]
        W = back_and_forth(A, block, scale) if G is None else (G @ block).div_(scale)
        # In exact arithmetic only the last two blocks have a part in W; what rounding leaves of the others follows.
        H = space[:, recent:].T @ W
        T[recent:d, d - BLOCK : d] = H
        W.addmm_(space[:, recent:], H, alpha=-1)
        W.addmm_(space, space.T @ W, alpha=-1)
        following, R = _orthonormal(W, space)
        Q[:, d : d + BLOCK] = following
        if d < check and d + BLOCK <= most:
            continue
        squares, weights = leading_eigenpairs(T[:d, :d].clone(), min(k + 2 * BLOCK, d))
        theta = squares.clamp_min(0).sqrt()
        if _clustered(theta[: k + 1]):
            return None
        leftover = R.double().cpu() @ weights[-BLOCK:]
        errors = _estimates(theta, leftover, k, scale, error_bound)
        # Bounds on what is not among the k are made with σ_{k+1}, so it must not change any more.
        settled = float(leftover[:, k].norm()) <= FOLLOWING * float(squares[k]) + CLUSTER**2 * float(squares[0])
        enough = [p for p, error in errors.items() if SAFETY * error <= tolerance and (settled or not of_subspace)]
        if enough:
            # Some vectors more than suffice cost little, and outweigh what float32 adds to the estimate.
            return space @ weights[:, : enough[min(1, len(enough) - 1)]].to(Q)
        error = max(min(errors.values(), default=1.0), 1e-300)
        blocks = (d - checked) // BLOCK if before < 1 else 0
        rate = (before / error) ** (1 / blocks) if blocks and error < before else RATE
        ahead = math.ceil(math.log(SAFETY * error / tolerance) / math.log(max(rate, SLOWEST)))
        # A look takes as long as so many blocks, so that looking more often than that does not pay.
        look = round(d**3 / (6 * (m if G is None else n / 2) * n))
        check, before, checked = d + BLOCK * min(AHEAD, max(ahead if error < 1 else UNSEEN, look)), error, d
    return None


def _orthonormal(W: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of what the columns of W span, orthogonal to `space` as W is, and R with `W = basis R`.

    By the Cholesky factor of `WᵀW`, twice (Yamamoto et al., ETNA 44, 2015): a third of the time of reflectors. These
    take over where a block is exhausted.
    """
    first, failed = torch.linalg.cholesky_ex(W.T @ W)
    diagonal = first.diagonal().abs()
    if not int(failed) and float(diagonal.min()) > SPREAD * float(diagonal.max()):
        basis = torch.linalg.solve_triangular(first.T, W, upper=True, left=False)
        second, failed = torch.linalg.cholesky_ex(basis.T @ basis)
        if not int(failed):
            return torch.linalg.solve_triangular(second.T, basis, upper=True, left=False), second.T @ first.T
    basis, R = torch.linalg.qr(W)
    if float(R.diagonal().abs().min()) < EXHAUSTED * float(R.diagonal().abs().max()):
        basis = torch.linalg.qr(basis - space @ (space.T @ basis))[0]
    return basis, R


def _clustered(theta: Tensor) -> bool:
    """Whether as many values as a block has vectors are equal."""
    return bool((theta[: 1 - BLOCK] - theta[BLOCK - 1 :] < CLUSTER * theta[: 1 - BLOCK]).any())


def _estimates(theta: Tensor, leftover: Tensor, k: int, scale: float, error_bound: ErrorBound) -> dict[int, float]:
    """Estimated error of the k leading directions by the number of Ritz vectors that are kept beside them."""
    # A value that rounding has made zero has an endless residual.
    theta = theta[: leftover.shape[1]].clamp_min(NOISE * theta[0])
    residuals = scale * leftover / theta
    numbers = range(k + BLOCK // 2, len(theta) + 1, BLOCK // 2) if float(theta[0]) > 0 else ()
    return {p: error_bound(scale * theta[:p], residuals[:, :p], k) for p in numbers}
