"""Records of named tasks, and the files of their data sets, which may be damaged or hostile.

Sizes are checked before a file is read. Only the file itself is read: no link in it is followed, nothing is unpickled,
and nothing is unpacked to disk.
"""

import bz2
import gzip
import lzma
import math
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from spectralbasis.errors import InputError
from spectralbasis.training.tasks import Task

TaskLoader = Callable[[Path | None], Task]


@dataclass(frozen=True)
class TaskRecord:
    """All that is known of a named task before it is loaded: the source of help, errors, model cards and data places.

    Args:
        name: as lists show it.
        group: under which lists name it, such as "images".
        description: what is asked, in a few words.
        load: gets the folder or file of data that the user named, or None.
        folder: of its data, below a folder that holds those of all tasks; None for data that come with scikit-learn.
        hub: id of the data set on the hub that is taken where no folder is given.
    """

    name: str
    group: str
    description: str
    load: TaskLoader
    folder: str | None = None
    hub: str | None = None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop, or its class name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def find_data_file(task_name: str, folder_name: str, file_name: str, data: Path | None) -> Path:
    """A data set's file, where `data` is the file, its folder or that folder's parent.

    Raises:
        InputError: no data were named, or the file is not there.
    """
    if data is None:
        raise InputError(f"the task {task_name} needs --data with the folder that holds {file_name}")
    places = (data, data / file_name, data / folder_name / file_name)
    for place in places:
        if place.is_file() and place.name == file_name:
            return place
    raise InputError(
        f"no {file_name} for the task {task_name}: looked for {places[1]} and {places[2]}; pass its folder"
    )


