"""C of `ΔW = U C Vᵀ`: its forms, and the numbers that an adapter trains.

A *form* is how C multiplies. A *parametrisation* makes C from the numbers that an adapter trains and stores, by the
kind of its coefficients (`kinds.py`): most are some entries of a core, a rotation is a function of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from spectralbasis.errors import InputError
from spectralbasis.kinds import KINDS


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
        f"the entries {str(text)[:40]!r} are not positions in a {k}×{k} matrix; restore adapter_config.json"
    )


class Parametrisation(nn.Module):
    """Which entries of C the stored numbers are, and in which unit they count.

    Its tensors are buffers that move with the model and are never saved; those of fractions stay in the precision that
    they have.

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

    @property
    def direct(self) -> bool:
        """Whether C is the stored numbers but for their unit, which is one for each direction or one for all."""
        return self.positions is None and (self.unit is None or self.unit.ndim == 0 or self.form == "diagonal")

    def extra_repr(self) -> str:
        return f"form={self.form!r}, k={self.k}, numbers={prod(self.shape)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "Parametrisation":
        before = dict(self._buffers)
        super()._apply(fn, *args, **kwargs)
        for name, now in self._buffers.items():
            then = before[name]
            if then is not None and now is not None and then.is_floating_point():
                self._buffers[name] = then.to(
                    now.device
                )  # rounded to a 16-bit base's dtype, C would not be as in files
        return self


class Rotation(Parametrisation):
    """`C = (Σ + diag c) R − Σ`, with R block-orthogonal: k numbers c, then the angles of each block, row by row.

    A block of R is Cayley's transform `(I − A/2)⁻¹ (I + A/2)` of a skew-symmetric A, whose entries above the diagonal
    are angles in radians: to first order, R turns direction j towards i by `A_ij`. `R − I = (I − A/2)⁻¹ A` is what is
    solved for, so that C is exactly 0 where all numbers are, and small numbers lose no digits.

    Where `W = U Σ Vᵀ` in these directions, `W + U C Vᵀ = U (Σ + diag c) (V Rᵀ)ᵀ`: the singular values are `Σ + c`, and
    the right singular vectors turn within their blocks. It is what AntiPaSTO trains (arXiv 2601.07473).

    Args:
        values: Σ, k singular values.
        block_size: of R; the last block is smaller where k is no multiple.
        scales: the unit of c: k numbers, which leave angles in radians; or one number s, in which an angle then counts
            `s / max(1, √((σ_i² + σ_j²) / 2))` radians, so that it changes C by as much as c does; None is 1 for both.
    """

    values: Tensor
    rows: Tensor
    kept: Tensor
    places: Tensor

    def __init__(self, values: Sequence[float], block_size: int, scales: Sequence[float] | None = None) -> None:
        S, k = torch.tensor(values, dtype=torch.float32), len(values)
        self.block_size = b = min(block_size, k)
        positions = cast(Callable[[int, int], Tensor], KINDS["block"].positions)(k, b)
        i, j = positions // k, positions % k
        places = i * b + j % b  # in all blocks, the last one filled up
        above = i < j
        unit = None
        if scales is not None:
            length = (S[i[above]].square() + S[j[above]].square()).div(2).sqrt().clamp(min=1)
            given = torch.tensor(scales, dtype=torch.float32)
            unit = torch.cat((given.expand(k), given / length if len(given) == 1 else torch.ones_like(length)))
        super().__init__("core", k, positions, unit)
        self.shape = (k + int(above.sum()),)
        self.register_buffer("values", S, persistent=False)
        self.register_buffer("rows", i, persistent=False)
        self.register_buffer("kept", places, persistent=False)
        self.register_buffer("places", places[above], persistent=False)

    def forward(self, stored: Tensor) -> Tensor:
        """C, (..., k, k), in float32 or wider, from stored numbers, (..., *shape)."""
        numbers = stored.to(torch.promote_types(stored.dtype, torch.float32))
        numbers = numbers if self.unit is None else numbers * self.unit
        c, angles = numbers.split((self.k, self.shape[0] - self.k), -1)
        change = self.rotation(angles).flatten(-3).index_select(-1, self.kept)
        lengths = (self.values + c).index_select(-1, self.rows)
        flat = change.new_zeros(*change.shape[:-1], self.k * self.k)
        flat = flat.scatter(-1, cast(Tensor, self.positions).expand_as(change), lengths * change)
        return flat.unflatten(-1, (self.k, self.k)) + torch.diag_embed(c)

    def rotation(self, angles: Tensor) -> Tensor:
        """`R − I`, (..., blocks, b, b), from angles in radians."""
        b = self.block_size
        blocks = -(-self.k // b)
        A = angles.new_zeros(*angles.shape[:-1], blocks * b * b)
        A = A.scatter(-1, self.places.expand_as(angles), angles).unflatten(-1, (blocks, b, b))
        A = A - A.mT
        # I − A/2 has the eigenvalues 1 ± iα, so it is never singular, and nothing needs to wait for a check of that.
        return torch.linalg.solve_ex(torch.eye(b, dtype=A.dtype, device=A.device) - A / 2, A).result

    def inverse(self, C: Tensor) -> Tensor:
        """Refused: not every C is one of these.

        Raises:
            InputError: always.
        """
        raise InputError("the C of a rotation cannot be turned back into its numbers; store it as a core")


def parametrisation(
    coefficients: str,
    k: int,
    *,
    size: int = 1,
    positions: Tensor | None = None,
    scales: Sequence[float] | None = None,
    values: Sequence[float] | None = None,
) -> Parametrisation:
    """The parametrisation of one matrix.

    Args:
        coefficients: name of a kind, one of `KINDS`.
        k: number of directions.
        size: value of the kind's option, such as the bandwidth of a band.
        positions: of sparse coefficients, see `Parametrisation`.
        scales: σ_i of the k directions, so that `C_ij = c_ij √(σ_i σ_j)`, or one number, `C = c σ`; None is `C = c`.
        values: of a rotation, the k singular values of the directions.
    """
    if values is not None:
        return Rotation(values, size, scales)
    kind = KINDS[coefficients]
    positions = kind.positions(k, size) if kind.positions else positions
    if scales is None:
        return Parametrisation(kind.form, k, positions)
    unit = torch.tensor(scales, dtype=torch.float32)
    if unit.numel() == 1:
        unit = unit.squeeze(0)
    elif kind.form == "core":
        unit = torch.outer(unit.sqrt(), unit.sqrt())
        unit = unit if positions is None else unit.flatten()[positions]
    return Parametrisation(kind.form, k, positions, unit)


class Coefficients(nn.Module):
    """The numbers that one adapter trains in one layer.

    They are a module's `weight`, as a LoRA factor is, so that their name goes on after the adapter's name
    (`….spectral_coefficients.default.weight`): other libraries find and copy an adapter by `.default.`.

    Args:
        shape: of the numbers, which are zero.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def extra_repr(self) -> str:
        return "×".join(map(str, self.weight.shape))
