"""Export a spectral adapter with its base as one plain checkpoint."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from spectralbasis.checkpoints import Checkpoint
from spectralbasis.checkpoints.adapters import (
    AdapterCheckpoint,
    is_output_head,
    ties_head,
    vocabulary_table,
)
from spectralbasis.checkpoints.decoded import DecodedCheckpoint
from spectralbasis.checkpoints.matrices import is_embedding_table
from spectralbasis.checkpoints.opening import Source, download, open_checkpoint
from spectralbasis.checkpoints.weight_files import SafetensorsFile, inside
from spectralbasis.coefficients.architectures import (
    check_opens,
    find_ties,
    merged_config,
    untied,
    with_dtype,
    with_vocabulary,
)
from spectralbasis.coefficients.spectral_adapters import open_spectral_adapter
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_folder, check_output
from spectralbasis.locations import installed_folder, is_hub_id
from spectralbasis.tuner.reading import SpectralEdit

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
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class MergedExport:
    """What was written, and how it was checked.

    Attributes:
        output: the checkpoint's folder.
        tensors: how many it holds.
        changed: how many of them the adapter changed, and how many it brought (`added`).
        added: see there.
        files: names of the files of weights.
        bytes: of all weights.
        largest_rounding: how far any written number is from the one that was computed, which is wider; 0 where the base
            is in float32.
        notes: sentences that a person should read, such as what was left out of the adapter.
    """

    output: Path
    tensors: int
    changed: int
    added: int
    files: list[str]
    bytes: int
    largest_rounding: float
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return asdict(self) | {"output": str(self.output)}


class _Part(NamedTuple):
    """One tensor of the merged checkpoint: its name there, and where it is read."""

    name: str
    holder: Checkpoint
    stored: str
    dtype: torch.dtype
    changed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.holder.shape(self.stored)

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * self.dtype.itemsize


def export_merged(
    adapter: str | Path,
    output: str | Path,
    *,
    base: Source | None = None,
    partial: bool = False,
    overwrite: bool = False,
) -> MergedExport:
    """Write base and adapter as one checkpoint that transformers opens without PEFT and without this package.

    The weights are those of PEFT's `merge_and_unload()`, in the dtype of the base. One file of weights is in memory at
    a time. The tokenizer and the config lie beside them; the config has the adapter's class, its number of labels, the
    size of its vocabulary, and says whether the head is still tied to the embedding table. A base that only the adapter
    names gives its tokenizer too, since by then its weights have the hashes that the adapter records.

    The folder takes its place after every tensor was read back and compared with what it should be, and after
    transformers, where it knows the architecture, has found every parameter in it.

    Examples:
        >>> import copy, tempfile
        >>> from pathlib import Path
        >>> import peft, torch
        >>> import spectralbasis as sb
        >>> folder, base = Path(tempfile.mkdtemp()), torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> config = sb.SpectralConfig(target_modules=["0"], leading=3, init_weights=False)
        >>> peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(folder / "task")
        >>> written = sb.export_merged(folder / "task", folder / "merged", base=base)
        >>> written.tensors, written.changed, written.files
        (2, 1, ['model.safetensors'])

    Args:
        adapter: folder of a spectral adapter.
        output: a new folder.
        base: the model that it was trained on; None opens the one that the adapter names.
        partial: leave out what the adapter adapts and the base lacks, instead of refusing the adapter.
        overwrite: replace a checkpoint that is in `output`.

    Raises:
        InputError: the adapter or the base cannot be read, they do not fit, the output is in use, or what was written
            is not what it should be.
        BaseMismatchError: the base is not the one that the adapter was trained on.
    """
    check_output(Path(output), overwrite=overwrite)
    opened = open_spectral_adapter(adapter, base, partial=partial)
    _refuse_quantized(opened.base)
    parts, config, notes = _configured(opened, _parts(opened))
    notes += _checked_by_transformers(opened, parts, config)
    if opened.missing:
        notes.append(f"left out, since the base lacks them: {', '.join(opened.missing)}")
    with atomic_folder(Path(output)) as folder:
        files, rounding = _write_weights(folder, parts)
        if config:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for source in (_folder(opened.base.source), Path(adapter)):
            _copy_companions(source, folder)
        _check_names(folder, parts)
    added = _added(opened, parts)
    return MergedExport(
        output=Path(output),
        tensors=len(parts),
        changed=sum(part.changed for part in parts) - len(added),
        added=len(added),
        files=files,
        bytes=sum(part.size for part in parts),
        largest_rounding=rounding,
        notes=notes,
    )


def _refuse_quantized(base: Checkpoint) -> None:
    if base.config.get("quantization_config"):
        method = base.config["quantization_config"].get("quant_method", "an unnamed method")
        raise InputError(
            f"the base {base.source} is quantized ({method}), and an update would be rounded to its bits; "
            f"give the checkpoint that it was quantized from as the base"
        )


def _parts(opened: AdapterCheckpoint) -> list[_Part]:
    """In order. What the adapter's class nests is nested here too; what the base stores encoded stays so."""
    tied, prefix, base = opened.tied(), _prefix(opened), opened.base
    of_base = set(base.names())
    usual = opened.start.dtype(min(opened.edits, key=lambda name: name not in of_base))
    found = []
    for name in opened.names():
        own, changed = name in of_base, name in opened.edits or name in opened.start.stored
        inner = prefix if own and not name.startswith(prefix) else ""
        if name in tied:
            continue
        if isinstance(base, DecodedCheckpoint) and own and not changed and base.parts(name) != (name,):
            stored = base.stored
            found += [_Part(f"{inner}{one}", stored, one, stored.dtype(one), False) for one in base.parts(name)]
        else:
            dtype = base.dtype(name) if own else usual
            found.append(_Part(f"{inner}{name}", opened if changed else base, name, dtype, changed))
    return found


