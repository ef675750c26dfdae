"""The forms in which C of `ΔW = U C Vᵀ` multiplies. A form is a few pure functions on tensors.

A band and sparse coefficients multiply as a core; `Parametrisation` says which of its entries are trained.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor


class CoefficientForm(Protocol):
    """How one form holds C for k directions and how it multiplies. `Z` and `G` are (..., tokens, k)."""

    def shape(self, k: int) -> tuple[int, ...]:
        """Shape of C."""

    def multiply(self, Z: Tensor, C: Tensor) -> Tensor:
        """`Z Cᵀ`; leading dimensions of C are batch dimensions."""

    def multiply_transposed(self, G: Tensor, C: Tensor) -> Tensor:
        """`G C`, the adjoint of `multiply`."""

    def gradient(self, G: Tensor, Z: Tensor, dtype: torch.dtype) -> Tensor:
        """Gradient with respect to C, where G is the one with respect to `Z Cᵀ`."""

    def left_factor(self, U: Tensor, C: Tensor) -> Tensor:
        """`U C`, so that `ΔW = left_factor(U, C) @ Vᵀ`."""


class Diagonal:
    """k numbers: each direction is scaled on its own, and no k×k matrix is ever formed."""

    def shape(self, k: int) -> tuple[int, ...]:
        return (k,)

    def multiply(self, Z: Tensor, C: Tensor) -> Tensor:
        return Z * C.unsqueeze(-2)

    def multiply_transposed(self, G: Tensor, C: Tensor) -> Tensor:
        return G * C.unsqueeze(-2)

    def gradient(self, G: Tensor, Z: Tensor, dtype: torch.dtype) -> Tensor:
        return (G * Z).sum(-2, dtype=dtype)

    def left_factor(self, U: Tensor, C: Tensor) -> Tensor:
        return U * C


class Core:
    """k×k numbers: every left direction is coupled with every right one."""

    def shape(self, k: int) -> tuple[int, ...]:
        return (k, k)

    def multiply(self, Z: Tensor, C: Tensor) -> Tensor:
        return Z @ C.mT

    def multiply_transposed(self, G: Tensor, C: Tensor) -> Tensor:
        return G @ C

    def gradient(self, G: Tensor, Z: Tensor, dtype: torch.dtype) -> Tensor:
        return (G.mT @ Z).to(dtype)

    def left_factor(self, U: Tensor, C: Tensor) -> Tensor:
        return U @ C


FORMS: Mapping[str, CoefficientForm] = MappingProxyType({"diagonal": Diagonal(), "core": Core()})
"""Form by name."""
