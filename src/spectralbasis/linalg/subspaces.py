"""Overlaps, angles and cosines of two orthonormal frames; the arbitrary signs of singular vectors do not matter."""

import math

import torch
from torch import Tensor


def subspace_overlap(U0: Tensor, U1: Tensor) -> float:
    """`‖U0ᵀ U1‖_F² / k`, the share of one subspace that lies in the other, in [0, 1].

    Args:
        U0: (m, k) with orthonormal columns.
        U1: (m, k) with orthonormal columns.

    Raises:
        ValueError: the shapes differ.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import subspace_overlap
        >>> E = torch.eye(3)
        >>> subspace_overlap(E[:, :2], E[:, [1, 2]])
        0.5
    """
    return float(overlaps_by_k(cross_cosines(U0, U1))[-1])


def cross_cosines(U0: Tensor, U1: Tensor) -> Tensor:
    """`U0ᵀ U1`, the cosine of every vector of one frame with every vector of the other, (k, k), float64.

    Raises:
        ValueError: the shapes differ.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import cross_cosines
        >>> E = torch.eye(3)
        >>> cross_cosines(E[:, :2], E[:, [1, 2]])
        tensor([[0., 0.],
                [1., 0.]], dtype=torch.float64)
    """
    if U0.ndim != 2 or U0.shape != U1.shape:
        raise ValueError(
            f"expected two (m, k) frames of one shape, got {tuple(U0.shape)} and {tuple(U1.shape)}; "
            "pass right singular vectors as columns (Vh.T)"
        )
    return U0.double().T @ U1.double()


def overlaps_by_k(cosines: Tensor) -> Tensor:
    """The overlap of the first j vectors of both frames for j = 1..k, from their cross cosines (k, k); (k,), in [0, 1].

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import overlaps_by_k
        >>> overlaps_by_k(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([0., 1.])
    """
    leading_blocks = cosines.square().cumsum(0).cumsum(1).diagonal()
    return (leading_blocks / torch.arange(1, len(cosines) + 1, device=cosines.device)).clamp(0.0, 1.0)


def haar_overlap(m: int, k: int) -> float:
    """Expected overlap of two independent uniformly random k-dimensional subspaces of an m-dimensional space.

    Examples:
        >>> from spectralbasis.linalg import haar_overlap
        >>> haar_overlap(m=768, k=64)
        0.08333333333333333
    """
    return k / m


def haar_overlap_std(m: int, k: int) -> float:
    """Standard deviation of that overlap, 0 where k = m.

    From the second moments of a Haar-random projection (Collins & Matsumoto, J. Math. Phys. 50, 2009); at k = 1 the
    overlap is Beta(1/2, (m − 1)/2).

    Examples:
        >>> from spectralbasis.linalg import haar_overlap_std
        >>> round(haar_overlap_std(m=768, k=64), 5)
        0.00169
    """
    return (m - k) / m * math.sqrt(2 / ((m - 1) * (m + 2))) if m > 1 else 0.0


def principal_angles(U0: Tensor, U1: Tensor) -> Tensor:
    """Angles between two subspaces, (k,), radians, ascending; accurate near 0 as well as near π/2.

    By the sine-based method of Knyazev and Argentati (SIAM J. Sci. Comput. 23, 2002), as SciPy has it.

    Args:
        U0: (m, k) with independent columns.
        U1: (m, k) with independent columns.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import principal_angles
        >>> E = torch.eye(3)
        >>> principal_angles(E[:, :2], E[:, [1, 2]])
        tensor([0.0000, 1.5708], dtype=torch.float64)
    """
    from scipy.linalg import subspace_angles

    angles = subspace_angles(U0.double().cpu().numpy(), U1.double().cpu().numpy())
    # SciPy mixes two methods, which may disagree in order by rounding.
    return torch.from_numpy(angles).sort().values


def matched_cosines(cosines: Tensor) -> Tensor:
    """`|u0_i · u1_i|` for each direction i, (k,), from the frames' cross cosines (k, k).

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import matched_cosines
        >>> matched_cosines(torch.tensor([[-0.9, 0.1], [0.1, 0.8]]))
        tensor([0.9000, 0.8000])
    """
    return cosines.diagonal().abs()


def assigned_cosines(cosines: Tensor) -> Tensor:
    """`|u0_i · u1_{a(i)}|` under the one-to-one assignment a with the largest sum, (k,).

    Near-equal singular values swap places under the smallest change; the assignment undoes that.

    Examples:
        >>> import torch
        >>> from spectralbasis.linalg import assigned_cosines
        >>> assigned_cosines(torch.tensor([[0.1, -0.9], [0.8, 0.1]]))
        tensor([0.9000, 0.8000])
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cosines.abs().cpu().numpy(), maximize=True)
    return cosines.abs()[rows, columns]
