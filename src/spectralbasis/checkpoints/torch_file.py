"""Read files of `torch.save` without running code from them.

Such a file is a zip archive of uncompressed records, and torch maps them into memory. Before torch opens the file,
`check_archive` makes sure that mapping gives the same bytes as reading each record, and `_check_storages` that no
tensor claims more bytes than its record holds.
"""

import argparse
import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from spectralbasis.checkpoints.checkpoint import TensorCheckpoint, find_state
from spectralbasis.errors import InputError
from spectralbasis.printable import shortened

SIGNATURE = b"PK\x03\x04"
_LOCAL = struct.Struct("<4s5H3L2H")  # signature … flags, method … sizes, lengths of the name and of the extra field
_END = struct.Struct("<4s4H2LH")  # of the directory: signature … its size, where it starts, length of a comment
_LOCATOR = struct.Struct("<4sLQL")  # of the 64-bit end: signature, disk, where it starts, disks
_END64 = struct.Struct("<4sQ2H2L4Q")  # signature … where the directory starts
_UNKNOWN = 0xFFFFFFFF
_ENCRYPTED, _SIZES_FOLLOW, _UTF8 = 1, 1 << 3, 1 << 11
_LARGEST = 1 << 28
"""Bytes of the directory, and of each record that is no tensor's, at most: a million tensors take less."""


def open_torch_file(path: Path, source: str, config: Mapping[str, Any]) -> TensorCheckpoint:
    """Open a `.pt`, `.pth` or `.bin` file, mapped into memory where its format allows.

    Raises:
        InputError: the file is no torch checkpoint, is damaged, or holds objects other than weights.
    """
    return TensorCheckpoint(find_state(_load(path), source), source, config)


def _load(path: Path) -> object:
    try:
        with path.open("rb") as file:
            sizes = check_archive(file, path) if file.read(len(SIGNATURE)) == SIGNATURE else None
        # Training scripts save their arguments beside the weights: a Namespace holds values and runs nothing.
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([argparse.Namespace]),
            torch.sparse.check_sparse_tensor_invariants(),
        ):
            warnings.simplefilter("ignore", UserWarning)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=sizes is not None)
            if sizes is not None:
                _check_storages(path, sizes)
            return loaded
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can fail in any way, with KeyError and IndexError among them
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            name = str(error).partition("GLOBAL ")[2].split(" ")[0].rstrip(".,")
            raise InputError(
                f"{path} is refused: besides tensors it holds {name or 'a Python object'}, and unpickling that could "
                "run code. If you trust where it comes from, load it yourself in a sandbox and write its state_dict "
                "with safetensors.torch.save_file, then open that file"
            ) from error
        raise InputError(
            f"{path} is not a readable torch checkpoint: it is damaged, cut short or of another format; "
            f"expected a state_dict written by torch.save"
        ) from error


def _check_storages(path: Path, sizes: Mapping[str, int]) -> None:
    """Raise InputError if a tensor's storage claims more bytes than its record holds. Torch has accepted the file."""
    with zipfile.ZipFile(path) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        reader = _StorageReader(io.BytesIO(archive.read(f"{folder}/data.pkl")))
    reader.load()
    for key, claimed in reader.claims:
        held = sizes.get(f"data/{key}", -1)
        if not 0 <= claimed <= held:
            raise InputError(
                f"{path} is damaged: a tensor claims {claimed} bytes of the record data/{shortened(key, 40)}, which "
                f"holds {max(held, 0)}; copy or download it again"
            )


