"""The contents of a bank and their file: the layout of a task's numbers, the table of all tasks, reading and writing.

The file is a safetensors file with one tensor, `numbers` (tasks, width), and a description in its metadata. If the
tasks use a basis file, a copy of it lies beside the bank (`basis_beside`), so a bank names no other file.
"""

import filecmp
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
import xxhash
from pydantic import ConfigDict, with_config
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import TypedDict

from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path, check_replaceable
from spectralbasis.kinds import KindName
from spectralbasis.printable import printable, shortened
from spectralbasis.records import Count, Finite, Positive, checked, parse_json
from spectralbasis.tuner.config import Rank, SpectralConfig
from spectralbasis.tuner.factors import BASES
from spectralbasis.version import __version__

_PARAMETERS = ("weight", "bias")


@dataclass(frozen=True)
class HeadShape:
    """A linear layer of which every task has its own: outputs of the largest task, and inputs."""

    outputs: int
    inputs: int


class BankLayout:
    """The row of numbers that stands for one task: the coefficients of every matrix, then its heads.

    A head has the outputs of the task that has most; those that a task has not are -inf, so that no softmax and no
    argmax finds them. A head without bias is given one of zero, since that is where the -inf stands.

    Args:
        config: what the coefficients are.
        heads: module name → shape.

    Attributes:
        parametrisations: matrix name → what makes C of its numbers.
        shapes: matrix name → shape of its numbers.
        width: how many numbers a task has.
    """

    def __init__(self, config: SpectralConfig, heads: Mapping[str, HeadShape]) -> None:
        self.config = config
        self.heads = dict(heads)
        self.parametrisations = {name: config.parametrisation(one) for name, one in config.record.items()}
        self.shapes = {name: one.shape for name, one in self.parametrisations.items()}
        shapes: dict[tuple[str, str], tuple[int, ...]] = {
            (name, "coefficients"): shape for name, shape in self.shapes.items()
        }
        for name, head in heads.items():
            shapes |= {(name, "weight"): (head.outputs, head.inputs), (name, "bias"): (head.outputs,)}
        self._places: dict[tuple[str, str], tuple[int, tuple[int, ...]]] = {}
        self.width = 0
        for key, shape in shapes.items():
            self._places[key] = (self.width, shape)
            self.width += prod(shape)

    def part(self, rows: Tensor, name: str, parameter: str) -> Tensor:
        """A view of one matrix's `coefficients`, or of a head's `weight` or `bias`, in rows of shape (..., width)."""
        start, shape = self._places[name, parameter]
        return rows[..., start : start + prod(shape)].unflatten(-1, shape)

    def pack(self, stored: Mapping[str, Tensor], others: Mapping[str, Tensor], task: str, dtype: torch.dtype) -> Tensor:
        """The row of a task, (width,).

        Args:
            stored: matrix name → numbers as an adapter stores them; a matrix that is absent is not changed.
            others: parameter name → tensor of a head.
            task: how a person names it.
            dtype: of the row.

        Raises:
            InputError: the heads are not those of this bank, or a number is not finite in this dtype.
        """
        row = torch.zeros(self.width, dtype=dtype)
        for name, numbers in stored.items():
            self.part(row, name, "coefficients").copy_(numbers)
        given = dict(others)
        labels = {
            name: self._pack_head(row, name, given.pop(f"{name}.weight", None), given.pop(f"{name}.bias", None), task)
            for name in self.heads
        }
        if given:
            raise InputError(f"{task} has {next(iter(given))}, which other tasks of the bank do not have; leave it out")
        if not bool(torch.isfinite(row).all()):
            raise InputError(f"{task} holds numbers that are not finite in {dtype}, so it cannot be served")
        for name, count in labels.items():
            self.part(row, name, "bias")[count:] = -inf
        return row

    def _pack_head(self, row: Tensor, name: str, weight: Tensor | None, bias: Tensor | None, task: str) -> int:
        """Enter a head into a row; gives its number of labels."""
        head = self.heads[name]
        if weight is None or weight.ndim != 2 or weight.shape[1] != head.inputs:
            raise InputError(f"{task} has no head {name} with {head.inputs} inputs, but every task of the bank has one")
        labels = len(weight)
        if labels > head.outputs or (bias is not None and bias.shape != (labels,)):
            raise InputError(
                f"{task} has {labels} labels in {name}, but the bank holds at most {head.outputs}; make the bank with "
                f"labels={labels}"
            )
        self.part(row, name, "weight")[:labels] = weight
        if bias is not None:
            self.part(row, name, "bias")[:labels] = bias
        return labels

    def defect(self, rows: Tensor) -> tuple[int, str] | None:
        """The first of these rows, (rows, width), that no adapter can have given, and what is wrong with it."""
        for (name, parameter), (start, shape) in self._places.items():
            part = rows[:, start : start + prod(shape)]
            sound = torch.isfinite(part)
            if parameter == "bias":
                absent = part == -inf
                sound |= absent
                # Labels come first, and there is one or more.
                sound[:, 0] &= ~absent[:, 0]
                sound[:, 1:] &= absent[:, 1:] | ~absent[:, :-1]
            wrong = (~sound.all(1)).nonzero()
            if len(wrong):
                kind = "no label, a gap between labels or a number" if parameter == "bias" else "a number"
                return int(wrong[0]), f"has {kind} that is not finite among the {parameter} of {name}"
        return None

    def labels(self, row: Tensor) -> dict[str, int]:
        """How many outputs each head has in a task's row."""
        return {name: int((self.part(row, name, "bias") != -inf).sum()) for name in self.heads}

    def labels_of_all(self, rows: Tensor) -> dict[str, list[int]]:
        """Head → how many outputs it has in each of these rows, (rows, width)."""
        return {name: (self.part(rows, name, "bias") != -inf).sum(-1).tolist() for name in self.heads}