LARGEST = 4 << 30
"""Bytes that a data set takes at most, in memory as on disk: the largest of those known here takes 450 MB."""
MOST_MEMBERS = 250_000
_NUMBERS = "biuf"
"""NumPy's kinds of types that are numbers: bool, signed, unsigned, floating."""
_UNREADABLE = (
    EOFError,
    KeyError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    tarfile.TarError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What NumPy, HDF5 and the unpackers raise where a file is not what it should be."""
_PACKED = {b"\xfd7zXZ\x00": lzma.open, b"\x1f\x8b": gzip.open, b"BZh": bz2.open}
"""How a compressed file begins → what unpacks it."""

Arrays = dict[str, NDArray[Any]]


def read_npz(file: Path, names: Sequence[str]) -> Arrays:
    """Arrays of numbers of a NumPy archive, by name.

    Raises:
        InputError: the file is not such an archive, or an array is missing, there twice, not of numbers, or larger than
            `LARGEST`.
    """
    _check_file(file)
    try:
        with zipfile.ZipFile(file) as archive:
            members = {name: _member(file, archive, name) for name in names}
            _check_size(file, sum(member.file_size for member in members.values()))
            return {name: _array(file, archive, name, member) for name, member in members.items()}
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{file} cannot be read as a NumPy archive: {first_line(error)}") from error


def _member(file: Path, archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    found = [member for member in archive.infolist() if member.filename == f"{name}.npy"]
    if len(found) != 1:
        there = "no array" if not found else f"{len(found)} arrays"
        stored = [member.filename.removesuffix(".npy") for member in archive.infolist()]
        raise InputError(f"{file} has {there} {name}, expected one; it has {', '.join(stored[:8]) or 'none'}")
    return found[0]


def _array(file: Path, archive: zipfile.ZipFile, name: str, member: zipfile.ZipInfo) -> NDArray[Any]:
    """An array, once its header is known to speak of as many bytes as the archive says it has."""
    opened: Any = archive.open(member)
    with opened as stored:
        version = np.lib.format.read_magic(stored)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise InputError(f"{file}: {name} has NumPy format {version}, expected 1.0 or 2.0")
        shape, by_columns, dtype = read_header[version](stored)
        _check_numbers(file, name, dtype)
        size, held = math.prod(shape) * dtype.itemsize, member.file_size - stored.tell()
        if size != held or any(length < 0 for length in shape):
            raise InputError(f"{file}: {name} of shape {shape} and type {dtype} takes {size} bytes, but it has {held}")
        content = bytearray(size)
        read = stored.readinto(content)
        while read < size and (more := stored.readinto(memoryview(content)[read:])):
            read += more
        if read < size:
            raise EOFError(f"{name} ends after {read} of {size} bytes")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if by_columns else "C")


def read_h5(file: Path, names: Sequence[str]) -> Arrays:
    """Arrays of numbers of an HDF5 file, by path within it.

    Raises:
        InputError: the file is not an HDF5 file, or an array is missing, a link, in another file, not of numbers, or
            larger than `LARGEST`.
    """
    import h5py

    _check_file(file)
    try:
        with h5py.File(file, "r") as stored:
            found = {name: _h5_array(file, stored, name) for name in names}
            _check_size(file, sum(array.size * array.dtype.itemsize for array in found.values()))
            return {name: np.asarray(array[()]) for name, array in found.items()}
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{file} cannot be read as an HDF5 file: {first_line(error)}") from error


def _h5_array(file: Path, stored: Any, name: str) -> Any:
    """A data set of HDF5 whose numbers are in this file; nothing is read."""
    import h5py

    place = stored
    for part in name.split("/"):
        link = place.get(part, getlink=True) if isinstance(place, h5py.Group) else None
        if link is None:
            raise InputError(f"{file} has no array {name}")
        if not isinstance(link, h5py.HardLink):
            raise InputError(f"{file}: {name} is a link elsewhere, expected an array in the file itself; copy it there")
        place = place[part]
    if not isinstance(place, h5py.Dataset) or place.shape is None:
        raise InputError(f"{file}: {name} is not an array; expected an array of numbers")
    if place.external or place.is_virtual:
        raise InputError(
            f"{file}: {name} takes its numbers from another file, expected them in this one; copy them there"
        )
    _check_numbers(file, name, place.dtype)
    return place


def tar_members(file: Path, largest: int = LARGEST) -> Iterator[tuple[str, bytes]]:
    """Name and content of every regular file of an archive of at most `largest` bytes; other members are left out.

    Raises:
        InputError: it is not an archive, it is damaged, or it unpacks to more than `largest` bytes or `MOST_MEMBERS`.
    """
    _check_file(file)
    total = 0
    try:
        with _unpacked(file) as packed:
            limited: Any = _Limited(file, packed)
            archive = tarfile.open(fileobj=limited, mode="r|")  # noqa: SIM115
            for count, member in enumerate(archive):
                total += max(member.size, 0)
                _check_size(file, total)
                if count >= MOST_MEMBERS:
                    raise InputError(f"{file} has more than {MOST_MEMBERS:,} members, expected at most that many")
                content = archive.extractfile(member) if member.isfile() and member.size <= largest else None
                if content is not None:
                    yield member.name, content.read()
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{file} cannot be read as an archive: {first_line(error)}") from error


def _unpacked(file: Path) -> IO[bytes]:
    with file.open("rb") as opened:
        start = opened.read(max(map(len, _PACKED)))
    unpack: Any = next((unpack for magic, unpack in _PACKED.items() if start.startswith(magic)), None)
    packed: IO[bytes] = file.open("rb") if unpack is None else unpack(file, "rb")
    return packed


class _Limited:
    """What a file unpacks to, up to `LARGEST` bytes; it can be read once from its start to its end."""

    def __init__(self, file: Path, packed: IO[bytes]) -> None:
        self._file = file
        self._packed = packed
        self._read = 0

    def read(self, size: int) -> bytes:
        found = self._packed.read(size)
        self._read += len(found)
        _check_size(self._file, self._read)
        return found


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        InputError: it is not a regular file, larger than `LARGEST`, or not UTF-8.
    """
    _check_file(file)
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as UTF-8 text: {first_line(error)}") from error


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise InputError(f"{file} is not a regular file; expected a file with data")
    _check_size(file, file.stat().st_size)


def _check_size(file: Path, size: int) -> None:
    if size > LARGEST:
        raise InputError(f"{file} unpacks to {size:,} bytes or more, expected at most {LARGEST:,} of a data set")


def _check_numbers(file: Path, name: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in _NUMBERS or dtype.subdtype is not None:
        raise InputError(f"{file}: {name} is of type {dtype}, expected numbers")
