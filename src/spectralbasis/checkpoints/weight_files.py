"""The weight files of a checkpoint: safetensors, shards with or without an index, and the choice in a folder.

A file that another file or a link names is read only if it lies in the folder (`inside`). Tensors are read, not mapped,
so that large files work under an address-space limit and single rows can be read cheaply in any order.
"""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from typing_extensions import TypedDict

from spectralbasis.checkpoints.checkpoint import Checkpoint, View
from spectralbasis.checkpoints.foreign import recognise_folder, recognise_names
from spectralbasis.errors import InputError
from spectralbasis.printable import shortened
from spectralbasis.records import checked, parse_json, read_record
from spectralbasis.sizes import check_memory

_STANDARD_NAMES = tuple(
    name + suffix
    for name in ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors",
                 "diffusion_pytorch_model.bin")
    for suffix in ("", ".index.json")
)  # fmt: skip
_STANDARD_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")
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
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PACKED = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits of what torch cannot represent."""
_LENGTH = 8
_LONGEST_HEADER = 100_000_000  # as the library of the format has it


def is_index(name: str) -> bool:
    """Whether a file's name is that of the index of shards, of a variant (`.index.fp16.json`) too."""
    return _INDEX.fullmatch(name) is not None


def weights_files(folder: Path, suffixes: Sequence[str]) -> tuple[Path, ...]:
    """The file of weights that stands for a folder, or the index of its shards, or all shards where that is missing.

    The names that `save_pretrained` writes come first, safetensors before pickles; then any single file of weights.

    Args:
        folder: of the checkpoint.
        suffixes: of files of weights, the preferred one first.

    Raises:
        InputError: there is none, there are several of equal standing, or a shard is missing.
    """
    for name in _STANDARD_NAMES:
        if (folder / name).exists():
            return (inside(folder, name),)
    for pattern in (f"*{suffix}{rest}" for suffix in dict.fromkeys(suffixes) for rest in (".index*.json", "")):
        found = sorted(path.name for path in folder.glob(pattern) if not path.name.startswith((".", *_NOT_WEIGHTS)))
        chosen = _shards(folder, found) or found
        if len(chosen) == 1 or (chosen and chosen is not found):
            return tuple(inside(folder, name) for name in chosen)
        if found:
            raise InputError(
                recognise_folder(folder, without_weights=False)
                or f"{folder} holds several files of weights ({_listed(found)}); pass the right one"
            )
    if (other := recognise_folder(folder, without_weights=True)) is not None:
        raise InputError(other)
    if (other := recognise_names(folder, (path.name for path in folder.iterdir() if path.is_file()))) is not None:
        raise InputError(f"{folder} holds no weights that are read: {other}")
    nested = {path.parent for name in (*_STANDARD_NAMES, "adapter_config.json") for path in folder.glob(f"*/{name}")}
    hint = f"; did you mean {_listed(map(str, sorted(nested)))}?" if nested else ""
    raise InputError(
        f"{folder} holds no weights; expected model.safetensors, pytorch_model.bin, shards with their index, "
        f"or one other file of weights ({', '.join(dict.fromkeys(suffixes))}){hint}"
    )


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
        raise InputError(f"{culprit}, which cannot be followed ({error}); put the file into {folder}") from error
    if not place.is_relative_to(root):
        raise InputError(f"{culprit}, which leads out of {folder}; that is refused, so put the file into the folder")
    if path.is_symlink() and not path.exists():
        raise InputError(f"{culprit}, whose target does not exist; put the file into {folder}")
    if kind != stat.S_IFREG:
        raise InputError(f"{path} is not a regular file; restore it from the original")
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


class ShardedCheckpoint(View):
    """Several single-file checkpoints behind one set of names."""

    def __init__(self, shards: Mapping[str, Checkpoint], source: str, config: Mapping[str, Any]) -> None:
        self.source = source
        self.config = config
        self._shards = dict(shards)

    def names(self) -> tuple[str, ...]:
        return tuple(self._shards)

    def _place(self, name: str) -> tuple[Checkpoint, str]:
        return self._shards[name], name


