"""A spectral adapter and its base as one plain checkpoint."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from spectralbasis.checkpoints.adapter import AdapterCheckpoint, adapted_name
from spectralbasis.checkpoints.folder_files import inside
from spectralbasis.checkpoints.hub import download, is_hub_id
from spectralbasis.checkpoints.installed import installed_folder
from spectralbasis.checkpoints.opening import Source
from spectralbasis.coefficients.adapters import COEFFICIENTS, open_spectral_adapter
from spectralbasis.coefficients.architectures import merged_config
from spectralbasis.folders import atomic_folder, check_output

LARGEST_SHARD = 5 * 10**9
"""Bytes of weights in one file."""
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "generation_config.json",
)
# PEFT saves these beside a retrained module when biases are trained; the module itself is there under its own name.
_COPIES = (".modules_to_save.", ".original_module.")


@dataclass(frozen=True)
class MergedExport:
    """What was written.

    Attributes:
        output: the checkpoint's folder.
        tensors: how many it holds.
        changed: how many of them the adapter changed, and how many it brought (`added`).
        added: see there.
        files: names of the files of weights.
        bytes: of all weights.
    """

    output: Path
    tensors: int
    changed: int
    added: int
    files: list[str]
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return asdict(self) | {"output": str(self.output)}


def export_merged(
    adapter: str | Path, output: str | Path, *, base: Source | None = None, overwrite: bool = False
) -> MergedExport:
    """Write base and adapter as one checkpoint that transformers opens without PEFT and without this package.

    Weights have the dtype of the base, one file of weights is in memory at a time, and the config, with the adapter's
    class and number of labels, and the tokenizer lie beside them.

    Args:
        adapter: folder of a spectral adapter.
        output: a new folder.
        base: the model that it was trained on; None opens the one that the adapter names.
        overwrite: replace a checkpoint that is in `output`.

    Raises:
        InputError: the adapter or the base cannot be read, or the output is in use.
        BaseMismatchError: the base is not the one that the adapter was trained on.
    """
    check_output(Path(output), overwrite=overwrite, written_file="config.json")
    opened = open_spectral_adapter(adapter, base)
    names = _names(opened)
    shards = _shards(opened, list(names.values()))
    with atomic_folder(Path(output)) as folder:
        files = _write_weights(folder, opened, names, shards)
        added = {name: opened.shape(stored) for name, stored in names.items() if stored not in opened.base.names()}
        config = merged_config(opened.base.config, opened.adapter.config, added)
        if config:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for source in (_folder(opened.base.source), Path(adapter)):
            _copy_companions(source, folder)
    return MergedExport(
        output=Path(output),
        tensors=len(names),
        changed=len(opened.edits),
        added=len(added),
        files=files,
        bytes=sum(_size(opened, stored) for stored in names.values()),
    )


def _names(opened: AdapterCheckpoint) -> dict[str, str]:
    """Name in the merged checkpoint → name in the opened one. What the adapter's class nests is nested here too."""
    tied = opened.tied()
    prefix = _prefix(opened)
    kept = [name for name in opened.names() if name not in tied and not any(part in name for part in _COPIES)]
    of_base = set(opened.base.names())
    return {f"{prefix}{name}" if name in of_base and not name.startswith(prefix) else name: name for name in kept}


def _prefix(opened: AdapterCheckpoint) -> str:
    """What the adapter's model puts before the names of the base, such as "bert."; empty where it puts nothing."""
    for tensor, edit in opened.edits.items():
        module = adapted_name(str(vars(edit)["coefficients"])).partition(COEFFICIENTS)[0]
        parameter = f"{module}.weight"
        return parameter.removesuffix(tensor) if parameter.endswith(f".{tensor}") else ""
    return ""


def _dtype(opened: AdapterCheckpoint, stored: str) -> torch.dtype:
    """The base's: of this tensor, or of the weights where the adapter brings it."""
    if stored in opened.base.names():
        return opened.base.dtype(stored)
    return opened.base.dtype(next(iter(opened.edits)))


def _size(opened: AdapterCheckpoint, stored: str) -> int:
    return prod(opened.shape(stored)) * _dtype(opened, stored).itemsize


def _shards(opened: AdapterCheckpoint, stored: Sequence[str]) -> list[int]:
    """The shard of each tensor: in order, each filled up to `LARGEST_SHARD`."""
    found, shard, filled = [], 0, 0
    for name in stored:
        size = _size(opened, name)
        if filled and filled + size > LARGEST_SHARD:
            shard, filled = shard + 1, 0
        found.append(shard)
        filled += size
    return found


def _write_weights(
    folder: Path, opened: AdapterCheckpoint, names: Mapping[str, str], shards: Sequence[int]
) -> list[str]:
    count = shards[-1] + 1
    files = [f"model-{shard + 1:05d}-of-{count:05d}.safetensors" for shard in range(count)]
    files = files if count > 1 else ["model.safetensors"]
    for shard, file in enumerate(files):
        of_shard = [name for name, number in zip(names, shards, strict=True) if number == shard]
        tensors = {name: _read(opened, names[name]) for name in of_shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if count > 1:
        located = {name: files[shard] for name, shard in zip(names, shards, strict=True)}
        total = sum(_size(opened, stored) for stored in names.values())
        index = {"metadata": {"total_size": total}, "weight_map": located}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _read(opened: AdapterCheckpoint, stored: str) -> Tensor:
    return opened.read(stored).to(_dtype(opened, stored)).clone(memory_format=torch.contiguous_format)


def _folder(source: str) -> Path | None:
    """The folder of a checkpoint, None where it has none."""
    path = installed_folder(source) or Path(source)
    if path.is_dir():
        return path
    return download(source) if not path.exists() and is_hub_id(source) and "/" in source else None


def _copy_companions(source: Path | None, folder: Path) -> None:
    for name in _COMPANIONS:
        if source is not None and (source / name).is_file():
            shutil.copyfile(inside(source, name), folder / name)
