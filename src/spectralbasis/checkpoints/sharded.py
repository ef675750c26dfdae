"""Weights spread over several files with an index that says which tensor lies where."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.folder_files import inside
from spectralbasis.errors import InputError
from spectralbasis.records import read_record


class ShardedCheckpoint(Checkpoint):
    """Several single-file checkpoints behind one set of names."""

    def __init__(self, shards: Mapping[str, Checkpoint], source: str, config: Mapping[str, Any]) -> None:
        self.source = source
        self.config = config
        self._shards = dict(shards)

    def names(self) -> tuple[str, ...]:
        return tuple(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shards[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._shards[name].dtype(name)

    def read(self, name: str) -> Tensor:
        return self._shards[name].read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._shards[name].read_rows(name, start, stop)

    def take_rows(self, name: str, rows: Tensor, width: int) -> Tensor:
        return self._shards[name].take_rows(name, rows, width)

    def holds_rows(self, name: str) -> bool:
        return self._shards[name].holds_rows(name)

    def alone(self, name: str) -> Checkpoint | None:
        return self._shards[name].alone(name)

    def unreadable(self, name: str) -> str | None:
        return self._shards[name].unreadable(name)


def read_index(index: Path) -> dict[str, Path]:
    """Tensor name to shard, from a `*.index.json`; every shard exists and lies in the index's folder.

    Raises:
        InputError: the JSON is damaged, has no `weight_map`, or names a shard that is missing or elsewhere.
    """
    weight_map = read_record(index, dict[str, Any]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map; expected the index that save_pretrained writes beside its shards")
    strangers = [file for file in weight_map.values() if not isinstance(file, str)]
    if strangers:
        raise InputError(
            f"{index} names {strangers[0]!r} as a shard, expected a file name; restore it from the original"
        )
    shards = {file: _shard(index, file) for file in dict.fromkeys(weight_map.values())}
    return {name: shards[file] for name, file in weight_map.items()}


def _shard(index: Path, file: str) -> Path:
    path = inside(index.parent, file, index)
    if not path.is_file():
        raise InputError(f"{index} names the shard {file}, which is missing; copy or download it into {index.parent}")
    return path


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
