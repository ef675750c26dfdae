"""What residuals prove about singular vectors and subspaces (Wedin, BIT 12, 1972; Stewart & Sun, 1990, section V.4)."""

import math

import torch
from torch import Tensor

from spectralbasis.linalg.row_blocks import MatrixLike, times, times_and_back, transposed_times

LARGEST_RESIDUAL = 1e-4
"""Of a pair of singular vectors over its singular value, up to which `W v = σ u` may stand for an equation."""
LARGEST_LOSS = 1e-5
"""Relative error up to which `v·x` may be found from `W x + bias`; twice the rounding of the dtype, if that is more."""

_WIDTH = 8
_STEPS = 8


def triplet_residuals(A: MatrixLike, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """`sqrt(‖A v_i − σ_i u_i‖² + ‖Aᵀ u_i − σ_i v_i‖²)` for each triplet, (k,), float64, in the units of S.

    Args:
        A: (m, n), any floating dtype.
        U: (m, k) float64.
        S: (k,) float64.
        Vh: (k, n) float64.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import triplet_residuals
        >>> E = torch.eye(2, dtype=torch.float64)
        >>> triplet_residuals(torch.diag(torch.tensor([3.0, 1.0])), E, torch.tensor([3.0, 1.5], dtype=torch.float64), E)
        tensor([0.0000, 0.7071], dtype=torch.float64)
    """
    right = (times(A, Vh.T) - U * S).square().sum(0)
    left = (transposed_times(A, U) - Vh.T * S).square().sum(0)
    return (left + right).sqrt()


def subspace_error_bound(S: Tensor, residuals: Tensor, next_singular_value: float, shape: tuple[int, int]) -> float:
    """Bound on the largest sine between the computed leading subspaces and the true ones, in [0, 1].

    Wedin's theorem: `‖sin Θ_U‖_F² + ‖sin Θ_V‖_F² ≤ Σ residuals² / δ²`, with δ the distance from σ_k to what remains,
    which is σ_{k+1}, or 0 (the null space of a rectangular matrix). All k directions of a square matrix span
    everything, so they cannot be wrong.

    Args:
        S: computed singular values, (k,), descending.
        residuals: their residuals, (k,).
        next_singular_value: σ_{k+1}; 0 where there is none.
        shape: (m, n) of the matrix.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import subspace_error_bound
        >>> round(subspace_error_bound(torch.tensor([3.0, 2.0]), torch.tensor([0.0, 0.01]), 1.0, (5, 4)), 4)
        0.01
    """
    if S.numel() == shape[0] == shape[1]:
        return 0.0
    gap = float(S[-1]) - next_singular_value
    rounding = 4 * math.sqrt(max(shape)) * torch.finfo(torch.float64).eps * float(S[0])
    if gap <= rounding:
        return 1.0
    return min(1.0, float(torch.linalg.vector_norm(residuals.double())) / (gap - rounding))


def ritz_error_bound(S: Tensor, R: Tensor, k: int) -> float:
    """Bound on the largest sine between the computed k leading subspaces and the true ones, from p > k Ritz triplets.

    The p triplets `(u, σ, v)` are of a Rayleigh–Ritz projection, so that no two of them are coupled but through what
    lies outside of all of them. In the eigenvectors of `[[0, A], [Aᵀ, 0]]` an error therefore has to go there and back:
    with ε = ‖R‖₂, it is at most `x₃ = ‖R_k‖_F / √2 / (σ_k − c − ε²/g)` outside, and `x₂ = ε x₃ / g` within, where
    g = σ_k − σ_{k+1} and c bounds what is outside: `σ_{q+1} + 2ε` for the last q whose gap exceeds 2ε, by Weyl's
    theorem (Parlett, The Symmetric Eigenvalue Problem, 1998, chapter 11, on residuals and their squares). It holds if
    no triplet of a larger value than σ_p is missing from the p.

    Args:
        S: Ritz values, (p,), descending.
        R: residual vectors `Aᵀ u − σ v`, (n, p), of triplets with `A v = σ u`; any orthogonal transform of them does.
        k: number of leading triplets.

    Returns:
        The bound, for left and right together, in [0, 1].
    """
    gram = R.T @ R if R.shape[0] > R.shape[1] else R @ R.T
    coupling = math.sqrt(float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0)))
    gaps = S[:-1] - S[1:]
    clear = torch.nonzero(gaps[k - 1 :] > 2 * coupling)
    if len(clear) == 0:
        return 1.0
    outside = float(S[k + int(clear[-1])]) + 2 * coupling
    gap = float(gaps[k - 1])
    distance = float(S[k - 1]) - outside - (coupling**2 / gap if gap > 0 else math.inf)
    if not distance > 0:
        return 1.0
    error = float(torch.linalg.matrix_norm(R[:, :k])) / distance
    return min(1.0, error * math.hypot(1.0, coupling / gap))


