"""Trained coefficients as an adapter folder holds them, without the base."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spectralbasis.checkpoints import Checkpoint, matrix_name, open_checkpoint
from spectralbasis.checkpoints.adapter import AdapterCheckpoint, adapted_name
from spectralbasis.checkpoints.adapter_folder import ADAPTER_CONFIG
from spectralbasis.checkpoints.folder_files import inside, read_json
from spectralbasis.checkpoints.installed import installed_folder
from spectralbasis.checkpoints.opening import Source
from spectralbasis.errors import InputError
from spectralbasis.tuner.config import SpectralConfig
from spectralbasis.tuner.forms import FORMS
from spectralbasis.tuner.preparation import PROBE_TOLERANCE
from spectralbasis.tuner.registration import METHOD

COEFFICIENTS = ".spectral_coefficients"
"""Stands, in the name of a stored tensor, between the module and what PEFT appends."""


@dataclass(frozen=True)
class SpectralAdapter:
    """The coefficients of one adapter by matrix name, and the record of what they are coefficients of."""

    folder: Path
    config: SpectralConfig
    coefficients: dict[str, Tensor]

    @property
    def hashes(self) -> dict[str, str]:
        """Matrix name → hash of the base weight."""
        return self.config.base_hashes or {}


def is_spectral_adapter(source: Any) -> bool:
    """Whether this is the folder of an adapter of the method SPECTRAL."""
    folder = Path(source) if isinstance(source, str | Path) else None
    if folder is None or not (folder / ADAPTER_CONFIG).is_file():
        return False
    return read_json(inside(folder, ADAPTER_CONFIG)).get("peft_type") == METHOD


def read_spectral_adapter(folder: Path) -> SpectralAdapter:
    """Read an adapter's record and coefficients.

    Raises:
        InputError: a file is missing or damaged, or the two are not of one adapter.
    """
    try:
        config = SpectralConfig.from_pretrained(str(folder))
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{folder}: {ADAPTER_CONFIG} cannot be used ({error}); restore it") from error
    tensors = open_checkpoint(inside(folder, "adapter_model.safetensors"))
    ranks = config.ranks or {}
    found = {}
    for stored in tensors.names():
        module, is_coefficients, _ = adapted_name(stored).partition(COEFFICIENTS)
        if is_coefficients:
            name = module if module in ranks else matrix_name(module)
            if name not in ranks or tensors.shape(stored) != FORMS[config.coefficients].shape(ranks[name]):
                raise InputError(f"{folder}: {ADAPTER_CONFIG} does not describe the coefficients of {name}; restore it")
            found[name] = tensors.read(stored)
    return SpectralAdapter(folder, config, found)


def open_spectral_adapter(folder: str | Path, base: Source | None = None) -> AdapterCheckpoint:
    """Open an adapter of the method SPECTRAL over its base.

    Args:
        folder: holds `adapter_config.json`.
        base: the model that it was trained on; None opens the one that the adapter names.

    Raises:
        InputError: this is no such folder, or the adapter does not fit the base.
        BaseMismatchError: the base is not the one that the adapter was trained on.
    """
    if not is_spectral_adapter(folder):
        raise InputError(
            f"{folder} is no folder of a spectral adapter: it has no {ADAPTER_CONFIG} of peft_type {METHOD}"
        )
    opened = open_checkpoint(folder, base=base)
    if not isinstance(opened, AdapterCheckpoint) or not opened.edits:
        raise InputError(f"the adapter {folder} holds no coefficients; save it again")
    return opened


def named_base(opened: AdapterCheckpoint, given: Source | None) -> str | None:
    """How a config should name the base of an adapter that was opened with the base `given`."""
    if given is None or isinstance(given, str | Path):
        return str(installed_folder(opened.base.source) or opened.base.source)
    named = opened.adapter.config.get("base_model_name_or_path")
    return named if isinstance(named, str) else None


def other_tensors(tensors: Checkpoint) -> dict[str, Tensor]:
    """What an adapter's file holds besides coefficients: heads and other retrained modules, biases."""
    return {name: tensors.read(name) for name in tensors.names() if COEFFICIENTS not in name}


def check_one_basis(adapters: Sequence[SpectralAdapter]) -> None:
    """Raise InputError unless equal coefficients mean equal updates in all of these adapters."""
    first, *others = adapters
    for other in others:
        difference = _difference(first, other)
        if difference:
            raise InputError(
                f"the coefficients of {first.folder} and {other.folder} are not of one kind: {difference}; "
                "compare adapters of one base and basis, or their updates alone (of='updates', --of updates)"
            )


def _difference(a: SpectralAdapter, b: SpectralAdapter) -> str:
    if a.config.coefficients != b.config.coefficients:
        return f"one trains {a.config.coefficients} coefficients, the other {b.config.coefficients}"
    if _basis(a.config) != _basis(b.config):
        return f"one has the basis {_basis(a.config)}, the other {_basis(b.config)}"
    both = [name for name in a.coefficients if name in b.coefficients]
    if not both:
        return "they adapt no matrix in common"
    for name in both:
        if a.hashes[name] != b.hashes[name]:
            return f"{name} of their bases differs (hashes {a.hashes[name]} and {b.hashes[name]})"
        if _turned(a.config, b.config, name):
            return f"they were trained on different directions of {name} (their probes differ)"
    return ""


def _basis(config: SpectralConfig) -> str:
    """A name that two adapters share where they may have one basis; files are told apart by their probes."""
    if config.basis == "random":
        return f"random (seed {config.basis_seed})"
    return config.basis if config.basis in ("pretrained", "minor") else "of a file"


def _turned(a: SpectralConfig, b: SpectralConfig, name: str) -> bool:
    """Whether the probes show different directions; those of different ranks say nothing of each other."""
    if (a.ranks or {})[name] != (b.ranks or {})[name]:
        return False
    ours, theirs = (a.probes or {})[name], (b.probes or {})[name]
    return any(abs(x - y) > PROBE_TOLERANCE for x, y in zip(ours, theirs, strict=True))
