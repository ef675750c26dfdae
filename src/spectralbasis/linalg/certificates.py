"""What residuals prove about singular vectors and subspaces (Wedin, BIT 12, 1972; Stewart & Sun, 1990, section V.4)."""

import math

import torch
from torch import Tensor

from spectralbasis.linalg.products import times, transposed_times


def triplet_residuals(A: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """`sqrt(‖A v_i − σ_i u_i‖² + ‖Aᵀ u_i − σ_i v_i‖²)` for each triplet, (k,), float64, in the units of S.

    Args:
        A: (m, n), any floating dtype.
        U: (m, k) float64.
        S: (k,) float64.
        Vh: (k, n) float64.
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
    """
    if S.numel() == shape[0] == shape[1]:
        return 0.0
    gap = float(S[-1]) - next_singular_value
    rounding = 4 * math.sqrt(max(shape)) * torch.finfo(torch.float64).eps * float(S[0])
    if gap <= rounding:
        return 1.0
    return min(1.0, float(torch.linalg.vector_norm(residuals.double())) / (gap - rounding))


def vector_error_bounds(S: Tensor, residuals: Tensor, next_singular_value: float) -> Tensor:
    """Bound on the sine between each computed singular vector and the true one, (k,), in [0, 1].

    The gap of a single direction is the distance of its singular value to the nearest other one, so that a direction
    inside a cluster of equal singular values gets 1: only the cluster's subspace means something.
    """
    values = torch.cat([S.double(), torch.tensor([next_singular_value], dtype=torch.float64, device=S.device)])
    below = values[:-1] - values[1:]
    above = torch.cat([below.new_full((1,), math.inf), below[:-1]])
    gaps = torch.minimum(above, below)
    return torch.where(gaps > 0, residuals.double() / gaps.clamp_min(1e-300), 1.0).clamp_max(1.0)


def wedin_bound(base_value: float, tuned_next_value: float, update_norm: float) -> float:
    """Bound on the largest sine between leading subspaces of `W0` and `W0 + ΔW` that the size of ΔW alone forces.

    `‖ΔW‖₂ / (σ_k(W0) − σ_{k+1}(W1))`, at most 1; 1 says that the size forces nothing.
    """
    gap = base_value - tuned_next_value
    return min(1.0, update_norm / gap) if gap > 0 else 1.0