def read_index(index: Path) -> dict[str, Path]:
    """Tensor name to shard, from a `*.index.json`; every shard exists and lies in the index's folder.

    Raises:
        InputError: the JSON is damaged, has no `weight_map`, or names a shard that is missing, elsewhere or an index.
    """
    weight_map = read_record(index, dict[str, Any]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map; expected the index that save_pretrained writes beside its shards")
    strangers = [file for file in weight_map.values() if not isinstance(file, str)]
    if strangers:
        raise InputError(
            f"{index} names {strangers[0]!r} as a shard, expected a file name; restore it from the original"
        )
    shards: dict[str, Path] = {}
    for file in dict.fromkeys(weight_map.values()):
        shards[file] = inside(index.parent, file, index)
        if not shards[file].is_file():
            raise InputError(
                f"{index} names the shard {file}, which is missing; copy or download it into {index.parent}"
            )
    nested = next((path.name for path in shards.values() if is_index(path.name)), None)
    if nested is not None:
        raise InputError(f"{index} names {nested} as a shard, which is an index; restore it from the original")
    return {name: shards[file] for name, file in weight_map.items()}


def join_shards(
    located: Mapping[str, Path], opened: Mapping[Path, Checkpoint], source: str, config: Mapping[str, Any]
) -> ShardedCheckpoint:
    """One checkpoint from an index and its opened shards.

    A tensor that a shard holds and the index leaves out belongs to the model: transformers reads whole shards.

    Raises:
        InputError: a shard lacks a tensor that the index places there, or two shards hold a tensor of one name, of
            which one library reads this and another one that.
    """
    found, held = dict(located), {path: frozenset(shard.names()) for path, shard in opened.items()}
    for name, path in located.items():
        if name not in held[path]:
            raise InputError(f"the index of {source} places {name} in {path.name}, which lacks it; download both again")
    for path, shard in opened.items():
        for name in shard.names():
            if found.setdefault(name, path) != path:
                raise InputError(
                    f"both {found[name].name} and {path.name} of {source} hold {name}; download the index and the "
                    f"shards again, or save the model again"
                )
    return ShardedCheckpoint({name: opened[path] for name, path in found.items()}, source, config)


def join_loose_shards(opened: Mapping[Path, Checkpoint], source: str, config: Mapping[str, Any]) -> ShardedCheckpoint:
    """One checkpoint from all shards of a set whose index is missing.

    Raises:
        InputError: two shards hold a tensor of one name.
    """
    located: dict[str, Path] = {}
    for path, shard in opened.items():
        for name in shard.names():
            if name in located:
                raise InputError(
                    f"{source} has no index of its shards, and both {located[name].name} and {path.name} hold {name}; "
                    f"restore the .index.json from the original checkpoint"
                )
            located[name] = path
    return ShardedCheckpoint({name: opened[path] for name, path in located.items()}, source, config)


class _Described(TypedDict):
    """What a header says of one tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class _Entry:
    """One tensor: its type as torch and as the file names it, its shape, and where its bytes start in the file."""

    dtype: torch.dtype
    named: str
    shape: tuple[int, ...]
    start: int


class SafetensorsFile(Checkpoint):
    """Reads the header once, when opened; each read takes the tensor's own bytes, and the file does not stay mapped.

    Attributes:
        path: the file.

    Raises:
        InputError: the file is missing, cut short or no safetensors file.
    """

    def __init__(self, path: Path, source: str, config: Mapping[str, Any]) -> None:
        self.source = source
        self.config = config
        self.path = path
        try:
            self._entries = _read_header(path)
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read as safetensors ({error}); it may be cut short or damaged, "
                f"so compare its size with the original's and copy or download it again"
            ) from error

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def read(self, name: str) -> Tensor:
        return self._read(name, self._entries[name].start, self._entries[name].shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        entry = self._entries[name]
        start, stop, _ = slice(start, stop).indices(entry.shape[0])
        inner = entry.shape[1:]
        offset = entry.start + start * prod(inner) * entry.dtype.itemsize
        return self._read(name, offset, (max(stop - start, 0), *inner))

    def take_rows(self, name: str, rows: Tensor, width: int) -> Tensor:
        entry = self._known(name)
        return take_rows(self.path, entry.start, rows, width, entry.dtype)

    def holds_rows(self, name: str) -> bool:
        return name in self._entries

    def alone(self, name: str) -> "SafetensorsFile":
        found = copy(self)
        found.path = self.path.absolute()
        found._entries = {name: self._entries[name]}
        found.config = {}
        return found

    def evidence(self, name: str) -> str:
        entry = self._entries[name]
        return sample(self.path, entry.start, prod(entry.shape) * entry.dtype.itemsize)

    def _read(self, name: str, offset: int, shape: tuple[int, ...]) -> Tensor:
        return read_tensor(self.path, offset, shape, self._known(name).dtype)

    def _known(self, name: str) -> _Entry:
        entry = self._entries[name]
        if entry.named not in _DTYPES:
            raise InputError(f"{name} of {self.path} has the type {entry.named}, which torch cannot represent")
        return entry


def _read_header(path: Path) -> dict[str, _Entry]:
    """Every tensor by its name, once it is certain that they fill the file one after the other.

    The file is not mapped, which a limit of the address space would forbid a large one.

    Raises:
        ValueError: the header is cut short or damaged, or is not that of this file.
    """
    with path.open("rb") as file:
        held = path.stat().st_size - _LENGTH
        length = int.from_bytes(file.read(_LENGTH), "little")
        if not 2 <= length <= min(held, _LONGEST_HEADER):
            raise ValueError(f"its header claims {length} bytes of {max(held, 0)}")
        header = parse_json(file.read(length), f"the header of {path}")
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    described = checked(header, dict[str, _Described], f"the header of {path}")
    if described.keys() != header.keys():
        raise ValueError("the name of a tensor is not valid Unicode")
    ends = 0
    for name, one in sorted(described.items(), key=lambda item: item[1]["data_offsets"]):
        kind, shape, (start, stop) = one["dtype"], one["shape"], one["data_offsets"]
        bits = _DTYPES[kind].itemsize * 8 if kind in _DTYPES else _PACKED.get(kind)
        if bits is None or min(shape, default=0) < 0 or prod(shape) * bits % 8:
            raise ValueError(f"{shortened(name, 80)} has the type {shortened(kind, 40)} and the shape {shape[:9]}")
        if start != ends or stop - start != prod(shape) * bits // 8:
            raise ValueError(f"{shortened(name, 80)} claims the bytes {start} to {stop}, which do not fit its shape")
        ends = stop
    if ends != held - length:
        raise ValueError(f"its tensors take {ends} bytes, and the file holds {held - length}")
    data = _LENGTH + length
    return {
        # Types that torch has no name for (packed 4- and 6-bit floats) are bytes to us, as other quantized weights are.
        name: _Entry(
            dtype=_DTYPES.get(described[name]["dtype"], torch.uint8),
            named=described[name]["dtype"],
            shape=tuple(described[name]["shape"]),
            start=data + described[name]["data_offsets"][0],
        )
        for name in header
    }


Run = tuple[int, int]
"""Where consecutive bytes begin in a file, and how many they are."""

SAMPLES, PIECE = 16, 4096


def read_tensor(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor whose bytes start at `offset`, copied so that the file need not stay open or mapped.

    Raises:
        InputError: the file is gone, cannot be read, or ends before the tensor does, or the memory is too small.
    """
    return _read_runs(path, [(offset, prod(shape) * dtype.itemsize)], shape, dtype)


def take_rows(path: Path, offset: int, rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Some rows of the matrix whose bytes start at `offset`, (count, width), read in the order given.

    Args:
        path: the file.
        offset: where row 0 starts.
        rows: their numbers, (count,) int64; rows that follow each other are read at once.
        width: entries of a row.
        dtype: of an entry.

    Raises:
        InputError: as `read_tensor` does.
    """
    numbers, size = rows.numpy(), width * dtype.itemsize
    starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
    lengths = np.diff(starts, append=len(numbers))
    runs = zip((offset + numbers[starts] * size).tolist(), (lengths * size).tolist(), strict=True)
    return _read_runs(path, list(runs), (len(numbers), width), dtype)


def _read_runs(path: Path, runs: Sequence[Run], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The bytes of all runs, one after the other, as a tensor."""
    count = prod(shape) * dtype.itemsize
    check_memory(count, f"reading {'×'.join(map(str, shape))} values of {path}")
    data = bytearray(count)
    if not data:
        return torch.empty(shape, dtype=dtype)
    view, filled = memoryview(data), 0
    try:
        with path.open("rb", buffering=0) as file:
            for offset, size in runs:
                file.seek(offset)
                end = filled + size
                while filled < end and (count := file.readinto(view[filled:end])):  # one call reads 2 GB at most
                    filled += count
                if filled < end:
                    raise InputError(f"{path} has become shorter since it was opened; copy or download it again")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def sample(path: Path, offset: int, count: int) -> str:
    """Hash of a file's size and of `SAMPLES` short pieces, evenly spread over `count` bytes from `offset` on.

    Raises:
        InputError: the file is gone or cannot be read.
    """
    try:
        digest = xxhash.xxh3_128(str(path.stat().st_size).encode())
        with path.open("rb", buffering=0) as file:
            for number in range(SAMPLES):
                file.seek(offset + max(count - PIECE, 0) * number // (SAMPLES - 1))
                digest.update(file.read(min(PIECE, count)))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
