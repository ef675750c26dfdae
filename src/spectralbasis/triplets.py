"""The leading triplets of one matrix: computed once per machine and cached on disk by the content of the matrix."""

import json
import math
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path, cache_folder, checksum
from spectralbasis.linalg import (
    LeadingSVD,
    largest_value_outside,
    leading_svd,
    leading_svd_and_values,
    subspace_error_bound,
    triplet_residuals,
)
from spectralbasis.linalg.row_blocks import MatrixLike, row_slices
from spectralbasis.linalg.svd import spectrum, with_leading
from spectralbasis.printable import warn
from spectralbasis.records import checked, parse_json

DEFAULT_TOLERANCE = 1e-4
_CACHE_VERSION = "2"
_NAME = re.compile(r"k([1-9][0-9]{0,8})\.safetensors", re.ASCII)
_HEADER_BYTES = 1 << 16
_ROUNDING = 1e-6
"""Of σ_1, what rounding triplets to float32 may change of their residuals; several times more than it does."""
_LEFT_OUT = 0.02
"""Share by which a value outside may exceed σ_{k+1}, which is known from below only, before it counts as left out."""
_HASH_BLOCK = 1 << 22
_NOT_ORTHONORMAL = 1e-4
"""By how much directions may miss being orthonormal: rounding to float32 leaves a hundredth of it."""
_DISORDER = 1e-3
"""Of σ_1, by how much a value in a file may exceed the one before it."""


@dataclass(frozen=True)
class Triplets:
    """k leading singular triplets of one (m, n) matrix, with their certificate and the hash of the matrix.

    The signs follow a rule, so that off-diagonal coefficients mean the same on every machine: the entry of largest
    modulus of each left vector is positive.

    Attributes:
        U: (m, k) float32, orthonormal columns.
        S: (k,) float32, descending; `u_iᵀ W v_i` in any order where the directions are no singular ones.
        Vh: (k, n) float32, orthonormal rows.
        residuals: (k,) float32, see `LeadingSVD.residuals`.
        next_singular_value: σ_{k+1}, 0 where there is none; infinite where the directions are no singular ones.
        subspace_error_bound: largest sine to the true leading subspaces, in [0, 1].
        solver: what produced them.
        base_hash: `matrix_hash` of the matrix.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    next_singular_value: float
    subspace_error_bound: float
    solver: str
    base_hash: str

    @property
    def k(self) -> int:
        """Number of triplets."""
        return self.S.numel()

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix."""
        return self.U.shape[0], self.Vh.shape[1]

    def to(self, device: torch.device | str) -> "Triplets":
        """The same triplets with their tensors on a device."""
        U, S, Vh, residuals = (tensor.to(device) for tensor in (self.U, self.S, self.Vh, self.residuals))
        return replace(self, U=U, S=S, Vh=Vh, residuals=residuals)

    def leading(self, k: int) -> "Triplets":
        """The first k triplets, with the certificate that their own gap allows.

        Raises:
            ValueError: k is not in 1..self.k.
        """
        if not 1 <= k <= self.k:
            raise ValueError(
                f"k={k} is outside 1..{self.k}, the number of triplets here; compute a basis with leading={k}"
            )
        if k == self.k:
            return self
        next_value = max(float(self.S[k:].max()), self.next_singular_value)
        return replace(
            self,
            U=self.U[:, :k],
            S=self.S[:k],
            Vh=self.Vh[:k],
            residuals=self.residuals[:k],
            next_singular_value=next_value,
            subspace_error_bound=subspace_error_bound(self.S[:k], self.residuals[:k], next_value, self.shape),
        )


def check_tolerance(tolerance: float) -> None:
    """Raise InputError if this is not the sine of an angle that a solver can reach."""
    if not 0 < tolerance < 1:
        raise InputError(
            f"tolerance must be the sine of an angle, more than 0 and less than 1, got {tolerance!r}; pass a number "
            "such as 1e-4"
        )


