"""Open what a user names as a checkpoint: a file, a folder, a hub id, a `state_dict` or an `nn.Module`.

`FORMATS` is the table of file formats; `register_format` adds to it. `foreign.py` recognises what is refused.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spectralbasis.checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_TENSORS, AdapterCheckpoint, open_adapter
from spectralbasis.checkpoints.checkpoint import Checkpoint, ModuleCheckpoint, TensorCheckpoint, find_state
from spectralbasis.checkpoints.decoded import decoded
from spectralbasis.checkpoints.foreign import SAFETENSORS_START, recognise_names, refuse_file, refuse_state
from spectralbasis.checkpoints.gguf_file import open_gguf_file
from spectralbasis.checkpoints.llama2c_file import open_llama2c_file
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
from spectralbasis.locations import SUFFIXES, check_exist, installed_folder, is_hub_id
from spectralbasis.printable import shortened, warn

Source = str | Path | Mapping[str, Tensor] | nn.Module | Checkpoint
"""What `open_checkpoint` opens."""
Read = Callable[[Path, str, Mapping[str, Any]], Checkpoint | None]
"""(file, how a person named it, the model's config or {}) → the open checkpoint, or None if it is of another format."""


_LONGEST_NAME, _MOST_PARTS = 4096, 100
_DESCRIPTION = ["*.json", "*.txt", "*.model", "tokenizer*"]
_SUBFOLDERS = "*/*"
# What to download, best first, and what not: some models hold each weight once more, under Mistral's names.
_PREFERRED = (
    ("*.safetensors", (_SUBFOLDERS, "consolidated*")),
    ("*.bin", (_SUBFOLDERS, "consolidated*")),
    ("consolidated*.safetensors", (_SUBFOLDERS,)),
)


@dataclass(frozen=True)
class Format:
    """One format of files of tensors.

    Attributes:
        name: as messages list it: "safetensors".
        suffixes: of its files, with the dot; a folder's files are found by them too.
        read: opens a file without reading its tensors.
        start: regular expression of a file's first 16 bytes, by which it is known whatever its suffix; empty for none.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Read
    start: bytes = b""

    def starts(self, start: bytes) -> bool:
        """Whether a file that starts so may be of this format."""
        return bool(self.start) and re.match(self.start, start, re.DOTALL) is not None


def _read_safetensors(path: Path, source: str, config: Mapping[str, Any]) -> Checkpoint:
    with path.open("rb") as file:
        start = file.read(_START)
    # The length of a header may begin as other formats do; torch.load, too, goes by this suffix.
    if not SAFETENSORS_START.match(start) and _TORCH.starts(start):
        raise InputError(f"{path} is a file of torch.save under another suffix; rename it to {path.stem}.bin")
    return SafetensorsFile(path, source, config)


_START = 16
_SAFETENSORS = Format("safetensors", (".safetensors",), _read_safetensors, SAFETENSORS_START.pattern)
_TORCH = Format("torch.save", (".pt", ".pth", ".bin", ".ckpt", ".tar"), open_torch_file, rb"PK\x03\x04|\x80\x02")
_GGUF = Format("GGUF", (".gguf",), open_gguf_file, b"GGUF")
_BUILT_IN = (_SAFETENSORS, Format("llama2.c", (".bin",), open_llama2c_file), _TORCH, _GGUF)
FORMATS: list[Format] = list(_BUILT_IN)
"""What is read, in the order in which it is tried."""


def register_format(form: Format) -> None:
    """Make a format of files readable by `open_checkpoint`; it is tried before all others, by its suffixes and start.

    Examples:
        >>> import numpy, torch
        >>> from spectralbasis.checkpoints.checkpoint import TensorCheckpoint
        >>> def read(path, source, config):
        ...     arrays = numpy.load(path, allow_pickle=False)
        ...     tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        ...     return TensorCheckpoint(tensors, source, config)
        >>> register_format(Format("NumPy", (".npz",), read))
        >>> numpy.savez("weights.npz", **{"layer.weight": numpy.eye(2)})
        >>> open_checkpoint("weights.npz").names()
        ('layer.weight',)
    """
    FORMATS.insert(0, form)
    SUFFIXES.update(form.suffixes)


def _suffixes() -> tuple[str, ...]:
    return tuple(suffix for form in FORMATS for suffix in form.suffixes)


def open_checkpoint(source: Source, base: Source | None = None, *, partial: bool = False) -> Checkpoint:
    """Open weights without reading them.

    Args:
        source: a file (safetensors, GGUF, llama2.c, or a torch pickle, which is never run; an adapter's file of
            tensors stands for its folder), a folder (single file, shards, or a PEFT adapter over its base), a hub id
            (`name` or `organisation/name`, where no such path exists; the only case in which anything is downloaded),
            a `state_dict`, an `nn.Module`, or an open checkpoint, which is returned as it is.
        base: what an adapter is read over, in place of the base that its `base_model_name_or_path` names: the base
            that a person gives is the base. Without meaning where `source` is no adapter. An adapter cannot be another
            one's base, so where `base` is one, `source` is read over the base that it names itself.
        partial: read an adapter also where the base lacks some of what it adapts.

    Raises:
        InputError: the source does not exist, is damaged, is unsafe to read or is no checkpoint, does not fit the
            base, or is of a kind that is not read (see `foreign.py`), such as the state of an adapter that was not
            merged.

    Examples:
        >>> import torch
        >>> from spectralbasis import open_checkpoint
        >>> checkpoint = open_checkpoint({"layer.0.weight": torch.eye(3), "layer.0.bias": torch.zeros(3)})
        >>> checkpoint.names(), checkpoint.shape("layer.0.weight")
        (('layer.0.weight', 'layer.0.bias'), (3, 3))
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, nn.Module):
        return _decoded_whole(ModuleCheckpoint(source))
    if isinstance(source, Mapping):
        return _decoded_whole(TensorCheckpoint(find_state(source, "state_dict"), "state_dict", {}))
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
    found = _open_file(path, str(path), {}, by_name=False)
    _refuse_names(found)
    return found


