"""`SpectralBasis`: the leading singular triplets of every weight matrix of a model, computed, saved and loaded."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import ConfigDict, with_config
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from typing_extensions import TypedDict

from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path, check_replaceable, checksum
from spectralbasis.linalg import Leading, parse_leading, resolve_leading
from spectralbasis.printable import printable, track
from spectralbasis.records import Finite, checked, parse_json
from spectralbasis.sizes import check_memory
from spectralbasis.triplets import (
    DEFAULT_TOLERANCE,
    Triplets,
    check_tolerance,
    compute_triplets,
    malformed,
    triplet_facts,
    triplet_tensors,
)

FORMAT_VERSION = 2
_FIELDS = ("U", "S", "Vh", "residuals")
_ANEW = "compute the basis again"


@with_config(ConfigDict(extra="forbid"))
class _Facts(TypedDict):
    """What the header says of one matrix; see `Triplets`."""

    next_singular_value: Annotated[float, Ge(0)]
    subspace_error_bound: Annotated[Finite, Ge(0), Le(1)]
    solver: str
    base_hash: str


@with_config(ConfigDict(extra="forbid"))
class _Header(TypedDict):
    """The header of a basis file."""

    version: Literal[2]
    kind: str
    source: str
    leading: int | Finite | str
    skipped: dict[str, str]
    matrices: dict[str, _Facts]
    checksums: dict[str, str]


class SpectralBasis(Mapping[str, Triplets]):
    """Matrix name → `Triplets`, for one base model; read from its file matrix by matrix when loaded.

    Attributes:
        kind: which directions: "pretrained" for the leading singular vectors of the base, "curvature" for those of
            `curvature_basis`.
        source: the base, as it was named.
        leading: how many directions were asked for, as given.
        skipped: matrix name → reason, of what has no triplets here.
    """

    def __init__(
        self,
        triplets: Mapping[str, Triplets],
        *,
        kind: str = "pretrained",
        source: str = "",
        leading: Leading = 0,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        self._triplets = triplets
        self.kind = kind
        self.source = source
        self.leading = leading
        self.skipped = dict(skipped or {})

    def __getitem__(self, name: str) -> Triplets:
        return self._triplets[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._triplets)

    def __len__(self) -> int:
        return len(self._triplets)

    def __repr__(self) -> str:
        return f"SpectralBasis({len(self)} matrices of {printable(self.source) or 'a model'}, leading={self.leading})"

    @classmethod
    def compute(
        cls,
        source: Any,
        leading: Leading = 64,
        *,
        tolerance: float = DEFAULT_TOLERANCE,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        cache: bool = True,
        progress: bool = False,
    ) -> "SpectralBasis":
        """Decompose every weight matrix of a checkpoint, one in memory at a time.

        Args:
            source: whatever `open_checkpoint` opens: a path, a hub id, a state dict, a module.
            leading: a number of directions (all of a matrix that has fewer), a fraction of min(m, n), "auto", "mp" or
                "gd".
            tolerance: largest sine between computed and true leading subspaces.
            include: glob patterns of matrix names to take; empty takes all but embeddings and heads.
            exclude: glob patterns of matrix names to leave out.
            cache: keep and reuse triplets on this machine, by content.
            progress: draw a progress bar on stderr.

        Returns:
            The basis, one entry for each matrix that was decomposed; `skipped` names the others.

        Raises:
            InputError: the checkpoint cannot be read, or not one matrix could be decomposed.

        Examples:
            >>> import torch
            >>> from spectralbasis import SpectralBasis
            >>> basis = SpectralBasis.compute({"0.dense.weight": torch.diag(torch.tensor([3.0, 2, 1]))}, leading=2)
            >>> basis["0.dense"].S
            tensor([3., 2.])
        """
        leading = parse_leading(leading)
        check_tolerance(tolerance)
        checkpoint = open_checkpoint(source)
        matrices, skipped = logical_matrices(checkpoint, include=include, exclude=exclude)
        found: dict[str, Triplets] = {}
        for matrix in track(matrices.values(), "decomposing", total=len(matrices), enabled=progress):
            try:
                stored_and_float32 = matrix.dtype.itemsize + 4
                check_memory(stored_and_float32 * prod(matrix.shape), f"decomposing {matrix.name}")
                W = matrix.read()
                k = resolve_leading(leading, W)
                found[matrix.name] = compute_triplets(W, k, tolerance=tolerance, cache=cache)
            except ValueError as error:
                skipped[matrix.name] = str(error)
        if not found:
            name, reason = next(iter(skipped.items()), ("", "it holds no weight matrix"))
            raise InputError(
                f"no matrix of {checkpoint.source} could be decomposed; {name + ': ' if name else ''}{reason}"
            )
        return cls(found, source=checkpoint.source, leading=leading, skipped=skipped)

    def name_of(self, base_hash: str) -> str | None:
        """The name under which the basis has the triplets of the matrix with this content; None where it has none.

        A file and a module may call one matrix by two names; see `matrix_hash`.
        """
        return self._names_by_hash.get(base_hash)

    @cached_property
    def _names_by_hash(self) -> dict[str, str]:
        held = self._triplets
        hashes = held.hashes() if isinstance(held, _StoredTriplets) else {n: one.base_hash for n, one in held.items()}
        return {base_hash: name for name, base_hash in hashes.items()}

    def save(self, file: str | Path) -> Path:
        """Write one safetensors file; certificates, hashes and checksums are in its metadata.

        Returns:
            The path of the file.

        Raises:
            InputError: the file cannot be written, or a file that this package did not write is there.
        """
        parts = {name: triplet_tensors(triplets) for name, triplets in self.items()}
        tensors = {f"{name}.{field}": tensor for name, part in parts.items() for field, tensor in part.items()}
        header = {
            "version": FORMAT_VERSION,
            "kind": self.kind,
            "source": self.source,
            "leading": self.leading,
            "skipped": self.skipped,
            "matrices": {name: triplet_facts(triplets) for name, triplets in self.items()},
            "checksums": {name: checksum(tensors=part) for name, part in parts.items()},
        }
        text = json.dumps(header)
        check_replaceable(Path(file))
        with atomic_path(file) as temporary:
            save_file(tensors, temporary, metadata={"spectralbasis": text, "checksum": checksum(text)})
        return Path(file)

    @classmethod
    def load(cls, file: str | Path) -> "SpectralBasis":
        """Open a basis file; each matrix is read when asked for.

        Raises:
            InputError: it is missing, damaged, of another version, or not a basis file.

        Examples:
            >>> import tempfile, torch
            >>> from spectralbasis import SpectralBasis
            >>> W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     file = SpectralBasis.compute({"dense.weight": W}, leading=2).save(f"{folder}/basis.safetensors")
            ...     SpectralBasis.load(file)["dense"].shape
            (3, 3)
        """
        header, handle = _open(Path(file))
        return cls(
            _StoredTriplets(Path(file), handle, header["matrices"], header["checksums"]),
            kind=header["kind"],
            source=header["source"],
            leading=header["leading"],
            skipped=header["skipped"],
        )


class _StoredTriplets(Mapping[str, Triplets]):
    """Triplets of a basis file, read on access and checked."""

    def __init__(self, file: Path, handle: Any, facts: Mapping[str, _Facts], checksums: Mapping[str, str]) -> None:
        self._file = file
        self._handle = handle
        self._facts = facts
        self._checksums = checksums

    def __getitem__(self, name: str) -> Triplets:
        facts = self._facts[name]
        try:
            tensors = {field: self._handle.get_tensor(f"{name}.{field}") for field in _FIELDS}
        except SafetensorError as error:
            raise InputError(f"{self._file} is damaged: {error}; compute the basis again") from error
        if checksum(tensors=tensors) != self._checksums[name]:
            raise InputError(f"{self._file} is damaged: {name} fails its checksum; {_ANEW}")
        found = Triplets(**tensors, **facts)
        wrong = malformed(found)
        if wrong:
            raise InputError(f"{self._file}: {name} does not hold singular triplets: {wrong}; {_ANEW}")
        return found

    def hashes(self) -> dict[str, str]:
        """Name → hash of the matrix, from the file's header."""
        return {name: str(facts["base_hash"]) for name, facts in self._facts.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)