def head_shapes(others: Sequence[Mapping[str, Sequence[int]]], labels: int | None = None) -> dict[str, HeadShape]:
    """The heads that can hold those of several tasks.

    Args:
        others: of each task, parameter name → shape.
        labels: outputs to leave room for.

    Raises:
        InputError: a parameter is no weight or bias, or is one of a layer that is not linear.
    """
    found: dict[str, HeadShape] = {}
    for task in others:
        for parameter, shape in task.items():
            name, _, kind = parameter.rpartition(".")
            if kind not in _PARAMETERS or len(task.get(f"{name}.weight", ())) != 2:
                raise InputError(
                    f"an adapter has {parameter}, but a bank serves only linear heads; train with bias='none' and "
                    "modules_to_save of linear layers, or serve this task by itself"
                )
            if kind == "weight":
                known = found.get(name, HeadShape(labels or 1, shape[1]))
                found[name] = HeadShape(max(known.outputs, shape[0]), shape[1])
    return found


_FIRST_CHUNK = 256


class BankRows:
    """Rows of equal width in chunks. It grows by chunks as large as all before, so no row is copied or moved.

    Memory that was never written takes no room, so a chunk costs what its rows in use hold.

    Args:
        first: rows to begin with, (rows, width).
    """

    def __init__(self, first: Tensor) -> None:
        self._chunks = [first]
        self._starts = [0]

    def __len__(self) -> int:
        return self._starts[-1] + len(self._chunks[-1])

    @property
    def dtype(self) -> torch.dtype:
        """In which numbers are held."""
        return self._chunks[0].dtype

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self._chunks[0].shape[1]

    def grow(self) -> None:
        """Make room for as many rows again."""
        fresh = torch.empty(max(_FIRST_CHUNK, len(self)), self.width, dtype=self.dtype)
        self._starts.append(len(self))
        self._chunks.append(fresh)

    def write(self, slot: int, row: Tensor) -> None:
        """Set one row."""
        index = max(i for i, start in enumerate(self._starts) if start <= slot)
        self._chunks[index][slot - self._starts[index]] = row

    def read(self, slots: Sequence[int]) -> Tensor:
        """Copies of rows, (len(slots), width)."""
        wanted = torch.tensor(slots, dtype=torch.int64)
        if len(self._chunks) == 1:
            return self._chunks[0].index_select(0, wanted)
        found = torch.empty(len(wanted), self.width, dtype=self.dtype)
        for start, chunk in zip(self._starts, self._chunks, strict=True):
            here = ((wanted >= start) & (wanted < start + len(chunk))).nonzero().squeeze(1)
            if len(here):
                found[here] = chunk.index_select(0, wanted[here] - start)
        return found

    def save(self, slots: Sequence[int], file: IO[bytes]) -> None:
        """Write rows one after the other as bytes."""
        for start in range(0, len(slots), _FIRST_CHUNK):
            file.write(self.read(slots[start : start + _FIRST_CHUNK]).view(torch.uint8).numpy().data)


