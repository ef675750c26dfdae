"""Block Lanczos in float32: where the leading singular vectors lie, at the price of a few hundred products."""

import math

import torch
from torch import Tensor

from spectralbasis.linalg.certificates import ritz_error_bound
from spectralbasis.linalg.eigen import leading_eigenpairs
from spectralbasis.linalg.products import Factor, back_and_forth, largest_modulus

BLOCK = 16
"""Vectors a product takes at once: fewer need fewer dimensions in all, but use the processor less well."""
SAFETY = 2.0
"""How far below the tolerance the estimated error has to be: what is estimated in float32 is measured afterwards."""
RATE = 8.0
"""By how much one more block lessens the error once it has begun to fall; only the next look depends on it."""
EXHAUSTED = 1e-3
"""A block of this condition holds directions that are little but rounding, and is made orthogonal once more."""
CLUSTER = 1e-4
"""Relative spread below which `BLOCK` singular values count as equal: such a block may hide more of them."""


def leading_right_space(A: Factor, k: int, tolerance: float) -> Tensor | None:
    """A basis that holds the k leading right singular vectors of a tall (m, n) matrix, (n, p) float32 with p > k.

    Block Lanczos on `AᵀA` with full reorthogonalisation (Golub & Underwood, 1977) from a random block. A direction is
    found unless that block is orthogonal to it, which for 16 normal vectors has probability zero, or unless more
    singular values than the block has vectors are equal, where the search gives up. Nothing is known of the matrix
    beforehand, so no guess can pull the result towards itself.

    Args:
        A: (m, n), m ≥ n, any floating dtype; read once for every `BLOCK` dimensions (twice if a transposed source).
        k: number of directions.
        tolerance: the largest sine that the subspace should be wrong by; `linalg.svd` measures what was reached.

    Returns:
        None where as many dimensions as pay do not suffice, or where singular values are equal.
    """
    if isinstance(A, Tensor):
        A = A.float()
    n = A.shape[1]
    most = min(n // 2, 6 * k + 20 * BLOCK)
    scale = max(largest_modulus(A), torch.finfo(torch.float32).tiny)
    Q = torch.empty(n, most + BLOCK, dtype=torch.float32, device=A.device)
    start = torch.randn(n, BLOCK, generator=torch.Generator().manual_seed(0))
    Q[:, :BLOCK] = torch.linalg.qr(start.to(Q))[0]
    T = torch.zeros(most, most, dtype=torch.float64)
    check = 3 * k + BLOCK
    for d in range(BLOCK, most + 1, BLOCK):
        space = Q[:, :d]
        W = back_and_forth(A, space[:, -BLOCK:], scale)
        H = space.T @ W
        T[:d, d - BLOCK : d] = H
        W -= space @ H
        W -= space @ (space.T @ W)
        following, R = torch.linalg.qr(W)
        if float(R.diagonal().abs().min()) < EXHAUSTED * float(R.diagonal().abs().max()):
            following = torch.linalg.qr(following - space @ (space.T @ following))[0]
        Q[:, d : d + BLOCK] = following
        if d < check and d + BLOCK <= most:
            continue
        theta, weights = _ritz(T[:d, :d], k + 2 * BLOCK)
        if _clustered(theta[: k + 1]):
            return None
        errors = _estimates(theta, R.double().cpu() @ weights[-BLOCK:], k)
        enough = [p for p, error in errors.items() if SAFETY * error <= tolerance]
        if enough:
            return space @ weights[:, : enough[0]].to(Q)
        missing = SAFETY * min(errors.values(), default=1.0) / tolerance
        check = d + BLOCK * min(4, math.ceil(math.log(missing, RATE)))
    return None


def _ritz(T: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """All Ritz values σ (d,), and the weights (d, most) of the leading ones' vectors, from the upper triangle of T."""
    squares, weights = leading_eigenpairs(T.clone(), min(most, len(T)))
    return squares.clamp_min(0).sqrt(), weights


def _clustered(theta: Tensor) -> bool:
    """Whether as many values as a block has vectors are equal."""
    return bool((theta[: 1 - BLOCK] - theta[BLOCK - 1 :] < CLUSTER * theta[: 1 - BLOCK]).any())


def _estimates(theta: Tensor, leftover: Tensor, k: int) -> dict[int, float]:
    """Estimated error of the k leading directions by the number of Ritz vectors that are kept beside them."""
    most = min(leftover.shape[1], int(torch.count_nonzero(theta)))
    residuals = leftover[:, :most] / theta[:most]
    numbers = range(k + BLOCK // 2, most + 1, BLOCK // 2)
    return {p: ritz_error_bound(theta[:p], residuals[:, :p], k) for p in numbers}
