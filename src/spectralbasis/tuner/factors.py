"""The frozen U and V of `ΔW = U C Vᵀ`: *factors* are U and V of one matrix, and `directions_of` finds them."""

from collections.abc import Callable, Collection
from math import gcd, prod
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
from spectralbasis.tuner.forms import FORMS

SCALINGS = ("absolute", "relative", "normalized")
DEFAULT_SCALING = "normalized"
"""The unit in which one learning rate serves models, tasks and modes; the documentation has the experiment."""
BASES = ("pretrained", "minor", "random")
"""Bases that are made from the base weight itself; anything else names a basis file."""
PROBES = 4
Directions = Callable[[str, Tensor, int, str], tuple[Tensor, Tensor]]
"""(name, W (m, n), k, hash of the base's weight) → U (m, k), V (n, k), float32 or wider."""


class Snapshot:
    """What a frozen weight is now, to tell later whether it is still that.

    Its address and its version are compared, and on a CPU also entries of each row and column: a write through `.data`
    or NumPy, as a merge of another adapter makes it, changes no version. Only one that misses all of these entries is
    not found.

    Args:
        weight: contiguous, and no inference tensor, which has no version.
    """

    __slots__ = ("entries", "pointer", "sample", "shape", "version", "weight")

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.pointer = weight.data_ptr()
        self.version = weight._version
        self.shape = weight.shape
        rows, columns = weight.numel() // max(weight.shape[-1], 1), weight.shape[-1]
        step = sampling_step(rows, columns)
        # A view, which keeps the memory: no other tensor can get its address.
        self.entries = weight.detach().as_strided((-(-weight.numel() // step),), (step,))
        self.sample = self.entries.clone() if weight.device.type == "cpu" else None

    def holds(self, weight: Tensor) -> bool:
        """Whether this is the same weight, unchanged."""
        return (
            weight is self.weight
            and weight._version == self.version
            and weight.data_ptr() == self.pointer
            and weight.shape == self.shape
            and weight.is_contiguous()
            and (self.sample is None or torch.equal(self.entries, self.sample))
        )


def sampling_step(rows: int, columns: int) -> int:
    """The largest step through the entries of a contiguous matrix that meets each row and each column."""
    return next((step for step in range(min(rows, columns), 1, -1) if gcd(step, columns) == 1), 1)


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
        self._singular: dict[tuple[int, torch.dtype], tuple[Snapshot, Tensor | None]] = {}
        self._inverse: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
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

    def singular_values(
        self, W: Tensor, k: int, *, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor | None:
        """σ (k,), if the first k columns of U and V are singular vectors of `W` that serve as such, else None.

        They are found once for a weight; see `values_of_singular_vectors`.

        Args:
            W: a weight, (m, n). None too for one that cannot be told from a changed one later, see `Snapshot`.
            k: number of directions.
            bias: of the layer, as it is when they are found.
            dtype: in which the layer multiplies; None is that of W.
        """
        if torch.compiler.is_compiling() or W.is_meta or W.is_inference() or not W.is_contiguous():
            return None
        key = k, dtype or W.dtype
        found = self._singular.get(key)
        if found is None or not found[0].holds(W):
            with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode could not be trained with
                S = values_of_singular_vectors(W.detach(), *self.first(k), bias=bias, dtype=dtype)
                found = self._singular[key] = Snapshot(W), S
        return found[1]

    def inverse_values(self, W: Tensor, k: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """1/σ (k,) in this dtype; see `singular_values`."""
        S = self.singular_values(W, k, bias=bias, dtype=dtype)
        if S is None:
            return None
        found = self._inverse.get((k, dtype))
        if found is None or found[0] is not S:
            with torch.inference_mode(False), torch.no_grad():
                found = self._inverse[k, dtype] = S, S.reciprocal().to(dtype)
        return found[1]

    def forget(self) -> None:
        """Find singular values anew when they are next asked for."""
        self._singular.clear()
        self._inverse.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "Factors":
        self.forget()
        return super()._apply(fn, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_singular": {}, "_inverse": {}}

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

    def pretrained(name: str, W: Tensor, k: int, base_hash: str) -> tuple[Tensor, Tensor]:
        triplets = compute_triplets(W, k, tolerance=tolerance, base_hash=base_hash)
        return triplets.U, triplets.Vh.T

    def minor(name: str, W: Tensor, k: int, base_hash: str) -> tuple[Tensor, Tensor]:
        triplets = compute_triplets(W, min(W.shape), tolerance=tolerance, base_hash=base_hash)
        return triplets.U.flip(1)[:, :k], triplets.Vh.flip(0)[:k].T

    def random(name: str, W: Tensor, k: int, base_hash: str) -> tuple[Tensor, Tensor]:
        content = int(base_hash, 16)
        left, right = (np.random.Generator(np.random.PCG64([seed, content, side])) for side in (0, 1))
        return _haar(left, W.shape[0], k), _haar(right, W.shape[1], k)

    found = {"pretrained": pretrained, "minor": minor, "random": random}
    return found[basis] if isinstance(basis, str) and basis in found else _StoredDirections(basis)


def singular_values_in(basis: str, name: str, W: Tensor, U: Tensor, V: Tensor, base_hash: str) -> Tensor | None:
    """Σ (k,), where the directions that a basis has for a matrix are its singular vectors; else None.

    Args:
        basis: see `directions_of`; of a file, the values that it holds are taken, as W may be a quantized copy.
        name: how the basis calls the matrix.
        W: (m, n).
        U: (m, k), the directions that were found.
        V: (n, k).
        base_hash: of the weight.
    """
    if basis in ("pretrained", "minor"):
        dtype = torch.promote_types(W.dtype, torch.float32)
        U, V = (factor.to(W.device, dtype) for factor in (U, V))
        return (U * (W.to(dtype) @ V)).sum(0).abs()
    if basis in BASES:
        return None
    stored = SpectralBasis.load(basis)
    name = name if name in stored else stored.name_of(base_hash) or name
    triplets: Triplets = stored[name]
    return triplets.S[: U.shape[1]] if stored.kind == "pretrained" and triplets.base_hash == base_hash else None


def _haar(draws: np.random.Generator, size: int, k: int) -> Tensor:
    """The first k columns of a Haar-random orthogonal matrix; the same ones whatever k is."""
    gaussian = torch.from_numpy(draws.standard_normal((k, size))).T
    Q, R = torch.linalg.qr(gaussian)
    return (Q * R.diagonal().sign()).float()


class _StoredDirections:
    """Directions from a basis, or from the file of one; it warns once where the basis is of other weights."""

    def __init__(self, basis: str | SpectralBasis) -> None:
        self.file = str(basis)
        self.basis = SpectralBasis.load(basis) if isinstance(basis, str) else basis
        self.warned = False

    def __call__(self, name: str, W: Tensor, k: int, base_hash: str) -> tuple[Tensor, Tensor]:
        name = name if name in self.basis else self.basis.name_of(base_hash) or name
        if name not in self.basis:
            raise InputError(
                f"{self.file} has no directions for {name}; leave it out with exclude_modules, "
                "or use basis='pretrained'"
            )
        triplets: Triplets = self.basis[name]
        if triplets.shape != tuple(W.shape):
            raise InputError(
                f"{name} is {tuple(W.shape)} but {triplets.shape} in {self.file}: the file is a basis of another model"
            )
        if triplets.k < k:
            raise InputError(
                f"{self.file} has {triplets.k} directions for {name}, fewer than k={k}; pass leading<={triplets.k}, "
                f"or compute the basis again with --leading {k}"
            )
        if triplets.base_hash != base_hash and not self.warned:
            self.warned = True
            warn(
                f"{self.file} was computed from other weights than those of this model ({name} differs); it is used "
                "anyway",
                stacklevel=2,
            )
        return triplets.U[:, :k], triplets.Vh[:k].T