def _open(file: Path) -> tuple[_Header, Any]:
    if not file.is_file():
        raise InputError(f"no basis file at {file}; write one with: spectralbasis basis MODEL -o {file}")
    try:
        handle: Any = safe_open(file, framework="pt")
        if isinstance(handle, AbstractContextManager):
            handle = handle.__enter__()
        metadata = handle.metadata() or {}
    except (SafetensorError, OSError, MemoryError) as error:
        raise InputError(f"{file} cannot be read as safetensors ({error}); {_ANEW}") from error
    text = metadata.get("spectralbasis")
    if text is None:
        raise InputError(
            f"{file} is a safetensors file but no basis; write one with: spectralbasis basis MODEL -o FILE"
        )
    if metadata.get("checksum") != checksum(text):
        raise InputError(f"{file} is damaged: its header fails its checksum; {_ANEW}")
    header = checked(parse_json(text, f"the header of {file}", _ANEW), _Header, f"the header of {file}", _ANEW)
    _check_contents(file, header, handle)
    return header, handle


def _check_contents(file: Path, header: _Header, handle: Any) -> None:
    """Refuse a file whose tensors are not those of its header, or not of the shapes of triplets; no data is read."""
    expected = {f"{name}.{field}" for name in header["matrices"] for field in _FIELDS}
    odd = sorted(expected ^ set(handle.keys())) or sorted(header["matrices"].keys() ^ header["checksums"].keys())
    if odd:
        raise InputError(f"{file}: its header and its tensors differ in {odd[0]}; {_ANEW}")
    for name in header["matrices"]:
        slices = {field: handle.get_slice(f"{name}.{field}") for field in _FIELDS}
        shapes = {field: tuple(one.get_shape()) for field, one in slices.items()}
        m, n, k = shapes["U"][0] if shapes["U"] else 0, shapes["Vh"][-1] if shapes["Vh"] else 0, math.prod(shapes["S"])
        if shapes != {"U": (m, k), "S": (k,), "Vh": (k, n), "residuals": (k,)} or not 1 <= k <= min(m, n):
            raise InputError(
                f"{file}: {name} has tensors of shapes {', '.join(f'{field} {shapes[field]}' for field in _FIELDS)}, "
                f"expected (m, k), (k,), (k, n) and (k,) with 1 <= k <= min(m, n); {_ANEW}"
            )
        types = {one.get_dtype() for one in slices.values()}
        if types != {"F32"}:
            raise InputError(f"{file}: {name} has tensors of type {', '.join(sorted(types))}, expected F32; {_ANEW}")
