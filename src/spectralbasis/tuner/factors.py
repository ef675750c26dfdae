"""The frozen factors U and V of one matrix: where they come from and how two machines know that theirs are the same."""

from collections.abc import Callable, Collection
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spectralbasis.basis import SpectralBasis
from spectralbasis.checkpoints.names import Conversions, same_names
from spectralbasis.errors import InputError
from spectralbasis.linalg import values_of_singular_vectors
from spectralbasis.printable import warn
from spectralbasis.triplets import Triplets, compute_triplets
from spectralbasis.tuner.parametrisation import FORMS

BASES = ("pretrained", "minor", "random")
"""Bases that are made from the base weight itself; anything else names a basis file."""
PROBES = 4
Directions = Callable[[str, Tensor, int, str], tuple[Tensor, Tensor]]
"""(name, W (m, n), k, hash of the base's weight) → U (m, k), V (n, k), float32 or wider."""


class Factors(nn.Module):
    """U (m, k) and V (n, k), columns orthonormal: one buffer that moves with the model and is never saved.

    Adapters of one layer on one basis share one object; an adapter of fewer directions uses the first columns.

    Attributes:
        directions: U above V, (m + n, k).
        outputs: m.
        source: what the basis is; equal ones are interchangeable.
    """

    directions: Tensor

    def __init__(self, U: Tensor, V: Tensor, source: str) -> None:
        super().__init__()
        # A copy, so that memory layout and with it every rounding is the same wherever the directions came from.
        self.register_buffer("directions", torch.cat((U, V)), persistent=False)
        self.outputs = len(U)
        self.source = source
        self._inverse: tuple[tuple[Any, ...], Tensor | None] | None = None
        draws = np.random.Generator(np.random.Philox(1))
        self._left_probe = _uniform(draws, PROBES, U.shape[0]) @ U.double().cpu()
        self._right_probe = _uniform(draws, PROBES, V.shape[0]) @ V.double().cpu()

    @property
    def k(self) -> int:
        """Number of directions."""
        return self.directions.shape[1]

    def first(self, k: int) -> tuple[Tensor, Tensor]:
        """The first k columns of U and V, as views."""
        return self.directions[: self.outputs, :k], self.directions[self.outputs :, :k]

    def stacked(self, k: int) -> Tensor:
        """The first k columns of U above those of V, (m + n, k), as a view: what is cast at once."""
        return self.directions[:, :k]

    def probe(self, form: str, k: int) -> list[float]:
        """`PROBES` numbers `rᵀ U R Vᵀ s` of order 1, fixed pseudo-random r, R, s: they move when directions change.

        R has the shape of `form`, so they depend on signs and rotations of the directions just as the trained ΔW does.
        One number would miss a flipped sign among 64 directions once in 20 times, four do once in 10^5. U and V are
        meant as they were found, before they were rounded to the dtype of the base.
        """
        shape = FORMS[form].shape(k)
        R = _uniform(np.random.Generator(np.random.Philox(0)), *shape) / prod(shape) ** 0.5
        left = FORMS[form].left_factor(self._left_probe[:, :k], R)
        return [round(value, 6) for value in (left * self._right_probe[:, :k]).sum(1).tolist()]

    def inverse_values(self, W: Tensor, k: int, dtype: torch.dtype) -> Tensor | None:
        """1/σ (k,), if the first k columns of U and V are singular vectors of `W`, else None; found once for a weight.

        Args:
            W: a weight, (m, n).
            k: number of directions.
            dtype: of the result.
        """
        if torch.compiler.is_compiling():
            return None
        version = None if W.is_inference() else W._version
        state = (W.data_ptr(), version, W.dtype, W.device, k, dtype)
        if self._inverse is None or self._inverse[0] != state:
            S = values_of_singular_vectors(W.detach(), *self.first(k))
            self._inverse = state, None if S is None else S.reciprocal().to(dtype)
        return self._inverse[1]

    def extra_repr(self) -> str:
        return f"k={self.k}, source={self.source!r}"


def _uniform(draws: np.random.Generator, *shape: int) -> Tensor:
    """Uniform entries of unit variance, float64."""
    return torch.from_numpy(3**0.5 * (2 * draws.random(shape) - 1))


