"""Ways to the k leading singular triplets: ours and those that people use."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from benchmarks.matrices import Problem
from spectralbasis.linalg import leading_svd

TOLERANCE = 1e-3
"""Largest sine between the computed and the true subspace at which times are compared."""
OURS = "spectralbasis.linalg.leading_svd"
DENSE = "torch.linalg.svd"
Solver = Callable[[Problem], tuple[Tensor, Tensor]]


def ours(problem: Problem) -> tuple[Tensor, Tensor]:
    found = leading_svd(problem.A, problem.k, tolerance=TOLERANCE)
    return found.U, found.Vh


def dense(problem: Problem) -> tuple[Tensor, Tensor]:
    U, _, Vh = torch.linalg.svd(problem.A, full_matrices=False)
    return U[:, : problem.k], Vh[: problem.k]


def lowrank(oversampling: int, iterations: int) -> Solver:
    """`torch.svd_lowrank` with q = oversampling · k."""

    def solve(problem: Problem) -> tuple[Tensor, Tensor]:
        q = min(oversampling * problem.k, *problem.A.shape)
        U, _, V = torch.svd_lowrank(problem.A, q=q, niter=iterations)
        return U[:, : problem.k], V[:, : problem.k].T

    return solve


def randomized(oversampling: int) -> Solver:
    """scikit-learn's `randomized_svd`, its number of power iterations left to it."""

    def solve(problem: Problem) -> tuple[Tensor, Tensor]:
        U, _, Vh = randomized_svd(problem.A.numpy(), problem.k, n_oversamples=oversampling, random_state=0)
        return torch.from_numpy(U), torch.from_numpy(Vh)

    return solve


def sparse(solver: Literal["arpack", "propack"]) -> Solver:
    """SciPy's `svds`, no more accurate than needed."""

    def solve(problem: Problem) -> tuple[Tensor, Tensor]:
        U, _, Vh = scipy.sparse.linalg.svds(
            problem.A.numpy(), problem.k, tol=needed_tolerance(problem), solver=solver, rng=0
        )
        return torch.from_numpy(U.copy()), torch.from_numpy(Vh.copy())

    return solve


def gram_range(dtype: Any) -> Solver:
    """Gram matrix of the smaller side, LAPACK's `syevr` on the leading index range."""

    def solve(problem: Problem) -> tuple[Tensor, Tensor]:
        A = problem.A.numpy().astype(dtype, copy=False)
        if A.shape[0] < A.shape[1]:
            Vh, U = _gram_factors(A.T, problem.k)
            return torch.from_numpy(U), torch.from_numpy(Vh).T
        U, V = _gram_factors(A, problem.k)
        return torch.from_numpy(U), torch.from_numpy(V).T

    return solve


def primme(problem: Problem) -> tuple[Tensor, Tensor]:
    import primme

    gap_to_largest = problem.relative_gap * float(problem.S[problem.k - 1] / problem.S[0])
    U, _, Vh = primme.svds(problem.A.numpy(), problem.k, tol=TOLERANCE * gap_to_largest)
    return torch.from_numpy(U), torch.from_numpy(Vh)


def needed_tolerance(problem: Problem) -> float:
    """The relative residual at which the subspace error is `TOLERANCE`; a user does not know it, we do."""
    return TOLERANCE * problem.relative_gap


def _gram_factors(A: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    side = A.shape[1]
    _, V = scipy.linalg.eigh(A.T @ A, subset_by_index=(side - k, side - 1), driver="evr", check_finite=False)
    U = A @ V
    return U / np.linalg.norm(U, axis=0), V


def products(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """The matrix products that no solver of this kind can do without, in both precisions."""
    A = problem.A if problem.A.shape[0] >= problem.A.shape[1] else problem.A.T
    V = torch.linalg.qr(torch.randn(A.shape[1], problem.k))[0]
    A64, V64 = A.double(), V.double()
    return {
        "gram_float32": lambda: A.T @ A,
        "gram_float64": lambda: A64.T @ A64,
        "apply_float32": lambda: A @ V,
        "apply_float64": lambda: A64 @ V64,
    }


SOLVERS: dict[str, Solver] = {
    OURS: ours,
    DENSE: dense,
    "torch.svd_lowrank, q=k, niter=16 (PiSSA)": lowrank(1, 16),
    "torch.svd_lowrank, q=2k, niter=4": lowrank(2, 4),
    "sklearn randomized_svd, defaults": randomized(10),
    "sklearn randomized_svd, 64 oversamples": randomized(64),
    "scipy svds, ARPACK": sparse("arpack"),
    "scipy svds, PROPACK": sparse("propack"),
    "Gram and scipy eigh (syevr) in float32": gram_range(np.float32),
    "Gram and scipy eigh (syevr) in float64": gram_range(np.float64),
}
ABSENT = [] if find_spec("primme") else ["primme"]
if not ABSENT:
    SOLVERS["PRIMME"] = primme
