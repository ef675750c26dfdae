"""From whatever a person points at to a checkpoint."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spectralbasis.checkpoints.adapter import AdapterCheckpoint
from spectralbasis.checkpoints.adapter_folder import ADAPTER_CONFIG, ADAPTER_TENSORS, open_adapter
from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.decoded import decoded
from spectralbasis.checkpoints.folder_files import inside, is_index, read_config, weights_files
from spectralbasis.checkpoints.foreign import SAFETENSORS_START, refuse_file, refuse_state
from spectralbasis.checkpoints.hub import download, is_hub_id
from spectralbasis.checkpoints.installed import installed_folder
from spectralbasis.checkpoints.llama2c_file import open_llama2c_file
from spectralbasis.checkpoints.module import ModuleCheckpoint
from spectralbasis.checkpoints.safetensors_file import SafetensorsFile
from spectralbasis.checkpoints.sharded import join_loose_shards, join_shards, read_index
from spectralbasis.checkpoints.tensors import TensorCheckpoint, find_state
from spectralbasis.checkpoints.torch_file import open_torch_file
from spectralbasis.errors import InputError
from spectralbasis.printable import shortened, warn

Source = str | Path | Mapping[str, Tensor] | nn.Module | Checkpoint
"""What `open_checkpoint` opens."""
_LONGEST_NAME, _MOST_PARTS = 4096, 100
_LLAMA2C = ".bin"
_TORCH = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_TORCH_STARTS = (b"PK\x03\x04", b"\x80\x02")


def open_checkpoint(source: Source, base: Source | None = None, *, partial: bool = False) -> Checkpoint:
    """Open weights without reading them.

    Args:
        source: a file (safetensors, llama2.c, or a torch pickle, which is never run; an adapter's file of tensors
            stands for its folder), a folder (single file, shards, or a PEFT adapter over its base), a hub id (`name` or
            `organisation/name`, where no such path exists; the only case in which anything is downloaded), a
            `state_dict`, an `nn.Module`, or an open checkpoint, which is returned as it is.
        base: what an adapter is read over, in place of the base that its `base_model_name_or_path` names: the base
            that a person gives is the base. Without meaning where `source` is no adapter. An adapter cannot be another
            one's base, so where `base` is one, `source` is read over the base that it names itself.

    Raises:
        InputError: the source does not exist, is damaged, is unsafe to read or is no checkpoint, does not fit the
            base, or is of a kind that is not read (see `foreign.py`), such as the state of an adapter that was not
            merged.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, nn.Module):
        return _whole(ModuleCheckpoint(source))
    if isinstance(source, Mapping):
        return _whole(TensorCheckpoint(find_state(source, "state_dict"), "state_dict", {}))
    if isinstance(source, str | os.PathLike):
        try:
            return _open_path(str(source), base, partial=partial)
        except OSError as error:
            raise InputError(
                f"{source} cannot be opened: {error.strerror or error}; check the path and its rights"
            ) from error
    raise InputError(
        f"cannot open a {type(source).__name__} as a checkpoint; pass a path, a hub id, a state_dict or an nn.Module"
    )


def open_tensors(path: Path) -> Checkpoint:
    """Open one file's tensors as they are stored, which may be an adapter's alone.

    Raises:
        InputError: the file is damaged, is unsafe to read or is no file of tensors.
    """
    refuse_file(path, by_name=False)
    found = _read_file(path, str(path), {})
    _refuse_names(found)
    return found


def _open_path(source: str, base: Source | None = None, *, partial: bool = False) -> Checkpoint:
    path = installed_folder(source) or Path(source)
    if path.is_dir():
        return _open_folder(path, source, base, partial)
    if path.is_file():
        if path.name in ADAPTER_TENSORS and (path.parent / ADAPTER_CONFIG).exists():
            return _open_adapter(path.parent, source, base, partial, path.name)
        return _whole(_open_file(path, source, _config_beside(path)))
    if not path.exists() and is_hub_id(source):
        return _open_folder(download(source), source, base, partial)
    index = path.with_name(f"{path.name}.index")
    if path.name and index.is_file():  # TensorFlow names a checkpoint by what its files' names have in common
        refuse_file(index)
    raise InputError(f"{source} does not exist; pass a file, a folder or a hub id such as organisation/name")