def map_rows(path: Path, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows of a file, read when they are used and shared by all processes that map it; a change stays in this one."""
    columns = shape[1] * dtype.itemsize
    return torch.from_numpy(np.memmap(path, np.uint8, "c", offset, (shape[0], columns))).view(dtype)


FORMAT = "4"
_BLOCK = 1 << 22
_ROWS = 256
_WIDEST = 1 << 32
"""Numbers in a row at most: thousands of times as many as any adapter's."""
_AGAIN = "write it again with CoefficientBank.save"
_FILE = "file"
"""Stands, in the config of a bank, for the basis file beside it."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Name in the file → in which dtype a bank can hold its numbers."""


@with_config(ConfigDict(extra="forbid"))
class BankConfig(TypedDict):
    """What a bank says of bases and coefficients: fields of `SpectralConfig`, and of its basis no place."""

    base_model_name_or_path: str | None
    task_type: str | None
    coefficients: KindName
    bandwidth: Count
    block_size: Positive
    scaling: Literal["absolute", "relative", "normalized"]
    basis: Literal["pretrained", "minor", "random", "file"]
    basis_seed: Count
    tolerance: Finite
    base_hashes: dict[str, str]
    ranks: dict[str, Rank]
    probes: dict[str, list[Finite]]
    scales: dict[str, list[Finite]] | None
    entries: dict[str, str] | None
    singular_values: dict[str, list[Finite]] | None


@dataclass(frozen=True)
class BankFile:
    """What a bank's file says of itself.

    Attributes:
        layout: what the numbers of a row are.
        tasks: names, in the order of the rows.
        dtype: of the numbers.
        offset: byte at which they begin.
        checksum: of all this and of the numbers.
    """

    layout: BankLayout
    tasks: tuple[str, ...]
    dtype: torch.dtype
    offset: int
    checksum: str


def write_bank(
    path: Path, layout: BankLayout, tasks: Sequence[str], dtype: torch.dtype, write_rows: Callable[[IO[bytes]], None]
) -> None:
    """Write a bank, and beside it the basis file that its tasks are of, if any; each appears when it is complete.

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
    check_replaceable(path)
    if layout.config.basis not in BASES:
        _keep_basis(Path(layout.config.basis), basis_beside(path))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        start = _header(described, metadata, "0" * 32)
        file.write(start)
        write_rows(file)
        file.flush()
        file.seek(0)
        file.write(_header(described, metadata, _checksum(metadata, temporary, len(start))))


def basis_beside(path: Path) -> Path:
    """Where the basis file of a bank lies."""
    return path.with_name(f"{path.stem}.basis.safetensors")


def _keep_basis(file: Path, place: Path) -> None:
    """Copy a basis file beside a bank.

    Raises:
        InputError: another file lies there.
    """
    if place.exists():
        if not filecmp.cmp(file, place, shallow=False):
            raise InputError(f"{place} is not the basis file of this bank; save the bank elsewhere")
        return
    with atomic_path(place) as temporary:
        shutil.copyfile(file, temporary)


def read_bank(path: Path) -> BankFile:
    """What a bank's file says of itself; the rows are read for their checksum and their numbers, and not kept.

    Raises:
        InputError: the file is absent, damaged, no bank or one of another version.
    """
    if not path.is_file():
        raise InputError(f"{path} cannot be read as a bank: no such file; {_AGAIN}")
    try:
        with safe_open(str(path), framework="pt") as file:  # checks that sizes fit the file
            metadata, names = file.metadata() or {}, list(file.keys())
            if names != ["numbers"]:
                raise InputError(
                    f"{path} is not a bank: it holds {', '.join(names[:3]) or 'nothing'}, expected numbers"
                )
            numbers = file.get_slice("numbers")
            shape, named = tuple(numbers.get_shape()), numbers.get_dtype()
        _check_metadata(path, metadata, shape, named)
        offset = path.stat().st_size - prod(shape) * DTYPES[named].itemsize
        if metadata["checksum"] != _checksum(metadata, path, offset):
            raise InputError(f"the bank {path} is damaged: it fails its checksum; restore it, or {_AGAIN}")
    except (SafetensorError, OSError, MemoryError) as error:
        raise InputError(f"{path} cannot be read as a bank ({error}); it may be cut short or damaged") from error
    tasks = _part(path, metadata, "tasks", list[str])
    if len(set(tasks)) != len(tasks):
        twice = next(task for i, task in enumerate(tasks) if task in tasks[:i])
        raise InputError(f"the bank {path} has the task {twice!r} twice, expected each name once; {_AGAIN}")
    layout = _layout(path, metadata, len(tasks), shape)
    found = BankFile(layout, tuple(tasks), DTYPES[named], offset, metadata["checksum"])
    _check_rows(path, found)
    return found


LONGEST_NAME = 200


def task_name(name: str) -> str:
    """A name that a task may be given from outside, by a command or a request.

    Raises:
        InputError: it is empty, too long, or holds what a reader cannot see.

    Examples:
        >>> task_name("glue/rte")
        'glue/rte'
    """
    if not 1 <= len(name) <= LONGEST_NAME or printable(name) != name or name != name.strip():
        raise InputError(
            f"the name {shortened(repr(name), 80)} of a task must have 1 to {LONGEST_NAME} visible characters and no "
            "space at its ends; give it another"
        )
    return name


def stored_checksum(path: Path) -> str:
    """The checksum that a bank's file states, which tells whether it is still the one that was read.

    Raises:
        InputError: the file cannot be read as a bank.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return str((file.metadata() or {}).get("checksum"))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as a bank ({error}); {_AGAIN}") from error


def _check_metadata(path: Path, metadata: Mapping[str, str], shape: Sequence[int], named: str) -> None:
    if metadata.get("bank") != FORMAT:
        raise InputError(f"{path} is not a bank of version {FORMAT}; update spectralbasis, or {_AGAIN}")
    lacking = [name for name in ("checksum", "config", "heads", "tasks") if name not in metadata]
    if lacking:
        raise InputError(f"the bank {path} lacks its {lacking[0]}; {_AGAIN}")
    if named not in DTYPES or len(shape) != 2:
        raise InputError(
            f"the bank {path} has numbers of type {named} and shape {tuple(shape)}, expected (tasks, width) in "
            f"{', '.join(DTYPES)}; {_AGAIN}"
        )


def _part(path: Path, metadata: Mapping[str, str], name: str, schema: Any) -> Any:
    """One part of the metadata, which are texts of JSON."""
    where = f"the {name} of the bank {path}"
    return checked(parse_json(metadata[name], where, _AGAIN), schema, where, _AGAIN)


def _layout(path: Path, metadata: Mapping[str, str], tasks: int, shape: tuple[int, ...]) -> BankLayout:
    """What the numbers of a row are; nothing of that size is made before it is known to fit the file."""
    record: BankConfig = _part(path, metadata, "config", BankConfig)
    shapes = _part(path, metadata, "heads", dict[str, tuple[Positive, Positive]])
    heads = {name: HeadShape(*of) for name, of in shapes.items()}
    place = str(basis_beside(path)) if record["basis"] == _FILE else record["basis"]
    if record["basis"] == _FILE and not Path(place).is_file():
        raise InputError(f"the bank {path} needs the basis file {Path(place).name} beside it; put it there")
    settings: dict[str, Any] = {**record, "basis": place}
    try:
        config = SpectralConfig(**settings)
    except InputError as error:
        raise InputError(f"the config of the bank {path}: {error}") from error
    width = sum(prod(config.stored_shape(one)) for one in config.record.values())
    width += sum(head.outputs * (head.inputs + 1) for head in heads.values())
    if shape != (tasks, width) or width > _WIDEST:
        raise InputError(
            f"the bank {path} has numbers of shape {shape}, expected {tasks} tasks of {width} by its config and "
            f"heads, and at most {_WIDEST} numbers; {_AGAIN}"
        )
    return BankLayout(config, heads)


def _check_rows(path: Path, bank: BankFile) -> None:
    """Refuse rows that hold what no adapter does: a NaN, an infinite coefficient, a head without labels."""
    if not bank.tasks:
        return
    rows = map_rows(path, bank.offset, (len(bank.tasks), bank.layout.width), bank.dtype)
    for start in range(0, len(rows), _ROWS):
        wrong = bank.layout.defect(rows[start : start + _ROWS])
        if wrong is not None:
            row, what = wrong
            raise InputError(f"the task {bank.tasks[start + row]!r} of the bank {path} {what}; {_AGAIN}")


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
    record = {name: getattr(layout.config, name) for name in BankConfig.__annotations__}
    record["basis"] = record["basis"] if record["basis"] in BASES else _FILE
    heads = {name: (head.outputs, head.inputs) for name, head in layout.heads.items()}
    texts = {"config": record, "heads": heads, "tasks": list(tasks)}
    return {"bank": FORMAT, "spectralbasis": __version__} | {name: json.dumps(text) for name, text in texts.items()}
