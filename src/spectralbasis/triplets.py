"""The leading triplets of one matrix: computed once per machine, kept on disk by the content of the matrix."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectralbasis.checksums import checksum
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path
from spectralbasis.linalg import (
    LeadingSVD,
    leading_svd,
    leading_svd_and_values,
    singular_values,
    subspace_error_bound,
)
from spectralbasis.linalg.row_source import MatrixLike, row_slices
from spectralbasis.printable import warn

DEFAULT_TOLERANCE = 1e-4
_CACHE_VERSION = "2"
_WITHOUT_CHECKSUM = "1"
_HASH_BLOCK = 1 << 22


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
            raise ValueError(f"k={k} is outside 1..{self.k}, the triplets at hand; compute a basis with leading={k}")
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


def matrix_hash(W: MatrixLike) -> str:
    """xxh3-128 of the shape and the values as float32, as 32 hexadecimal digits.

    A bf16 checkpoint and the same one upcast to float32 have one hash; a rounded copy has another.
    """
    digest = xxhash.xxh3_128(repr(tuple(W.shape)).encode())
    for block in _flat_blocks(W):
        digest.update(block.to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def _flat_blocks(W: MatrixLike) -> Iterator[Tensor]:
    """The entries of a matrix in their order."""
    if isinstance(W, Tensor):
        yield from W.detach().reshape(-1).split(_HASH_BLOCK)
    else:
        yield from (W[rows].reshape(-1) for rows in row_slices(W))


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
    known = _from_cache(base_hash, k, tolerance) if cache else None
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
    known = _from_cache(base_hash, k, tolerance)
    if known is not None:
        return known, singular_values(W)
    svd, values = leading_svd_and_values(W, k, tolerance=tolerance)
    triplets = _triplets(svd, base_hash)
    _to_cache(triplets)
    return triplets, values


def cache_folder() -> Path:
    """Where computed triplets are kept: `SPECTRALBASIS_CACHE`, else `spectralbasis` in the user's cache folder."""
    given = os.environ.get("SPECTRALBASIS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectralbasis"


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


def _cache_files(base_hash: str) -> Path:
    return cache_folder() / "triplets" / base_hash[:2] / base_hash


def _from_cache(base_hash: str, k: int, tolerance: float) -> Triplets | None:
    candidates = sorted(_cache_files(base_hash).glob("k*.safetensors"), key=_stored_k)
    for path in candidates:
        if _stored_k(path) < k:
            continue
        found = _read_cached(path, base_hash)
        if found is not None:
            found = found.leading(k)
            if found.subspace_error_bound <= tolerance or found.solver.startswith("dense"):
                return found
    return None


def _stored_k(path: Path) -> int:
    digits = path.stem.removeprefix("k")
    return int(digits) if digits.isdigit() else 0


def _read_cached(path: Path, base_hash: str) -> Triplets | None:
    """Cached triplets, or None where the file is damaged or of another version: then they are computed again."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("triplets", "{}")
            facts, expected = json.loads(text), (file.metadata() or {}).get("checksum")
            version = facts.pop("version", None)
            tensors = {field: file.get_tensor(field) for field in file.keys()}  # noqa: SIM118
            whole = version == _WITHOUT_CHECKSUM or checksum(text, tensors=tensors) == expected
            if version not in (_CACHE_VERSION, _WITHOUT_CHECKSUM) or not whole or facts["base_hash"] != base_hash:
                return None
            return Triplets(**tensors, **facts)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
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
            f"the cache {cache_folder()} is full or cannot be written, so triplets are computed anew each time; "
            "make room, or set SPECTRALBASIS_CACHE",
            stacklevel=2,
        )
