"""From the numbers that an adapter trains and stores to the coefficients C of one matrix: a linear map without memory.

Everything that needs C asks a `Parametrisation` for it; `SpectralConfig.parametrisation` makes the one of a matrix.

The forms in which C of `ΔW = U C Vᵀ` multiplies. A form is a few pure functions on tensors.

A band and sparse coefficients multiply as a core; `Parametrisation` says which of its entries are trained.

Entries of sparse coefficients as a config holds them: one string for each matrix.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spectralbasis.errors import InputError


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


def pack_positions(positions: Tensor) -> str:
    """Row-major positions `i·k + j`, ascending, as gaps in decimal: the first position, then each less the one before.

    Gaps are short, so that an entry takes 2 to 4 bytes, and JSON keeps the string on one line.
    """
    return " ".join(map(str, torch.diff(positions, prepend=positions.new_zeros(1)).tolist()))


def unpack_positions(text: str, k: int) -> Tensor:
    """Row-major positions in a k×k matrix, ascending, (numbers,) int64.

    Raises:
        InputError: the text is damaged, or names a position outside of the matrix.
    """
    gaps = text.split() if isinstance(text, str) else []
    if gaps and all(gap.isascii() and gap.isdigit() and len(gap) <= 12 for gap in gaps):
        positions = torch.tensor([int(gap) for gap in gaps]).cumsum(0)
        if bool((positions.diff() > 0).all()) and int(positions[-1]) < k * k:
            return positions
    raise InputError(
        f"the entries {str(text)[:40]!r} are no gaps between positions in a {k}×{k} matrix; restore adapter_config.json"
    )


COEFFICIENTS = ("diagonal", "core", "band", "sparse")
SCALINGS = ("absolute", "relative", "normalized")
DEFAULT_SCALING = "normalized"
"""The unit in which one learning rate serves models, tasks and modes; the documentation has the experiment."""


class Parametrisation(nn.Module):
    """Which entries of C the stored numbers are, and in which unit they count.

    Its tensors are buffers that move with the model and are never saved; the unit stays in the precision that it has.

    Args:
        form: the form of C, a key of `FORMS`.
        k: number of directions.
        positions: row-major positions `i·k + j` in a core, ascending, (numbers,); None where all of C is stored.
        unit: what each stored number is multiplied by, broadcast against them; None is 1.
    """

    positions: Tensor | None
    unit: Tensor | None

    def __init__(self, form: str, k: int, positions: Tensor | None = None, unit: Tensor | None = None) -> None:
        super().__init__()
        self.form = form
        self.k = k
        self.shape = FORMS[form].shape(k) if positions is None else (positions.numel(),)
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("unit", unit, persistent=False)

    def forward(self, stored: Tensor) -> Tensor:
        """C, (..., k) or (..., k, k), from stored numbers, (..., *shape)."""
        values = stored if self.unit is None else stored * self.unit
        if self.positions is None:
            return values
        flat = values.new_zeros(*values.shape[:-1], self.k * self.k)
        # Under autocast, index_copy refuses numbers in a 16-bit dtype other than that of autocast; scatter does not.
        return flat.scatter(-1, self.positions.expand_as(values), values).unflatten(-1, (self.k, self.k))

    def inverse(self, C: Tensor) -> Tensor:
        """The stored numbers of C, entries that are not stored left out; 0 where the unit is."""
        values = C if self.positions is None else C.flatten(-2).index_select(-1, self.positions)
        return values if self.unit is None else torch.where(self.unit == 0, 0.0, values / self.unit)

    def extra_repr(self) -> str:
        return f"form={self.form!r}, k={self.k}, numbers={prod(self.shape)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "Parametrisation":
        unit = self.unit
        super()._apply(fn, *args, **kwargs)
        if unit is not None and self.unit is not None:
            self.unit = unit.to(self.unit.device)  # rounded to a 16-bit base's dtype, C would not be what files say
        return self


def parametrisation(
    coefficients: str,
    k: int,
    *,
    bandwidth: int = 1,
    positions: Tensor | None = None,
    scales: Sequence[float] | None = None,
) -> Parametrisation:
    """The parametrisation of one matrix.

    Args:
        coefficients: one of `COEFFICIENTS`.
        k: number of directions.
        bandwidth: of a band, the largest |i − j| of a trained entry.
        positions: of sparse coefficients, see `Parametrisation`.
        scales: σ_i of the k directions, so that `C_ij = c_ij √(σ_i σ_j)`, or one number, `C = c σ`; None is `C = c`.
    """
    if coefficients == "band":
        positions = band_positions(k, bandwidth)
    form = coefficients if coefficients in FORMS else "core"
    return Parametrisation(form, k, positions, None if scales is None else _unit(form, positions, scales))


def band_positions(k: int, bandwidth: int) -> Tensor:
    """Row-major positions of the entries of a k×k matrix with |i − j| ≤ bandwidth, ascending."""
    b = min(bandwidth, k - 1)
    i, j = torch.arange(k)[:, None], torch.arange(k)[:, None] + torch.arange(-b, b + 1)
    return (i * k + j)[(j >= 0) & (j < k)]


def numbers(coefficients: str, k: int, bandwidth: int = 1) -> int:
    """How many numbers k directions take; of sparse coefficients, how many there are to choose from."""
    if coefficients == "band":
        b = min(bandwidth, k - 1)
        return k * (2 * b + 1) - b * (b + 1)
    return k if coefficients == "diagonal" else k * k


def _unit(form: str, positions: Tensor | None, scales: Sequence[float]) -> Tensor:
    sigma = torch.tensor(scales, dtype=torch.float32)
    if sigma.numel() == 1:
        return sigma.squeeze(0)
    if form == "diagonal":
        return sigma
    unit = torch.outer(sigma.sqrt(), sigma.sqrt())
    return unit if positions is None else unit.flatten()[positions]
