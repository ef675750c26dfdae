"""Matrices with known spectra, for tests of numerics and of comparisons."""

import torch
from torch import Tensor


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    """(rows, columns) with orthonormal columns, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def with_spectrum(m: int, n: int, S: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix (m, n) in float64 with the given singular values, and its factors U and V (columns)."""
    U, V = orthonormal(m, len(S), seed), orthonormal(n, len(S), seed + 1)
    return (U * S.double()) @ V.T, U, V


def power_law(count: int, exponent: float = 0.7) -> Tensor:
    """Singular values that fall as i^-exponent, (count,), float64."""
    return torch.arange(1, count + 1, dtype=torch.float64) ** -exponent
