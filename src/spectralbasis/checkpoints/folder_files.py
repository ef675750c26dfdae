"""Finding files inside a checkpoint's folder, and never outside it."""

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectralbasis.checkpoints.foreign import recognise_folder, recognise_names
from spectralbasis.errors import InputError
from spectralbasis.records import read_record

_STANDARD_NAMES = tuple(
    name + suffix
    for name in ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors",
                 "diffusion_pytorch_model.bin")
    for suffix in ("", ".index.json")
)  # fmt: skip
_STANDARD_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")
_PATTERNS = ("*.safetensors.index*.json", "*.safetensors", "*.bin.index*.json", "*.bin", "*.pt", "*.pth", "*.ckpt")
_NOT_WEIGHTS = (
    "training_args",
    "optimizer",
    "scheduler",
    "sampler",
    "scaler",
    "rng_state",
    "adapter_model",
    "common.pt",
)
_LARGEST_CONFIG = 16 << 20
"""Bytes; a config with the names of a hundred thousand labels has few of them."""
_INDEX = re.compile(r".+\.index(\.[\w-]+)?\.json")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")


def is_index(name: str) -> bool:
    """Whether a file's name is that of the index of shards, of a variant (`.index.fp16.json`) too."""
    return _INDEX.fullmatch(name) is not None


def weights_files(folder: Path) -> tuple[Path, ...]:
    """The file of weights that stands for a folder, or the index of its shards, or all shards where that is missing.

    The names that `save_pretrained` writes come first, safetensors before pickles; then any single file of weights.

    Raises:
        InputError: there is none, there are several of equal standing, or a shard is missing.
    """
    for name in _STANDARD_NAMES:
        if (folder / name).exists():
            return (inside(folder, name),)
    for pattern in _PATTERNS:
        found = sorted(path.name for path in folder.glob(pattern) if not path.name.startswith((".", *_NOT_WEIGHTS)))
        chosen = _shards(folder, found) or found
        if len(chosen) == 1 or (chosen and chosen is not found):
            return tuple(inside(folder, name) for name in chosen)
        if found:
            raise InputError(
                recognise_folder(folder, without_weights=False)
                or f"{folder} holds several files of weights ({_listed(found)}); pass the right one"
            )
    raise InputError(recognise_folder(folder, without_weights=True) or _nothing_in(folder))


def _shards(folder: Path, names: list[str]) -> list[str]:
    """The one set of shards among files, or that of a usual name where there are other files; else nothing.

    Raises:
        InputError: the set is not complete.
    """
    sets: dict[tuple[str, str, str], list[str]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            sets.setdefault((match["stem"], match["count"], match["suffix"]), []).append(name)
    usual = [key for key in sets if key[0] in _STANDARD_STEMS]
    alone = list(sets) if sum(map(len, sets.values())) == len(names) else []
    key = next((keys[0] for keys in (usual, alone) if len(keys) == 1), None)
    if key is None:
        return []
    stem, count, suffix = key
    expected = (f"{stem}-{number:05}-of-{count}{suffix}" for number in range(1, int(count) + 1))
    missing = [name for name in expected if name not in sets[key]]
    if missing:
        raise InputError(
            f"{folder} holds {len(sets[key])} of {int(count)} shards and no index; {_listed(missing)} is missing, so "
            f"download or copy it into the folder"
        )
    return sets[key]


def _nothing_in(folder: Path) -> str:
    other = recognise_names(folder, (path.name for path in folder.iterdir() if path.is_file()))
    if other is not None:
        return f"{folder} holds no weights that are read: {other}"
    nested = sorted(
        {path.parent for name in (*_STANDARD_NAMES, "adapter_config.json") for path in folder.glob(f"*/{name}")}
    )
    hint = f"; did you mean {_listed(map(str, nested))}?" if nested else ""
    return (
        f"{folder} holds no weights; expected model.safetensors, pytorch_model.bin, shards with their index, "
        f"or one other file of weights{hint}"
    )


def _listed(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def inside(folder: Path, name: str, named_by: Path | None = None) -> Path:
    """`folder / name`, if that stays in the folder once links are followed, and is a file or is absent.

    A snapshot in the hub's cache links to the blobs beside it, so there the whole repository's cache is the folder.

    Raises:
        InputError: the path leads elsewhere, or to a folder, a pipe or a device, which would never end.
    """
    path = folder / name
    root = root_of(folder)
    culprit = f"{named_by} names the file {name}" if named_by else f"{path} is a link"
    try:
        place = path.resolve()
        kind = stat.S_IFMT(path.stat().st_mode) if path.exists() else stat.S_IFREG
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that no file can have
        raise InputError(f"{culprit}, which leads nowhere ({error}); put the file into {folder}") from error
    if not place.is_relative_to(root):
        raise InputError(f"{culprit}, which leads out of {folder}; that is refused, so put the file into the folder")
    if path.is_symlink() and not path.exists():
        raise InputError(f"{culprit}, which leads nowhere; put the file into {folder}")
    if kind != stat.S_IFREG:
        raise InputError(f"{path} is no file; restore it from the original")
    return path


def root_of(folder: Path) -> Path:
    """The folder that links may lead to from here: itself, or the hub's cache of the repository that it is in."""
    place = folder.resolve()
    snapshots = next((parent for parent in place.parents if parent.name == "snapshots"), None)
    return snapshots.parent if snapshots and snapshots.parent.name.startswith("models--") else place


def read_config(folder: Path) -> Mapping[str, Any]:
    """`config.json` of the folder, {} where there is none."""
    if not os.path.lexists(folder / "config.json"):  # a link that leads nowhere is refused below
        return {}
    file = inside(folder, "config.json")
    if file.is_file() and (size := file.stat().st_size) > _LARGEST_CONFIG:
        raise InputError(f"{file} has {size} bytes, expected at most {_LARGEST_CONFIG}; restore it from the original")
    return read_record(file, dict[str, Any])
