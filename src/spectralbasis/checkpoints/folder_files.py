"""Finding files inside a checkpoint's folder, and never outside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectralbasis.errors import InputError

_STANDARD_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_PATTERNS = ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt")
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "adapter_model")


def weights_file(folder: Path) -> Path:
    """The file of weights, or the index of its shards, that stands for a folder.

    The names that `save_pretrained` writes come first, safetensors before pickles; then any single file of weights.

    Raises:
        InputError: there is none, or there are several of equal standing.
    """
    for name in _STANDARD_NAMES:
        if (folder / name).exists():
            return inside(folder, name)
    for pattern in _PATTERNS:
        found = sorted(path for path in folder.glob(pattern) if not path.name.startswith(_NOT_WEIGHTS))
        if len(found) == 1:
            return inside(folder, found[0].name)
        if found:
            raise InputError(
                f"{folder} holds several files of weights ({_listed(path.name for path in found)}); pass the right one"
            )
    raise InputError(_nothing_in(folder))


def _nothing_in(folder: Path) -> str:
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
    """`folder / name`, if that stays in the folder once links are followed.

    A snapshot in the hub's cache links to the blobs beside it, so there the whole repository's cache is the folder.

    Raises:
        InputError: the path leads elsewhere.
    """
    path = folder / name
    root = folder.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        culprit = f"{named_by} names the file {name}" if named_by else f"{path} is a link"
        raise InputError(f"{culprit}, which leads out of {folder}; that is refused, so put the file into the folder")
    return path


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: the file cannot be read, is no JSON, or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no valid JSON ({error}); restore it from the original checkpoint") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} holds a JSON {type(content).__name__}, expected an object; restore it from the original"
        )
    return content


def read_config(folder: Path) -> Mapping[str, Any]:
    """`config.json` of the folder, {} where there is none."""
    return read_json(inside(folder, "config.json")) if (folder / "config.json").exists() else {}