def _open_path(source: str, base: Source | None = None, *, partial: bool = False) -> Checkpoint:
    path = installed_folder(source) or Path(source)
    if path.is_dir():
        return _open_folder(path, source, base, partial)
    if path.is_file():
        if path.name in ADAPTER_TENSORS and (path.parent / ADAPTER_CONFIG).exists():
            return _open_adapter(path.parent, source, base, partial, path.name)
        config: Mapping[str, Any] = {}
        try:
            config = read_config(path.parent)
        except InputError as error:
            warn(f"{path} is read without its config, by which fused matrices are told apart: {error}", stacklevel=3)
        return _decoded_whole(_open_weights(path, source, config))
    if not path.exists() and is_hub_id(source):
        return _open_folder(download(source), source, base, partial)
    index = path.with_name(f"{path.name}.index")
    if path.name and index.is_file():  # TensorFlow names a checkpoint by what its files' names have in common
        refuse_file(index)
    check_exist([source])
    raise InputError(f"{source} is neither a file nor a folder; pass a file, a folder or a hub id")


def _open_folder(folder: Path, source: str, base: Source | None, partial: bool) -> Checkpoint:
    if (folder / ADAPTER_CONFIG).exists():
        return _open_adapter(folder, source, base, partial)
    config = read_config(folder)
    named = config.get("transformers_weights")  # which transformers reads in place of the usual file
    if named is not None:
        files: tuple[Path, ...] = (inside(folder, str(named), folder / "config.json"),)
    else:
        files = weights_files(folder, _suffixes())
    if len(files) == 1:
        return _decoded_whole(_open_weights(files[0], source, config))
    opened = {file: _open_weights(file, str(file), config) for file in files}
    return _decoded_whole(join_loose_shards(opened, source, config))