def energy_error_bound(S: Tensor, R: Tensor, k: int) -> float:
    """Bound on the share of the best rank-k approximation's energy that the first k of p Ritz triplets miss.

    The best energy is `Σ_{i≤k} σ_i²` (Eckart & Young, 1936), and the triplets hold `Σ_{i≤k} S_i²`. In the basis of the
    right vectors, `AᵀA` is `[[Θ_q, Eᵀ], [E, B]]` with `Θ = S²`, `E = R_q S_q` and, for each q from k to p − 1,
    `‖B‖ ≤ β = (S_{q+1} + ‖R‖₂)²`. For `t = σ_k² − β > 0` this is at most `diag(Θ_q + EᵀE / t, β + t)` in the order of
    semidefinite matrices, so the k largest eigenvalues sum to at most `Σ_{i≤k} S_i² + ‖E‖_F² / t`. No gap after σ_k is
    needed: of any q the best bound counts. It holds if no triplet of a larger value than σ_p is missing from the p, as
    `ritz_error_bound` does.

    Args:
        S: Ritz values, (p,), descending, p > k.
        R: residual vectors `Aᵀ u − σ v`, (n, p), of triplets with `A v = σ u`; any orthogonal transform of them does.
        k: number of leading triplets.

    Returns:
        The bound, in [0, 1].

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import energy_error_bound
        >>> S, R = torch.tensor([3.0, 1.0], dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)
        >>> R[0, 0] = 0.1
        >>> round(energy_error_bound(S, R, 1), 5)
        0.00128
    """
    held = float(S[:k].square().sum())
    gram = R.T @ R if R.shape[0] > R.shape[1] else R @ R.T
    coupling = torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt()
    coupled = (R.square().sum(0) * S.square()).cumsum(0)[k - 1 : -1]
    gaps = S[k - 1].square() - (S[k:] + coupling).square()
    bounds = coupled[gaps > 0] / gaps[gaps > 0]
    return min(1.0, float(bounds.min()) / held) if len(bounds) and held > 0 else 1.0


