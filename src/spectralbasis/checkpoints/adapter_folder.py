"""A PEFT adapter's folder: its config, its tensors and the base that it names."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from spectralbasis.checkpoints.adapter import Adapter, AdapterCheckpoint, AdapterMethod
from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.folder_files import inside, read_json
from spectralbasis.checkpoints.lora import LORA
from spectralbasis.errors import InputError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = ("adapter_model.safetensors", "adapter_model.bin")
_METHODS: dict[str, AdapterMethod] = {"LORA": LORA}
_REGISTERED_BY = {"SPECTRAL": "spectralbasis.tuner"}
"""PEFT type → the module that registers it, imported when an adapter of it is met."""


def register_adapter_method(peft_type: str, method: AdapterMethod) -> None:
    """Make the adapters of a PEFT type readable as checkpoints."""
    _METHODS[peft_type] = method


def open_adapter(
    folder: Path,
    source: str,
    open_tensors: Callable[[Path], Checkpoint],
    open_source: Callable[[str], Checkpoint],
    base: Checkpoint | None = None,
    file: str | None = None,
) -> AdapterCheckpoint:
    """Open an adapter over a base.

    Args:
        folder: holds `adapter_config.json`.
        source: how a person named it.
        open_tensors: opens the adapter's own tensors.
        open_source: opens the base that the adapter names.
        base: None opens the adapter's `base_model_name_or_path`, which may be absolute, relative to the working
            directory or to the adapter, or a hub id.
        file: name of the adapter's own tensors; None takes safetensors before a pickle.

    Raises:
        InputError: the base is not found or is an adapter itself, tensors are missing, or the type is not readable.
    """
    config = read_json(inside(folder, ADAPTER_CONFIG))
    method = _method(folder, config.get("peft_type"))
    tensors = open_tensors(inside(folder, file) if file else _tensors_file(folder))
    if base is None:
        base = _named_base(folder, config.get("base_model_name_or_path"), open_source)
    return AdapterCheckpoint(Adapter(folder, config, tensors, base), method, source)


def _named_base(folder: Path, named: object, open_source: Callable[[str], Checkpoint]) -> Checkpoint:
    path = _base_path(folder, named)
    if (Path(path) / ADAPTER_CONFIG).exists():
        raise InputError(
            f"the adapter in {folder} has an adapter as its base ({path}); merge that one into its model first"
        )
    try:
        return open_source(path)
    except InputError as error:
        raise InputError(
            f"the base of the adapter in {folder} cannot be opened: {error}. "
            f"Its adapter_config.json names it under base_model_name_or_path; correct that, or give the base yourself"
        ) from error


def _method(folder: Path, peft_type: object) -> AdapterMethod:
    if isinstance(peft_type, str) and peft_type in _REGISTERED_BY:
        import_module(_REGISTERED_BY[peft_type])
    if not isinstance(peft_type, str) or peft_type not in _METHODS:
        known = ", ".join(sorted({*_METHODS, *_REGISTERED_BY}))
        raise InputError(
            f"{folder} is an adapter of type {peft_type}, and only {known} can be read over a base; "
            f"merge it with PEFT (model.merge_and_unload()), save the model and pass that folder"
        )
    return _METHODS[peft_type]


def _tensors_file(folder: Path) -> Path:
    for name in ADAPTER_TENSORS:
        if (folder / name).exists():
            return inside(folder, name)
    raise InputError(f"{folder} has {ADAPTER_CONFIG} but no adapter_model.safetensors; save the adapter again")


def _base_path(folder: Path, base: object) -> str:
    if not isinstance(base, str) or not base:
        raise InputError(
            f"{folder / ADAPTER_CONFIG} names no base; set base_model_name_or_path to the model's folder or hub id"
        )
    return base if Path(base).exists() or not (folder / base).exists() else str(folder / base)