def _open_adapter(folder: Path, source: str, base: Source | None, partial: bool, file: str | None = None) -> Checkpoint:
    given = None if base is None else open_checkpoint(base)
    over = None if isinstance(given, AdapterCheckpoint) else given
    return open_adapter(folder, source, open_tensors, _open_path, over, file, partial=partial)


def _open_weights(path: Path, source: str, config: Mapping[str, Any]) -> Checkpoint:
    """One file of tensors, or all shards of an index."""
    if not is_index(path.name):
        return _open_file(path, source, config)
    refuse_file(path)
    located = read_index(path)
    opened = {shard: _open_file(shard, str(shard), config) for shard in dict.fromkeys(located.values())}
    return join_shards(located, opened, source, config)


def _open_file(path: Path, source: str, config: Mapping[str, Any], *, by_name: bool = True) -> Checkpoint:
    """One file of tensors, by its first bytes and, where these do not tell, by its suffix.

    Args:
        by_name: whether the name alone can show that it is of a kind that is not read.
    """
    with path.open("rb") as file:
        start = file.read(_START)
    fitting = [form for form in FORMATS if path.suffix in form.suffixes or form.starts(start)]
    added = [form for form in fitting if form not in _BUILT_IN]
    certain = [form for form in (_SAFETENSORS, _GGUF) if form in fitting and form.starts(start)]
    for form in added:
        if (found := form.read(path, source, config)) is not None:
            return found
    if not certain:
        refuse_file(path, by_name)
    for form in certain or [one for one in fitting if one not in added]:
        if (found := form.read(path, source, config)) is not None:
            return found
    known = ", ".join(f"{form.name} ({', '.join(form.suffixes)})" for form in FORMATS)
    raise InputError(
        f"{path} has an unknown format (its suffix is {path.suffix or 'missing'}, and it starts with {start[:8]!r}); "
        f"expected {known} or the .index.json of shards"
    )


def _decoded_whole(checkpoint: Checkpoint) -> Checkpoint:
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
                f"{checkpoint.source} holds a tensor whose name, {shortened(name, 60)}, is not valid Unicode; rename it"
            )


def download(hub_id: str) -> Path:
    """Local folder with a hub model's safetensors, its pickles where it has none, or else Mistral's own file.

    With `HF_HUB_OFFLINE` set, only the local cache is looked at.

    Raises:
        InputError: the model is unknown, not accessible, or not in the cache while offline, or all of its weights are
            of a kind that is not read.
    """
    from huggingface_hub import constants, list_repo_files

    for pattern, ignored in _PREFERRED:
        folder = _snapshot(hub_id, [*_DESCRIPTION, pattern], ignored)
        if next(folder.glob(pattern), None) is not None:
            return folder
    names: list[str] = []
    if not constants.HF_HUB_OFFLINE:
        with suppress(Exception):  # the list only makes a message better; what is wrong with the model was said above
            names = [name for name in list_repo_files(hub_id) if "/" not in name]
    quantized = [name for name in names if name.lower().endswith(".gguf")]
    if quantized:
        raise InputError(
            f"{hub_id} on the hub holds GGUF files ({', '.join(quantized[:4])}{', …' if len(quantized) > 4 else ''}) "
            f"and no other weights; download one (hf download {hub_id} {quantized[0]} --local-dir .) and pass its path"
        )
    other = recognise_names(Path(hub_id), names)
    if other is not None:
        raise InputError(f"{hub_id} on the hub holds no weights that are read: {other}")
    return folder


def _snapshot(hub_id: str, patterns: list[str], ignored: Sequence[str]) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=list(ignored)))
    except Exception as error:  # the network stack below differs by version and raises its own kinds
        cause = str(error).strip().partition("\n")[0].rstrip(". ")
        if constants.HF_HUB_OFFLINE:
            cause = "HF_HUB_OFFLINE is set and the model is not in the local cache; unset it to download the model"
        raise InputError(
            f"{hub_id} is neither a file nor a folder here, and it cannot be downloaded as a hub id: {cause}. "
            f"Check the spelling, the network and your access to the model, or pass a local path"
        ) from error