class _StorageReader(pickle._Unpickler):
    """Reads which record each storage is from and how large it claims to be; imports, makes and runs nothing.

    It is the one in Python, as torch's is: the one in C allocates whatever number a pickle gives to a memo.

    Attributes:
        claims: key of the record, and bytes, of each storage.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.claims: list[tuple[str, int]] = []

    def find_class(self, module: str, name: str) -> type:
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Sequence[Any]) -> "_Inert":
        _, kind, key, _, count = pid
        dtype = getattr(getattr(torch, kind.__name__, None), "dtype", torch.uint8)
        self.claims.append((str(key), count * dtype.itemsize))
        return _Inert()


class _Inert:
    """Stands for any object of a pickle, and does nothing with what the pickle puts into it."""

    def __new__(cls, *_: object, **__: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def __iter__(self) -> Iterator[object]:
        return iter(())

    def append(self, value: object) -> None: ...

    def add(self, value: object) -> None: ...


def record_names(path: Path) -> list[str]:
    """Names of the records of an archive; none where the file is no archive or its directory cannot be read."""
    try:
        with path.open("rb") as file:
            return [record.filename for record in _records(file)]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OverflowError):
        return []


def check_archive(file: BinaryIO, path: Path) -> dict[str, int]:
    """Size of every record by its name, without the folder that all have.

    Raises:
        InputError: two readers could find different bytes in the archive: a record is compressed, there twice, laid
            over another or beyond the file, its two headers differ, or the directory is not at the end.
        zipfile.BadZipFile: it is no archive.
    """
    start, records = _directory_start(file), _records(file)
    if start is None or not records:
        raise zipfile.BadZipFile("no records")
    seen: dict[str, zipfile.ZipInfo] = {}
    for record in records:
        other = seen.setdefault(record.filename.lower(), record)  # torch looks names up without their case
        if other is not record:
            raise InputError(_not_as_saved(path, f"it holds the record {shortened(record.filename, 80)} twice"))
    ends = 0
    for record in sorted(records, key=lambda record: record.header_offset):
        if record.header_offset < ends:
            raise InputError(_not_as_saved(path, f"its record {shortened(record.filename, 80)} overlaps another"))
        ends = _end_of(file, record, path)
    if ends > start:
        raise InputError(_not_as_saved(path, "its last record reaches beyond the place where its directory starts"))
    folder = records[0].filename.partition("/")[0]
    for record in records:
        if not record.filename.startswith(f"{folder}/data/") and record.file_size > _LARGEST:
            raise InputError(_not_as_saved(path, f"its record {shortened(record.filename, 80)} is too large"))
    return {record.filename.removeprefix(f"{folder}/"): record.file_size for record in records}


def _records(file: BinaryIO) -> list[zipfile.ZipInfo]:
    """Every record, in the order of the directory.

    Raises:
        zipfile.BadZipFile: the file does not end as an archive, or its directory is not where that says or too large.
    """
    length, start = file.seek(0, io.SEEK_END), _directory_start(file)
    if start is None or length - start > _LARGEST:
        raise zipfile.BadZipFile("the end of the file names no directory, or one that is too large")
    with zipfile.ZipFile(file) as archive:
        if archive.start_dir != start:
            raise zipfile.BadZipFile("the directory is not at the place that the file names")
        return archive.infolist()


def _directory_start(file: BinaryIO) -> int | None:
    """Where the directory starts by the last bytes of the file; None where these are not the end of an archive."""
    length = file.seek(0, io.SEEK_END)
    file.seek(max(length - _END64.size - _LOCATOR.size - _END.size, 0))
    tail = file.read()
    if len(tail) < _END.size:
        return None
    signature, *_, start, comment = _END.unpack(tail[-_END.size :])
    if signature != b"PK\x05\x06" or comment:
        return None
    wide = tail[: -_END.size]
    if wide[-_LOCATOR.size :][:4] != b"PK\x06\x07":
        return int(start)
    _, _, place, _ = _LOCATOR.unpack(wide[-_LOCATOR.size :])
    if len(wide) < _END64.size + _LOCATOR.size or place != length - len(tail):
        return None
    signature, *_, start = _END64.unpack(wide[: _END64.size])
    return int(start) if signature == b"PK\x06\x06" else None


def _end_of(file: BinaryIO, record: zipfile.ZipInfo, path: Path) -> int:
    """Where a record's bytes end, once its header in front of them agrees with the directory."""
    name = record.orig_filename.encode("utf-8" if record.flag_bits & _UTF8 else "cp437")
    file.seek(record.header_offset)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size:
        raise InputError(_not_as_saved(path, f"its record {shortened(record.filename, 80)} lies beyond its end"))
    signature, _, flags, method, _, _, _, packed, size, name_length, extra = _LOCAL.unpack(header)
    if record.compress_type != zipfile.ZIP_STORED or method != zipfile.ZIP_STORED or flags & _ENCRYPTED:
        raise InputError(
            f"the record {shortened(record.filename, 80)} of {path} is compressed or encrypted, which torch.save never "
            f"does; load the file with torch.load(…, weights_only=True) and save it again with torch.save"
        )
    unstated = {_UNKNOWN, record.file_size} | ({0} if flags & _SIZES_FOLLOW else set())
    agree = signature == SIGNATURE and file.read(name_length) == name and record.compress_size == record.file_size
    if not agree or packed not in unstated or size not in unstated:
        raise InputError(
            _not_as_saved(path, f"the header of its record {shortened(record.filename, 80)} contradicts its directory")
        )
    return record.header_offset + _LOCAL.size + name_length + extra + record.file_size


def _not_as_saved(path: Path, difference: str) -> str:
    return (
        f"{path} differs from what torch.save writes: {difference}; copy or download it again, or load it yourself and "
        "save its state_dict"
    )
