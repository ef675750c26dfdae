"""A bank's file: a safetensors file of one tensor, `numbers` (tasks, width), whose metadata says what they are."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from spectralbasis.coefficients.bank_layout import BankLayout, HeadShape
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path
from spectralbasis.tuner.config import SpectralConfig
from spectralbasis.version import __version__

FORMAT = "2"
_WITHOUT_CHECKSUM = "1"
_BLOCK = 1 << 22
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Name in the file → in which dtype a bank can hold its numbers."""


@dataclass(frozen=True)
class BankFile:
    """What a bank's file says of itself.

    Attributes:
        layout: what the numbers of a row are.
        tasks: names, in the order of the rows.
        dtype: of the numbers.
        offset: byte at which they begin.
    """

    layout: BankLayout
    tasks: tuple[str, ...]
    dtype: torch.dtype
    offset: int


def write_bank(
    path: Path, layout: BankLayout, tasks: Sequence[str], dtype: torch.dtype, write_rows: Callable[[IO[bytes]], None]
) -> None:
    """Write a bank; the file appears when it is complete.

    Args:
        path: the file.
        layout: what the numbers of a row are.
        tasks: their names, in the order in which `write_rows` writes their rows.
        dtype: of the rows.
        write_rows: writes the bytes of all rows.
    """
    shape = (len(tasks), layout.width)
    named = next(name for name, known in DTYPES.items() if known == dtype)
    described = {"dtype": named, "shape": shape, "data_offsets": [0, shape[0] * shape[1] * dtype.itemsize]}
    metadata = _metadata(layout, tasks)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        start = _header(described, metadata, "0" * 32)
        file.write(start)
        write_rows(file)
        file.flush()
        file.seek(0)
        file.write(_header(described, metadata, _checksum(metadata, temporary, len(start))))


def read_bank(path: Path) -> BankFile:
    """What a bank's file says of itself; the rows are read once, for their checksum, and not kept.

    Raises:
        InputError: the file is absent, damaged, no bank or one of another version.
    """
    try:
        with safe_open(str(path), framework="pt") as file:  # checks that sizes fit the file
            metadata, numbers = file.metadata() or {}, file.get_slice("numbers")
            shape, dtype = tuple(numbers.get_shape()), DTYPES[numbers.get_dtype()]
        if metadata.get("bank") not in (FORMAT, _WITHOUT_CHECKSUM):
            raise InputError(
                f"{path} is no bank of version {FORMAT} or before; update spectralbasis, or write it again with "
                "CoefficientBank.save"
            )
        offset = path.stat().st_size - shape[0] * shape[1] * dtype.itemsize
        if metadata["bank"] == FORMAT and metadata.get("checksum") != _checksum(metadata, path, offset):
            raise ValueError("it has not its checksum")
        layout = _layout(metadata)
        tasks = tuple(json.loads(metadata["tasks"]))
        if shape != (len(tasks), layout.width) or len(set(tasks)) != len(tasks) or not _are_names(tasks):
            raise ValueError(f"{shape} numbers for {len(tasks)} tasks of {layout.width}")
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as a bank ({error}); it may be cut short or damaged") from error
    return BankFile(layout, tasks, dtype, offset)


def _header(described: Mapping[str, Any], metadata: Mapping[str, str], checksum: str) -> bytes:
    """How a safetensors file begins; as long for any checksum."""
    header = json.dumps({"__metadata__": {**metadata, "checksum": checksum}, "numbers": described}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _checksum(metadata: Mapping[str, str], path: Path, offset: int) -> str:
    """xxh3-128 of what the metadata say, and of the rows, read once from the file."""
    digest = xxhash.xxh3_128(json.dumps([metadata[name] for name in ("config", "heads", "tasks")]).encode())
    with path.open("rb") as file:
        file.seek(offset)
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _metadata(layout: BankLayout, tasks: Sequence[str]) -> dict[str, str]:
    record = {name: sorted(value) if isinstance(value, set) else value for name, value in vars(layout.config).items()}
    record = {name: record[name] for name in _recorded_fields()}
    heads = {name: (head.outputs, head.inputs) for name, head in layout.heads.items()}
    texts = {"config": record, "heads": heads, "tasks": list(tasks)}
    return {"bank": FORMAT, "spectralbasis": __version__} | {name: json.dumps(text) for name, text in texts.items()}


def _layout(metadata: Mapping[str, str]) -> BankLayout:
    record: dict[str, Any] = json.loads(metadata["config"])
    config = SpectralConfig(**{name: record[name] for name in _recorded_fields() if name in record})
    if not config.bound:
        raise ValueError("no base_hashes")
    heads = {name: HeadShape(*map(int, shape)) for name, shape in json.loads(metadata["heads"]).items()}
    return BankLayout(config, heads)


def _recorded_fields() -> tuple[str, ...]:
    """What a config says of bases and coefficients, and not of the adapter that it came with."""
    of_the_adapter = {"peft_type", "task_type", "peft_version", "auto_mapping", "inference_mode", "modules_to_save"}
    return tuple(name for name in SpectralConfig.__dataclass_fields__ if name not in of_the_adapter)


def _are_names(tasks: Sequence[Any]) -> bool:
    return all(isinstance(task, str) for task in tasks)
