"""Eigenvalues and leading eigenvectors of a symmetric matrix from one reduction to tridiagonal form."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal, lapack
from threadpoolctl import ThreadpoolController
from torch import Tensor

THREADED_SIDE = 1536
"""From this side on, an eigenvalue problem gains more from several threads than it loses by waiting for torch's."""


def eigenvalues(G: Tensor) -> Tensor:
    """All eigenvalues of a symmetric float64 matrix (p, p), (p,), descending; overwrites `G`."""
    return leading_eigenpairs(G, 0)[0]


def leading_eigenpairs(G: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues of a symmetric float64 matrix and its k leading eigenvectors; reads its upper triangle.

    LAPACK reduces to tridiagonal form once (`sytrd`), takes every eigenvalue of it (`sterf`) and the vectors of the
    leading ones by inverse iteration (`stein`). SciPy's `eigh` on an index range reduces too, but finds the eigenvalues
    of the range alone, and more slowly.

    Args:
        G: (p, p), overwritten.
        k: number of eigenvectors.

    Returns:
        Eigenvalues (p,) and eigenvectors (p, k), both by descending eigenvalue, on the device of `G`.
    """
    if G.device.type != "cpu":
        values, vectors = torch.linalg.eigh(G, UPLO="U")
        return values.flip(0), vectors[:, len(G) - k :].flip(1)
    # The transpose has LAPACK's own memory order, so that it is not copied.
    with _blas_threads(len(G)):
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
    with _blas_threads(len(G)):
        reflectors, diagonal, off, scales, _ = lapack.dsytrd(G.numpy().T, lower=1, lwork=32 * len(G), overwrite_a=1)
        turned = X.numpy().copy(order="F")
        turned[1:] = _reflected("T", reflectors, scales, turned[1:])
        values, vectors = eigh_tridiagonal(diagonal, off)
    return torch.from_numpy(values).flip(0), torch.from_numpy(vectors.T @ turned).flip(0)


def _tridiagonal(G: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending eigenvalues and the vectors of the last k."""
    p = len(G)
    if p == 1:
        return G[0].copy(), np.ones((1, k))
    reflectors, diagonal, off, scales, _ = lapack.dsytrd(G, lower=1, lwork=32 * p, overwrite_a=1)
    values, failed = lapack.dsterf(diagonal, off)
    if k and not failed:
        one_block = np.ones(p, np.int32), np.full(p, p, np.int32)
        vectors, failed = lapack.dstein(diagonal, off, values[p - k :], *one_block)
        failed = failed or not np.isfinite(vectors).all()  # a zero matrix
    if failed:
        values, vectors = eigh_tridiagonal(diagonal, off)
    if k == 0:
        return values, np.empty((p, 0))
    vectors = np.asfortranarray(vectors[:, -k:])
    vectors[1:] = _reflected("N", reflectors, scales, vectors[1:])
    return values, vectors


def _reflected(transposed: str, reflectors: np.ndarray, scales: np.ndarray, X: np.ndarray) -> np.ndarray:
    """`Q X` ("N") or `Qᵀ X` ("T") for the Q (p−1, p−1) of a reduction whose reflectors are the columns below row 0."""
    p = len(reflectors)
    # The columns from their second row on, each with the first entry of the next as a last one that LAPACK passes over:
    # a slice that leaves it out would be copied.
    below = reflectors.reshape(-1, order="F")[1 : 1 + p * (p - 1)].reshape(p, p - 1, order="F")
    return lapack.dormqr("L", transposed, below, scales, X, lwork=32 * X.shape[1])[0]


def _blas_threads(p: int) -> AbstractContextManager[object]:
    """One BLAS thread for SciPy on matrices of a side below `THREADED_SIDE`.

    Its threads and torch's wait for each other in turns, which costs small problems more than the threads gain them.
    """
    return _pools().limit(limits=1, user_api="blas") if p < THREADED_SIDE else nullcontext()


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()
