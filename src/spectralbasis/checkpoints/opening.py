"""From whatever a person points at to a checkpoint."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spectralbasis.checkpoints.adapter import AdapterCheckpoint
from spectralbasis.checkpoints.adapter_folder import ADAPTER_CONFIG, open_adapter
from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.decoded import decoded
from spectralbasis.checkpoints.folder_files import read_config, weights_file
from spectralbasis.checkpoints.hub import download, is_hub_id
from spectralbasis.checkpoints.installed import installed_folder
from spectralbasis.checkpoints.llama2c_file import open_llama2c_file
from spectralbasis.checkpoints.module import ModuleCheckpoint
from spectralbasis.checkpoints.safetensors_file import SafetensorsFile
from spectralbasis.checkpoints.sharded import join_shards, read_index
from spectralbasis.checkpoints.tensors import TensorCheckpoint, find_state
from spectralbasis.checkpoints.torch_file import open_torch_file
from spectralbasis.errors import InputError

Source = str | Path | Mapping[str, Tensor] | nn.Module | Checkpoint
"""What `open_checkpoint` opens."""
_SAFETENSORS = (".safetensors",)
_LLAMA2C = ".bin"
_TORCH = (".pt", ".pth", ".bin", ".ckpt", ".tar")


def open_checkpoint(source: Source, base: Source | None = None, *, partial: bool = False) -> Checkpoint:
    """Open weights without reading them.

    Args:
        source: a file (safetensors, llama2.c, or a torch pickle, which is never run), a folder (single file, shards,
            or a PEFT adapter over its base), a hub id (`name` or `organisation/name`, where no such path exists; the
            only case in which anything is downloaded), a `state_dict`, an `nn.Module`, or an open checkpoint, which is
            returned as it is.
        base: what an adapter is read over, in place of the base that its `base_model_name_or_path` names: the base
            that a person gives is the base. Without meaning where `source` is no adapter. An adapter cannot be another
            one's base, so where `base` is one, `source` is read over the base that it names itself.

    Raises:
        InputError: the source does not exist, is damaged, is unsafe to read or is no checkpoint, or does not fit the
            base.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, nn.Module):
        return decoded(ModuleCheckpoint(source))
    if isinstance(source, Mapping):
        return decoded(TensorCheckpoint(find_state(source, "state_dict"), "state_dict", {}))
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


def _open_path(source: str, base: Source | None = None, *, partial: bool = False) -> Checkpoint:
    path = installed_folder(source) or Path(source)
    if path.is_dir():
        return _open_folder(path, source, base, partial)
    if path.is_file():
        return decoded(_open_file(path, source, read_config(path.parent)))
    if not path.exists() and is_hub_id(source):
        return _open_folder(download(source), source, base, partial)
    raise InputError(f"{source} does not exist; pass a file, a folder or a hub id such as organisation/name")


def _open_folder(folder: Path, source: str, base: Source | None, partial: bool) -> Checkpoint:
    if (folder / ADAPTER_CONFIG).exists():
        given = None if base is None else open_checkpoint(base)
        own = None if isinstance(given, AdapterCheckpoint) else given
        return open_adapter(folder, source, _open_path, own, partial=partial)
    return decoded(_open_file(weights_file(folder), source, read_config(folder)))


def _open_file(path: Path, source: str, config: Mapping[str, Any]) -> Checkpoint:
    if path.name.endswith(".index.json"):
        located = read_index(path)
        opened = {shard: _open_file(shard, str(shard), config) for shard in dict.fromkeys(located.values())}
        return join_shards(located, opened, source, config)
    if path.suffix in _SAFETENSORS:
        return SafetensorsFile(path, source, config)
    if path.suffix == _LLAMA2C and (found := open_llama2c_file(path, source)):
        return found
    if path.suffix in _TORCH:
        return open_torch_file(path, source, config)
    raise InputError(
        f"{path} has the suffix {path.suffix or '(none)'}, which is not read; "
        f"expected .safetensors, .pt, .pth, .bin, .ckpt or the .index.json of shards"
    )