def _prefix(opened: AdapterCheckpoint) -> str:
    """What the adapter's model puts before the names of the base, such as "bert."; empty where it puts nothing."""
    of_base = set(opened.base.names())
    for tensor, edit in opened.updates.items():
        if tensor in of_base and isinstance(edit, SpectralEdit):
            parameter = f"{edit.module}.weight"
            return parameter.removesuffix(tensor) if parameter.endswith(f".{tensor}") else ""
    return ""


def _added(opened: AdapterCheckpoint, parts: Sequence[_Part]) -> dict[str, tuple[int, ...]]:
    of_base = set(opened.base.names())
    return {part.name: part.shape for part in parts if part.changed and part.stored not in of_base}


def _resized(opened: AdapterCheckpoint, parts: Sequence[_Part]) -> dict[str, tuple[int, ...]]:
    """Heads that the base has for another number of labels."""
    of_base = set(opened.base.names())
    return {
        part.name: part.shape
        for part in parts
        if part.stored in opened.retrained
        and part.stored in of_base
        and part.shape != opened.base.shape(part.stored)
        and not is_embedding_table(opened.base, part.stored)
    }


def _configured(opened: AdapterCheckpoint, parts: list[_Part]) -> tuple[list[_Part], dict[str, Any], list[str]]:
    """The parts with a head that was trained apart from its table, the config that fits, and notes."""
    config = merged_config(opened.base.config, opened.adapter.config, _added(opened, parts) | _resized(opened, parts))
    if not config:
        return parts, {}, []
    sizes = {(old, part.shape[0]) for part in parts if part.changed and (old := _old_rows(opened, part))}
    if len(sizes) > 1:
        raise InputError(f"the adapter {opened.source} resizes tables of its base to different sizes, {sorted(sizes)}")
    for old, new in sizes:
        config = with_vocabulary(config, old, new)
    sizes_by_dtype = Counter[torch.dtype]()
    for part in parts:
        sizes_by_dtype[part.dtype] += part.size if part.dtype.is_floating_point else 0
    config = with_dtype(config, sizes_by_dtype.most_common(1)[0][0])
    return _with_head(opened, parts, config)


def _old_rows(opened: AdapterCheckpoint, part: _Part) -> int:
    """Rows of a tensor in the base, 0 where they are as many now or where it is not there."""
    if part.stored not in opened.base.names():
        return 0
    old = opened.base.shape(part.stored)
    return old[0] if old and old[0] != part.shape[0] else 0


def _with_head(
    opened: AdapterCheckpoint, parts: list[_Part], config: dict[str, Any]
) -> tuple[list[_Part], dict[str, Any], list[str]]:
    """What becomes of a head that was tied to the embedding table."""
    stored = vocabulary_table(opened.base)
    table = next((part for part in parts if part.stored == stored), None)
    if table is None or stored is None:
        return parts, config, []
    head = next((part for part in parts if part is not table and is_output_head(part.stored)), None)
    if head is not None and head.shape[1:] == table.shape[1:] and head.shape[0] != table.shape[0]:
        raise InputError(
            f"the adapter {opened.source} gives {table.name} {table.shape[0]} rows and {head.name} {head.shape[0]}: "
            f"the vocabulary was resized and one of the two was not saved; save both (modules_to_save)"
        )
    if not ties_head(config):
        return parts, config, []
    alone = stored in opened.retrained or (head is not None and head.stored in opened.retrained)
    if not alone:
        return parts, config, _note_of_tie(opened, table, config)
    if head is not None and head.shape == table.shape and torch.equal(_read(head), _read(table)):
        return [part for part in parts if part is not head], config, []
    partners = _untied_partners(opened, parts, config)
    if head is None and not partners:
        return parts, config, []
    names = " and ".join(part.name for part in ([head] if head else partners) if part.shape == table.shape)
    return [*parts, *partners], untied(config), [f"{names} is no longer tied to {table.name}: they were trained apart"]


def _untied_partners(opened: AdapterCheckpoint, parts: Sequence[_Part], config: dict[str, Any]) -> list[_Part]:
    """What a base need not store as long as it is tied to something that it stores."""
    found, still = [], find_ties(untied(config))
    written = {part.name: part for part in parts}
    of_base = set(opened.base.names())
    for group in find_ties(config).groups:
        source = next((written[name] for name in group if name in written and written[name].stored in of_base), None)
        for name in group:
            if source is not None and name not in written and source.name not in still.tied_to(name):
                found.append(_Part(name, opened.base, source.stored, source.dtype, False))
    return found


