"""A PEFT adapter's folder: its config, its tensors under the names that PEFT gives them, and the base that it names."""

import re
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.lora import LORA
from spectralbasis.checkpoints.peft_adapter import (
    PEFT_PREFIX,
    Adapter,
    AdapterCheckpoint,
    AdapterMethod,
    RenamedCheckpoint,
)
from spectralbasis.checkpoints.weight_files import inside
from spectralbasis.errors import InputError
from spectralbasis.records import read_record

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = ("adapter_model.safetensors", "adapter_model.bin")
_METHODS: dict[str, AdapterMethod] = {"LORA": LORA}
_REGISTERED_BY = {"SPECTRAL": "spectralbasis.tuner"}
"""PEFT type → the module that registers it, imported when an adapter of it is met."""
_TRAINED = re.compile(
    r"(?P<module>.+\.(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)|spectral_coefficients))"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?P<leaf>\.weight|\.bias)?"
)
"""What PEFT trains: in a file without the adapter's name, in a running model with it (`lora_A.default.weight`)."""
_RETRAINED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<inner>.+)")
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_FRONTS = (PEFT_PREFIX, "module.")
_KOHYA = re.compile(r"(^|[._])lora[._](up|down)([._]|$)|^lora_(unet|te\d?|transformer)_|lora_linear_layer")


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
    *,
    partial: bool = False,
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
        partial: read the adapter also where the base lacks some of what it adapts; see `AdapterCheckpoint.missing`.

    Raises:
        InputError: the base is not found or is an adapter itself, tensors are missing, or the type is not readable.
    """
    config = read_record(inside(folder, ADAPTER_CONFIG), dict[str, Any])
    method = _method(folder, config.get("peft_type"))
    tensors = adapter_tensors(folder, open_tensors, file)
    if base is None:
        base = _named_base(folder, config.get("base_model_name_or_path"), open_source)
    return AdapterCheckpoint(Adapter(folder, config, tensors, base), method, source, partial=partial)


def adapter_tensors(folder: Path, open_tensors: Callable[[Path], Checkpoint], file: str | None = None) -> Checkpoint:
    """The tensors of an adapter, under the names that PEFT's `save_pretrained` gives them.

    Read as well: names with the adapter's name in them, with or without `base_model.model.` (once or more), or with
    what compilers and sharding put in front. Copies of a retrained module that is there under its own name are left
    out, and so is the original that it replaced.

    Raises:
        InputError: there is no such file, it holds several adapters, two tensors of one name, or those of another tool.
    """
    stored = open_tensors(inside(folder, file) if file else _tensors_file(folder))
    named = _peft_names(stored.names(), folder)
    _refuse_other_copies(stored, named, folder)
    return RenamedCheckpoint(stored, named)


def _peft_names(stored: Iterable[str], folder: Path) -> dict[str, str]:
    """PEFT's name → the stored one."""
    plain = {name: _plain(name) for name in stored}
    _refuse_foreign(plain, folder)
    adapters = sorted({match["adapter"] for name in plain.values() if (match := _TRAINED.fullmatch(name))} - {None})
    if len(adapters) > 1:
        raise InputError(
            f"the file of the adapter {folder} holds several adapters ({', '.join(adapters)}); save each one into a "
            f"folder of its own (model.save_pretrained(folder, selected_adapters=[...]))"
        )
    named: dict[str, str] = {}
    for name, short in plain.items():
        new = _without_adapter(short, {*adapters, "default"}, set(plain.values()))
        if new is not None and named.setdefault(f"{PEFT_PREFIX}{new}", name) != name:
            raise InputError(
                f"the file of the adapter {folder} holds {named[PEFT_PREFIX + new]} and {name}, which are two names of "
                f"one tensor; remove one of them"
            )
    return named


def _refuse_other_copies(stored: Checkpoint, named: Mapping[str, str], folder: Path) -> None:
    """Raise InputError if a copy of a retrained tensor, which is left out, holds other numbers than what is read."""
    read = frozenset(named.values())
    for name in stored.names():
        match = _RETRAINED.fullmatch(_plain(name)) if name not in read else None
        own = match and f"{PEFT_PREFIX}{match['module']}.{match['inner'].partition('.')[2] or match['inner']}"
        kept = named.get(own or "")
        if kept is not None and not torch.equal(stored.read(name), stored.read(kept)):
            raise InputError(
                f"the file of the adapter {folder} holds {kept} and {name}, which are two names of one tensor and hold "
                f"different numbers; remove one of them"
            )


def _plain(name: str) -> str:
    """The name of the tensor in the model, whatever wrappers the model was saved in."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while name.startswith(_FRONTS):
        name = next(name.removeprefix(front) for front in _FRONTS if name.startswith(front))
    return name


def _without_adapter(name: str, adapters: set[str], all_names: set[str]) -> str | None:
    """PEFT's name of a tensor; None for a copy that says nothing."""
    if ".original_module." in name:
        return None
    if match := _TRAINED.fullmatch(name):
        return f"{match['module']}{match['leaf'] or ''}"
    if match := _RETRAINED.fullmatch(name):
        first, _, rest = match["inner"].partition(".")
        own = f"{match['module']}.{rest if rest and first in adapters else match['inner']}"
        return None if own in all_names else own
    return name


def _refuse_foreign(names: Mapping[str, str], folder: Path) -> None:
    foreign = next((name for name in names if _KOHYA.search(name)), None)
    if foreign is not None:
        raise InputError(
            f"the file of the adapter {folder} holds {foreign}, a name of kohya's trainers or diffusers, not of PEFT "
            f"(lora_A, lora_B); convert the adapter to PEFT's format first"
        )


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