def largest_value_outside(A: MatrixLike, Vh: Tensor) -> float:
    """About the largest singular value of `A (I − V Vᵀ)`, from below: what A does to directions orthogonal to V.

    Block Lanczos from a few random vectors, without the accuracy that singular vectors would take. The estimate is
    never too large but for rounding; it is too small by a few per cent where many values are nearly equal.

    Args:
        A: (m, n), any floating dtype.
        Vh: (k, n) float64, rows orthonormal; 0 where they span everything.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import largest_value_outside
        >>> E = torch.eye(3, dtype=torch.float64)
        >>> round(largest_value_outside(torch.diag(torch.tensor([3.0, 2.0, 1.0])), E[:1]), 6)
        2.0
    """
    k, n = Vh.shape
    basis = torch.linalg.qr(Vh.T)[0]
    block = torch.randn(n, _WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(Vh.device)
    for _ in range(_STEPS):
        for _ in range(3):  # of a matrix of low rank little but rounding remains, which is made orthogonal once more
            block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
        block = block[:, : n - basis.shape[1]]
        if block.shape[1] == 0:
            break
        basis = torch.cat([basis, block], 1)
        block = times_and_back(A, block)[1]
    return float(torch.linalg.matrix_norm(times(A, basis[:, k:]), 2)) if basis.shape[1] > k else 0.0


def values_of_singular_vectors(
    W: Tensor, U: Tensor, V: Tensor, *, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor | None:
    """σ (k,), if `W V = U Σ` and `Wᵀ U = V Σ` hold well enough to compute one side in place of the other; else None.

    Args:
        W: (m, n), float32 or float64.
        U: (m, k) in the dtype of W.
        V: (n, k) in the dtype of W.
        bias: (m,) of the layer, if it has one.
        dtype: in which the layer multiplies; None is that of W.

    Returns:
        None where a residual exceeds `LARGEST_RESIDUAL` of its singular value, or W has another dtype. None too where a
        singular value is so small beside the others, or beside the bias, that `uᵀ (W x + bias) - uᵀ bias`, rounded in
        `dtype` and divided by it, is off from `v·x` by more than `LARGEST_LOSS`, for an x of entries of order 1.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import values_of_singular_vectors
        >>> values_of_singular_vectors(torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2), torch.eye(2))
        tensor([3., 1.])
    """
    if W.dtype != U.dtype or W.dtype not in (torch.float32, torch.float64):
        return None
    with torch.autocast(W.device.type, enabled=False):
        right, left = W @ V, W.T @ U
        S = (U * right).sum(0)
        residuals = torch.maximum((right - U * S).norm(dim=0), (left - V * S).norm(dim=0))
        size = W.norm() / min(W.shape) ** 0.5
        if bias is not None:
            size = torch.maximum(size, bias.detach().norm() / len(bias) ** 0.5)
    rounding = torch.finfo(dtype or W.dtype).eps
    holds = (residuals <= LARGEST_RESIDUAL * S) & (rounding * size <= max(LARGEST_LOSS, 2 * rounding) * S) & (S > 0)
    return S if bool(holds.all()) else None


def vector_error_bounds(S: Tensor, residuals: Tensor, next_singular_value: float) -> Tensor:
    """Bound on the sine between each computed singular vector and the true one, (k,), in [0, 1].

    The gap of a single direction is the distance of its singular value to the nearest other one, so that a direction
    inside a cluster of equal singular values gets 1: only the cluster's subspace means something.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import vector_error_bounds
        >>> vector_error_bounds(torch.tensor([3.0, 2.0]), torch.tensor([0.01, 0.01]), 2.0)
        tensor([0.0100, 1.0000], dtype=torch.float64)
    """
    values = torch.cat([S.double(), torch.tensor([next_singular_value], dtype=torch.float64, device=S.device)])
    below = values[:-1] - values[1:]
    above = torch.cat([below.new_full((1,), math.inf), below[:-1]])
    gaps = torch.minimum(above, below)
    return torch.where(gaps > 0, residuals.double() / gaps.clamp_min(1e-300), 1.0).clamp_max(1.0)


def wedin_bound(base_value: float, tuned_next_value: float, update_norm: float) -> float:
    """Bound on the largest sine between leading subspaces of `W0` and `W0 + ΔW` that the size of ΔW alone forces.

    `‖ΔW‖₂ / (σ_k(W0) − σ_{k+1}(W1))`, at most 1; 1 says that the size forces nothing.

    Examples:
        >>> from spectralbasis.linalg import wedin_bound
        >>> wedin_bound(base_value=3.0, tuned_next_value=1.0, update_norm=0.5)
        0.25
    """
    gap = base_value - tuned_next_value
    return min(1.0, update_norm / gap) if gap > 0 else 1.0