def _note_of_tie(opened: AdapterCheckpoint, table: _Part, config: dict[str, Any]) -> list[str]:
    changed = [name for name in opened.updates if name == table.stored or is_output_head(name)]
    tied = [name for name in find_ties(config).table if name != table.name] if changed else []
    if not tied or table.stored not in opened.edits:
        return []
    return [
        f"{table.name} and {', '.join(tied)} are one tensor, which the update of {' and '.join(changed)} changes as a "
        f"whole, as PEFT's merge does; before a merge PEFT changes only the adapted module, so the outputs differ"
    ]


def _checked_by_transformers(opened: AdapterCheckpoint, parts: Sequence[_Part], config: dict[str, Any]) -> list[str]:
    """Notes; raises InputError where transformers would not load these tensors for what they are."""
    if not config:
        return []
    of_base = set(opened.base.names())
    tensors = {part.name: (part.shape, part.dtype) for part in parts}
    note, ties = check_opens(config, tensors, list(_added(opened, parts)))
    written = {part.name: part for part in parts}
    trained = {part.name for part in parts if part.stored in opened.retrained}
    trained |= opened.retrained.keys() - of_base - {part.stored for part in parts}  # left out, being equal to its table
    for group in ties.groups:
        first = next((written[name] for name in group if name in trained and name in written), None)
        others = [name for name in group if first is not None and name not in (first.name, *(trained - written.keys()))]
        for name in others:
            if first is not None and (name not in written or not torch.equal(_read(written[name]), _read(first))):
                raise InputError(
                    f"the adapter retrains {first.name} apart from {name}, which transformers always loads as one "
                    f"tensor, so no checkpoint can hold both; train it without {first.name} in modules_to_save"
                )
    return [note] if note else []


def _read(part: _Part) -> Tensor:
    """As it is written."""
    return part.holder.read(part.stored).to(part.dtype).clone(memory_format=torch.contiguous_format)


def _shards(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """In order, each filled up to `LARGEST_SHARD`."""
    shard: list[_Part] = []
    filled = 0
    for part in parts:
        if shard and filled + part.size > LARGEST_SHARD:
            yield shard
            shard, filled = [], 0
        shard.append(part)
        filled += part.size
    yield shard


def _write_weights(folder: Path, parts: Sequence[_Part]) -> tuple[list[str], float]:
    """Names of the files, and the largest rounding."""
    shards, rounding = list(_shards(parts)), 0.0
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        rounding = max(rounding, _write_shard(folder / file, shard))
    if len(shards) > 1:
        located = {part.name: file for file, shard in zip(files, shards, strict=True) for part in shard}
        index = {"metadata": {"total_size": sum(part.size for part in parts)}, "weight_map": located}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files, rounding


def _write_shard(path: Path, shard: Sequence[_Part]) -> float:
    """Write one file and compare what it holds with what it should; gives the largest rounding."""
    tensors, rounding = {}, 0.0
    for part in shard:
        exact = part.holder.read(part.stored)
        tensors[part.name] = exact.to(part.dtype).clone(memory_format=torch.contiguous_format)
        if exact.dtype != part.dtype:
            rounding = max(rounding, _rounding(exact, tensors[part.name], part))
    save_file(tensors, path, metadata={"format": "pt"})
    written = SafetensorsFile(path, str(path), {})
    for part in shard:
        expected = tensors[part.name] if part.changed else part.holder.read(part.stored)
        if not _same(written.read(part.name), expected):
            raise InputError(
                f"{part.name} differs from what was computed: the disk or the base changed meanwhile; export again"
            )
    return rounding


def _rounding(exact: Tensor, written: Tensor, part: _Part) -> float:
    largest = float((written.to(exact.dtype) - exact).abs().max()) if exact.numel() else 0.0
    if not largest < float("inf") and bool(exact.isfinite().all()):
        raise InputError(
            f"{part.name} of the merged model has numbers of up to {float(exact.abs().max()):.3g}, too large for "
            f"{part.dtype}; give the base in bfloat16 or float32"
        )
    return largest


def _same(written: Tensor, expected: Tensor) -> bool:
    """Bit by bit."""
    if written.dtype != expected.dtype or written.shape != expected.shape:
        return False
    a, b = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (written, expected))
    return torch.equal(a, b)


def _check_names(folder: Path, parts: Sequence[_Part]) -> None:
    """Raise InputError unless the checkpoint, opened as any other, holds each tensor in its shape and dtype."""
    opened = open_checkpoint(folder)
    stored = opened.stored if isinstance(opened, DecodedCheckpoint) else opened
    expected = {part.name: (part.shape, part.dtype) for part in parts}
    found = {name: (stored.shape(name), stored.dtype(name)) for name in stored.names()}
    if found != expected:
        name = next(name for name in {**expected, **found} if found.get(name) != expected.get(name))
        raise InputError(
            f"{name} of the merged model is {found.get(name)}, expected {expected.get(name)}; export again"
        )


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