def _config_beside(file: Path) -> Mapping[str, Any]:
    """The config of the folder that a file lies in; {} where it has none, or one of something else."""
    try:
        return read_config(file.parent)
    except InputError as error:
        warn(f"{file} is read without its config, by which fused matrices are told apart: {error}", stacklevel=4)
        return {}


def _open_folder(folder: Path, source: str, base: Source | None, partial: bool) -> Checkpoint:
    if (folder / ADAPTER_CONFIG).exists():
        return _open_adapter(folder, source, base, partial)
    config = read_config(folder)
    named = config.get("transformers_weights")  # which transformers reads in place of the usual file
    files = weights_files(folder) if named is None else (inside(folder, str(named), folder / "config.json"),)
    if len(files) == 1:
        return _whole(_open_file(files[0], source, config))
    return _whole(join_loose_shards({file: _open_file(file, str(file), config) for file in files}, source, config))


def _open_adapter(folder: Path, source: str, base: Source | None, partial: bool, file: str | None = None) -> Checkpoint:
    given = None if base is None else open_checkpoint(base)
    over = None if isinstance(given, AdapterCheckpoint) else given
    return open_adapter(folder, source, open_tensors, _open_path, over, file, partial=partial)


def _whole(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its weights decoded, if these are all that its model is."""
    _refuse_names(checkpoint)
    refuse_state(checkpoint)
    return decoded(checkpoint)


def _refuse_names(checkpoint: Checkpoint) -> None:
    """Raise InputError if a tensor has a name that no model's has, which would cost time or could not be stored."""
    for name in checkpoint.names():
        if len(name) > _LONGEST_NAME or name.count(".") >= _MOST_PARTS:
            raise InputError(
                f"{checkpoint.source} holds a tensor whose name has {len(name)} characters in {name.count('.') + 1} "
                f"parts ({shortened(name, 60)}), expected at most {_LONGEST_NAME} in {_MOST_PARTS}; rename it"
            )
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise InputError(
                f"{checkpoint.source} holds a tensor whose name, {shortened(name, 60)}, is no valid Unicode; rename it"
            )


def _open_file(path: Path, source: str, config: Mapping[str, Any]) -> Checkpoint:
    refuse_file(path)
    if is_index(path.name):
        located = read_index(path)
        shards = dict.fromkeys(located.values())
        if (index := next((shard for shard in shards if is_index(shard.name)), None)) is not None:
            raise InputError(f"{path} names {index.name} as a shard, which is an index; restore it from the original")
        opened = {shard: _open_file(shard, str(shard), config) for shard in shards}
        return join_shards(located, opened, source, config)
    return _read_file(path, source, config)


def _read_file(path: Path, source: str, config: Mapping[str, Any]) -> Checkpoint:
    """One file of tensors, by its first bytes and, where these do not tell, by its suffix."""
    with path.open("rb") as file:
        start = file.read(16)
    if SAFETENSORS_START.match(start):
        return SafetensorsFile(path, source, config)
    if path.suffix == _LLAMA2C and (found := open_llama2c_file(path, source)):
        return found
    if path.suffix == ".safetensors":
        if start.startswith(_TORCH_STARTS):  # torch.load, too, goes by this suffix
            raise InputError(f"{path} is a file of torch.save under another suffix; rename it to {path.stem}.bin")
        return SafetensorsFile(path, source, config)
    if path.suffix in _TORCH or start.startswith(_TORCH_STARTS):
        return open_torch_file(path, source, config)
    raise InputError(
        f"{path} is of no known format (its suffix is {path.suffix or 'missing'}, and it starts with {start[:8]!r}); "
        f"expected .safetensors, .pt, .pth, .bin, .ckpt or the .index.json of shards"
    )
