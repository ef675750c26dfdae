"""Read spectral adapters from folders, with or without the base, and check whether two are comparable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralbasis.checkpoints import matrix_name, open_checkpoint
from spectralbasis.checkpoints.adapters import ADAPTER_CONFIG, AdapterCheckpoint, adapted_name, adapter_tensors
from spectralbasis.checkpoints.opening import Source, open_tensors
from spectralbasis.checkpoints.weight_files import inside
from spectralbasis.errors import InputError
from spectralbasis.kinds import KINDS
from spectralbasis.peft_import import METHOD
from spectralbasis.records import read_record
from spectralbasis.tuner.config import SpectralConfig, read_config, same_weights
from spectralbasis.tuner.layer import COEFFICIENTS_OF
from spectralbasis.tuner.preparation import PROBE_TOLERANCE
from spectralbasis.tuner.reading import check_layers_alone, lacking


@dataclass(frozen=True)
class SpectralAdapter:
    """What one adapter trained, and the record of what it is trained on.

    Attributes:
        folder: where it was read.
        config: its record.
        names: of all its tensors, as PEFT names them.
        stored: matrix name → the numbers that C is made of.
        others: name of a parameter in the model → heads and other retrained modules, trained biases.
    """

    folder: Path
    config: SpectralConfig
    names: tuple[str, ...]
    stored: dict[str, Tensor]
    others: dict[str, Tensor]

    @property
    def entries(self) -> int:
        """How many entries of C it trains, over all matrices."""
        count = KINDS[self.config.coefficients].entries
        if count is None:
            return sum(numbers.numel() for numbers in self.stored.values())
        return sum(count(self.config.matrix(name).k, self.config.size) for name in self.stored)

    def coefficients(self) -> dict[str, Tensor]:
        """Matrix name → C of `ΔW = U C Vᵀ`, (k,) where it is diagonal, else (k, k), in float32 or wider."""
        wide = {
            name: numbers.to(torch.promote_types(numbers.dtype, torch.float32)) for name, numbers in self.stored.items()
        }
        return {name: self.config.parametrisation(self.config.matrix(name))(numbers) for name, numbers in wide.items()}


def is_spectral_adapter(source: Any) -> bool:
    """Whether this is the folder of an adapter of the method SPECTRAL."""
    folder = Path(source) if isinstance(source, str | Path) else None
    if folder is None or not (folder / ADAPTER_CONFIG).is_file():
        return False
    return read_record(inside(folder, ADAPTER_CONFIG), dict[str, Any]).get("peft_type") == METHOD


def read_spectral_adapter(folder: Path) -> SpectralAdapter:
    """Read an adapter's record and coefficients.

    Raises:
        InputError: a file is missing or damaged, or the two are not of one adapter.
    """
    config = read_config(folder)
    check_layers_alone(config, folder)
    stored = adapter_tensors(folder, open_tensors)
    tensors = {name: stored.read(name) for name in stored.names()}
    shapes = {name: config.stored_shape(one) for name, one in config.record.items()}
    numbers, others = split_tensors(tensors, shapes, str(folder))
    lost = [name for name in shapes if name not in numbers]
    if lost:
        raise InputError(lacking(folder, lost, len(shapes)))
    return SpectralAdapter(folder, config, stored.names(), numbers, others)


def with_names_of(first: SpectralConfig, other: SpectralAdapter) -> SpectralAdapter:
    """An adapter with the names that another one has for the same matrices, which their hashes tell.

    Releases of transformers name modules differently; without this, one matrix would count as two.
    """
    names = same_weights(other.config.base_hashes or {}, first.base_hashes or {})
    if not names:
        return other
    record = {names.get(name, name): one for name, one in other.config.record.items()}
    stored = {names.get(name, name): numbers for name, numbers in other.stored.items()}
    return replace(other, config=other.config.with_record(record), stored=stored)


def split_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], source: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Coefficients by matrix name, and all other tensors by the name of their parameter in the model.

    Args:
        tensors: an adapter's, as PEFT names them.
        shapes: matrix name → shape of its stored coefficients.
        source: how a person names the adapter.

    Raises:
        InputError: there are coefficients of an unknown matrix, or of another shape.
    """
    stored, others = {}, {}
    for tensor_name, tensor in tensors.items():
        module, is_coefficients, _ = adapted_name(tensor_name).partition(COEFFICIENTS_OF)
        if not is_coefficients:
            others[module] = tensor
            continue
        name = module if module in shapes else matrix_name(module)
        if shapes.get(name) != tuple(tensor.shape):
            raise InputError(f"{source}: {ADAPTER_CONFIG} does not describe the coefficients of {name}; restore it")
        stored[name] = tensor
    return stored, others