def source_of(basis: str, seed: int) -> str:
    """What tells a basis apart from others: its name, with the seed where that matters, or its resolved path."""
    if basis == "random":
        return f"random, seed {seed}"
    return basis if basis in BASES else str(Path(basis).resolve())


def names_in_basis(
    basis: str | SpectralBasis, names: Collection[str], conversions: Callable[[], Conversions | None]
) -> dict[str, str]:
    """Matrix → how a basis file calls it, where that is another name; empty for bases that are no files (yet)."""
    if isinstance(basis, str):
        if basis in BASES or not Path(basis).is_file():
            return {}
        basis = SpectralBasis.load(basis)
    table = conversions()
    found = same_names(names, list(basis), lambda: (table, table))
    return {name: other for name, other in found.items() if other != name}


def directions_of(basis: str | SpectralBasis, *, tolerance: float, seed: int) -> Directions:
    """How the directions of every matrix are found.

    Args:
        basis: "pretrained" (leading singular vectors), "minor" (trailing ones, the smallest first), "random" (Haar),
            the path of a basis file, or a basis.
        tolerance: see `compute_triplets`.
        seed: of the random directions.

    Raises:
        InputError: the basis file cannot be read.
    """
    if basis == "pretrained":
        return partial(_pretrained, tolerance)
    if basis == "minor":
        return partial(_minor, tolerance)
    if basis == "random":
        return partial(_random, seed)
    return _Stored(basis)


def _pretrained(tolerance: float, name: str, W: Tensor, k: int, base_hash: str) -> tuple[Tensor, Tensor]:
    triplets = compute_triplets(W, k, tolerance=tolerance, base_hash=base_hash)
    return triplets.U, triplets.Vh.T


def _minor(tolerance: float, name: str, W: Tensor, k: int, base_hash: str) -> tuple[Tensor, Tensor]:
    triplets = compute_triplets(W, min(W.shape), tolerance=tolerance, base_hash=base_hash)
    return triplets.U.flip(1)[:, :k], triplets.Vh.flip(0)[:k].T


def _random(seed: int, name: str, W: Tensor, k: int, base_hash: str) -> tuple[Tensor, Tensor]:
    content = int(base_hash, 16)
    left, right = (np.random.Generator(np.random.PCG64([seed, content, side])) for side in (0, 1))
    return _haar(left, W.shape[0], k), _haar(right, W.shape[1], k)


def _haar(draws: np.random.Generator, size: int, k: int) -> Tensor:
    """The first k columns of a Haar-random orthogonal matrix; the same ones whatever k is."""
    gaussian = torch.from_numpy(draws.standard_normal((k, size))).T
    Q, R = torch.linalg.qr(gaussian)
    return (Q * R.diagonal().sign()).float()


class _Stored:
    """Directions from a basis, or from the file of one."""

    def __init__(self, basis: str | SpectralBasis) -> None:
        self.file = str(basis)
        self.basis = SpectralBasis.load(basis) if isinstance(basis, str) else basis
        self.warned = False

    def __call__(self, name: str, W: Tensor, k: int, base_hash: str) -> tuple[Tensor, Tensor]:
        triplets = self._find(name if name in self.basis else self.basis.name_of(base_hash) or name, W, k)
        if triplets.base_hash != base_hash and not self.warned:
            self.warned = True
            warn(
                f"{self.file} was computed from other weights than those of this model ({name} differs); "
                "it is used as it is",
                stacklevel=2,
            )
        return triplets.U[:, :k], triplets.Vh[:k].T

    def _find(self, name: str, W: Tensor, k: int) -> Triplets:
        if name not in self.basis:
            raise InputError(
                f"{self.file} has no directions for {name}; leave it out with exclude_modules, "
                "or use basis='pretrained'"
            )
        triplets = self.basis[name]
        if triplets.shape != tuple(W.shape):
            raise InputError(
                f"{name} is {tuple(W.shape)} but {triplets.shape} in {self.file}: a basis of another model"
            )
        if triplets.k < k:
            raise InputError(
                f"{self.file} has {triplets.k} directions for {name}, fewer than k={k}; pass leading<={triplets.k}, "
                f"or compute the basis again with --leading {k}"
            )
        return triplets