def malformed(triplets: Triplets) -> str | None:
    """Why these cannot be triplets of any matrix; None where they can.

    Looks at types, shapes, finite values, descending values (where the directions are singular ones) and orthonormal
    directions. Four random combinations of the directions tell whether those are orthonormal, at the cost of one
    product with them.
    """
    tensors = {name: tensor.detach() for name, tensor in triplet_tensors(triplets).items()}
    U, S, Vh, residuals = tensors.values()
    k = S.numel()
    if S.ndim != 1 or k == 0 or U.ndim != 2 or Vh.ndim != 2 or residuals.shape != (k,):
        return f"S has the shape {tuple(S.shape)}, expected (k,), and U, Vh and residuals to fit it"
    if U.shape[1] != k or Vh.shape[0] != k or min(U.shape[0], Vh.shape[1]) < k:
        return f"U is {tuple(U.shape)} and Vh {tuple(Vh.shape)}, expected (m, {k}) and ({k}, n)"
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}, expected float32"
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} has a NaN or infinite entry"
    ordered = math.isfinite(triplets.next_singular_value)
    if ordered and (bool((S < 0).any()) or bool((S.diff() > _DISORDER * S[0]).any())):
        return "S is not descending from a value of 0 or more"
    if bool((residuals < 0).any()):
        return "residuals has a negative entry"
    mixed = torch.randn(k, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(S.device)
    for field, directions in (("columns of U", U.double()), ("rows of Vh", Vh.T.double())):
        if not float((directions.T @ (directions @ mixed) - mixed).abs().max()) <= _NOT_ORTHONORMAL:
            return f"the {field} are not orthonormal"
    return None


def disproof(W: MatrixLike, triplets: Triplets, values: Tensor | None = None) -> str | None:
    """Why these are not the leading singular triplets of `W` to the accuracy that they claim; None where they are.

    Costs two products of `W` with the k directions and about twenty with eight vectors, much less than a decomposition.
    A direction that was left out shows when its value exceeds σ_{k+1} by more than a few per cent.

    Args:
        W: (m, n), any floating dtype.
        triplets: leading singular triplets by their own account, which are not `malformed`.
        values: all singular values of `W`, descending, where they are known.
    """
    if triplets.shape != tuple(W.shape):
        return f"they are of a matrix {triplets.shape}, expected {tuple(W.shape)}"
    U, S, Vh = (tensor.to(W.device, torch.float64) for tensor in (triplets.U, triplets.S, triplets.Vh))
    if not bool((U.amax(0) >= (1 - 1e-5) * U.abs().amax(0)).all()):
        return "the sign of a left vector does not follow the rule"
    rounding, following = _ROUNDING * float(S[0]), triplets.next_singular_value
    bound = triplets.subspace_error_bound
    if bool((S[1:] > S[:-1]).any()) or float(S[-1]) < 0 or not -rounding <= following <= float(S[-1]) + rounding:
        return "their values are not descending"
    residuals, claimed = triplet_residuals(W, U, S, Vh), triplets.residuals.to(W.device, torch.float64)
    allowed = 0.0 if triplets.solver.startswith("dense") else bound * float(S[-1])
    if not 0 <= bound <= 1 or bool((residuals > claimed + rounding).any()):
        return "their residuals are larger than they claim"
    if float(claimed.norm()) > allowed + rounding * math.sqrt(triplets.k):
        return "their residuals are larger than their bound allows"
    if triplets.k == min(W.shape):
        return None
    outside = largest_value_outside(W, Vh) if values is None else float(values[triplets.k])
    if outside > (1 + _LEFT_OUT) * following + float(residuals.norm()) + rounding:
        return "a direction with a larger value than the next one is left out"
    return None


def matrix_hash(W: MatrixLike) -> str:
    """xxh3-128 of the shape and the values as float32, as 32 hexadecimal digits.

    A bf16 checkpoint and the same one upcast to float32 have one hash; a rounded copy has another.
    """
    digest = xxhash.xxh3_128(repr(tuple(W.shape)).encode())
    if isinstance(W, Tensor):
        blocks: Iterable[Tensor] = W.detach().reshape(-1).split(_HASH_BLOCK)
    else:
        blocks = (W[rows].reshape(-1) for rows in row_slices(W))
    for block in blocks:
        digest.update(block.to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def compute_triplets(
    W: Tensor,
    k: int,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    cache: bool = True,
    base_hash: str | None = None,
) -> Triplets:
    """The k leading triplets of `W`, from the disk cache where this machine has met the matrix before.

    Args:
        W: the matrix, (m, n), any floating dtype.
        k: number of triplets, 1 ≤ k ≤ min(m, n).
        tolerance: see `linalg.leading_svd`.
        cache: read and fill the cache (`cache_folder`).
        base_hash: `matrix_hash(W)`, where it is known.

    Raises:
        ValueError: `W` is not a finite matrix, or k is out of range.
    """
    base_hash = base_hash or matrix_hash(W)
    known = _from_cache(W, base_hash, k, tolerance) if cache else None
    if known is not None:
        return known
    triplets = _triplets(leading_svd(W, k, tolerance=tolerance), base_hash)
    if cache:
        _to_cache(triplets)
    return triplets


def compute_triplets_and_values(
    W: MatrixLike, k: int, *, tolerance: float = DEFAULT_TOLERANCE, base_hash: str
) -> tuple[Triplets, Tensor]:
    """`compute_triplets` with the disk cache, and all singular values of `W`, from one decomposition where one is due.

    Args:
        W: the matrix, (m, n), any floating dtype.
        k: number of triplets, 1 ≤ k ≤ min(m, n).
        tolerance: see `linalg.leading_svd`.
        base_hash: `matrix_hash(W)`.

    Returns:
        The triplets, and the singular values (min(m, n),) in float64, descending.

    Raises:
        ValueError: `W` is not a finite matrix, or k is out of range.
    """
    if _candidates(base_hash, k):
        values = spectrum(W)
        known = _from_cache(W, base_hash, k, tolerance, values)
        if known is not None:
            return known, with_leading(values, known.S)
    svd, values = leading_svd_and_values(W, k, tolerance=tolerance)
    triplets = _triplets(svd, base_hash)
    _to_cache(triplets)
    return triplets, with_leading(values, triplets.S)


def fix_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each pair (u, v) so that the entry of largest modulus of u is positive."""
    largest = U.gather(0, U.abs().argmax(0, keepdim=True)).squeeze(0)
    signs = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return U * signs, Vh * signs[:, None]


def _triplets(svd: LeadingSVD, base_hash: str) -> Triplets:
    U, Vh = fix_signs(svd.U, svd.Vh)
    return Triplets(
        U=U.float().cpu().contiguous(),
        S=svd.S.float().cpu(),
        Vh=Vh.float().cpu().contiguous(),
        residuals=svd.residuals.float().cpu(),
        next_singular_value=svd.next_singular_value,
        subspace_error_bound=svd.subspace_error_bound,
        solver=svd.solver,
        base_hash=base_hash,
    )


def triplet_tensors(triplets: Triplets) -> dict[str, Tensor]:
    """The tensors of `triplets` by field, as they are stored."""
    return {field: getattr(triplets, field).contiguous() for field in ("U", "S", "Vh", "residuals")}


def triplet_facts(triplets: Triplets) -> dict[str, float | str]:
    """The numbers and strings of `triplets` by field, as they are stored."""
    return {
        field: getattr(triplets, field)
        for field in ("next_singular_value", "subspace_error_bound", "solver", "base_hash")
    }


class _Facts(TypedDict):
    """The numbers and strings of cached triplets, see `Triplets`."""

    version: Literal["2"]
    next_singular_value: float
    subspace_error_bound: float
    solver: str
    base_hash: str


def _cache_files(base_hash: str) -> Path:
    return cache_folder() / "triplets" / base_hash[:2] / base_hash


def _candidates(base_hash: str, k: int) -> dict[Path, int]:
    """Cached files of at least k triplets of a matrix → how many they say they hold, the smallest first."""
    try:
        names = {path: _NAME.fullmatch(path.name) for path in _cache_files(base_hash).glob("k*.safetensors")}
    except OSError:  # a name that is too long, a folder that may not be read
        return {}
    held = {path: int(found[1]) for path, found in names.items() if found is not None}
    return {path: count for path, count in sorted(held.items(), key=lambda item: item[1]) if count >= k}


def _from_cache(
    W: MatrixLike, base_hash: str, k: int, tolerance: float, values: Tensor | None = None
) -> Triplets | None:
    """Cached triplets that are those of this very matrix, whoever put them there; None where there are none."""
    for path, stored_k in _candidates(base_hash, k).items():
        found = _read_cached(path, base_hash, stored_k, W.shape)
        if found is None or malformed(found) is not None:
            continue
        found = found.leading(k)
        certified = found.subspace_error_bound <= tolerance or found.solver.startswith("dense")
        if certified and disproof(W, found, values) is None:
            return found
    return None


def _read_cached(path: Path, base_hash: str, k: int, shape: tuple[int, ...]) -> Triplets | None:
    """Cached triplets, or None where the file is damaged or of another version: then they are computed again."""
    m, n = shape
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > 4 * k * (m + n + 2) + _HEADER_BYTES:
            return None
        with safe_open(path, framework="pt") as file:
            text, expected = ((file.metadata() or {}).get(key, "") for key in ("triplets", "checksum"))
            tensors = {field: file.get_tensor(field) for field in file.keys()}  # noqa: SIM118
        facts = dict(checked(parse_json(text, str(path)), _Facts, str(path)))
        facts.pop("version")
        if checksum(text, tensors=tensors) != expected or facts["base_hash"] != base_hash or len(tensors["S"]) != k:
            return None
        return Triplets(**tensors, **facts)  # type: ignore[arg-type]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, MemoryError):
        return None


def _to_cache(triplets: Triplets) -> None:
    """Keep triplets for later; a cache that is full or may not be written costs time and nothing else."""
    facts = json.dumps({"version": _CACHE_VERSION, **triplet_facts(triplets)})
    tensors = triplet_tensors(triplets)
    try:
        with atomic_path(_cache_files(triplets.base_hash) / f"k{triplets.k}.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"triplets": facts, "checksum": checksum(facts, tensors=tensors)})
    except InputError:
        warn(
            f"the cache {cache_folder()} is full or cannot be written, so triplets are computed again each time; "
            "make room, or set SPECTRALBASIS_CACHE",
            stacklevel=2,
        )