def open_spectral_adapter(
    folder: str | Path, base: Source | None = None, *, partial: bool = False
) -> AdapterCheckpoint:
    """Open an adapter of the method SPECTRAL over its base.

    Args:
        folder: holds `adapter_config.json`.
        base: the model that it was trained on; None opens the one that the adapter names.
        partial: open it without what the base lacks.

    Raises:
        InputError: this is no such folder, or the adapter does not fit the base.
        BaseMismatchError: the base is not the one that the adapter was trained on.
    """
    if not is_spectral_adapter(folder):
        raise InputError(
            f"{folder} is not the folder of a spectral adapter: it has no {ADAPTER_CONFIG} of peft_type {METHOD}"
        )
    opened = open_checkpoint(folder, base=base, partial=partial)
    if not isinstance(opened, AdapterCheckpoint) or not opened.edits:
        raise InputError(f"the adapter {folder} holds no coefficients; save it again")
    return opened


def other_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Parameter name → shape of what an adapter's file holds besides coefficients; no data is read."""
    stored = adapter_tensors(folder, open_tensors)
    return {adapted_name(name): stored.shape(name) for name in stored.names() if COEFFICIENTS_OF not in name}


def check_one_basis(adapters: Sequence[SpectralAdapter]) -> None:
    """Raise InputError unless equal coefficients mean equal updates in all of these adapters."""
    first, *others = adapters
    for other in others:
        found = difference(first.config, other.config)
        if found:
            raise InputError(
                f"the coefficients of {first.folder} and {other.folder} are not comparable: {found}; compare adapters "
                "of one base and basis, or only their updates (of='updates', --of updates)"
            )


def difference(a: SpectralConfig, b: SpectralConfig) -> str:
    """Why equal C do not mean equal updates in two adapters; empty where they do."""
    if form_of(a) != form_of(b):
        return f"one trains {a.coefficients} coefficients, the other {b.coefficients}"
    if _basis(a) != _basis(b):
        return f"one has the basis {_basis(a)}, the other {_basis(b)}"
    ours, theirs = a.base_hashes or {}, b.base_hashes or {}
    both = [name for name in ours if name in theirs]
    if not both:
        return "they adapt no matrix in common"
    for name in both:
        if ours[name] != theirs[name]:
            return f"{name} of their bases differs (hashes {ours[name]} and {theirs[name]})"
        # Probes of different ranks say nothing of each other.
        one, other = a.matrix(name), b.matrix(name)
        probes = zip(one.probes, other.probes, strict=True)
        if one.k == other.k and any(abs(x - y) > PROBE_TOLERANCE for x, y in probes):
            return f"they were trained on different directions of {name} (their probes differ)"
    return ""


def difference_of_numbers(a: SpectralConfig, b: SpectralConfig) -> str:
    """Why equal stored numbers do not mean equal C where both adapt a matrix; empty where they do."""
    for field in ("coefficients", "scaling", *filter(None, (KINDS[a.coefficients].option,))):
        ours, theirs = getattr(a, field), getattr(b, field)
        if ours != theirs:
            return f"one has {field}={ours!r}, the other {theirs!r}"
    for field in ("ranks", "entries"):
        ours, theirs = getattr(a, field) or {}, getattr(b, field) or {}
        for name in ours.keys() & theirs.keys():
            if ours[name] != theirs[name]:
                return f"they train different {field} of {name}"
    return ""


def form_of(config: SpectralConfig) -> str:
    """The form of C, which is that of a core where C is not diagonal."""
    return KINDS[config.coefficients].form


def _basis(config: SpectralConfig) -> str:
    """A name that two adapters share where they may have one basis; files are told apart by their probes."""
    if config.basis == "random":
        return f"random (seed {config.basis_seed})"
    return config.basis if config.basis in ("pretrained", "minor") else "of a file"
