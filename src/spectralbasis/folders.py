"""Output folders that appear whole or not at all, and that say what in them is ours.

Every folder has a hidden list of what was written into it. Only a folder with such a list, and with nothing beside
what it lists, as it was written, is ever replaced or removed, and only a file that is listed is written again.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import xxhash
from safetensors import SafetensorError

from spectralbasis.errors import InputError
from spectralbasis.files import (
    atomic_path,
    check_output_files,
    clear_leftovers,
    no_room_for,
    out_of_room,
    put_back,
    scratch_beside,
    unwritable,
)
from spectralbasis.records import checked, read_json

LIST = ".spectralbasis"
_GENERATOR = b'<meta name="generator" content="spectralbasis '
_BEGINNING = 4096
_HASHED = 1 << 26
"""Bytes up to which the list says what a file holds, and not only how long it is."""


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that holds something, unless `overwrite` is set and all of it is of an earlier run.

    A folder that a killed process had moved out of the way is put back first.

    Raises:
        InputError: the folder is in use, or is none, or cannot be replaced.
    """
    place = _place(path)
    if not os.path.lexists(place):
        clear_leftovers(place)
    if place.is_mount():
        raise InputError(f"the output folder {path} is a disk of its own; name a new folder on it")
    if not _holds_something(place):
        return
    if not overwrite:
        raise InputError(f"the output folder {path} is not empty; name a new one, or pass overwrite to replace it")
    if (others := not_ours(place)) is None:
        raise InputError(
            f"the output folder {path} was not made by spectralbasis, so it is not replaced; name a new one"
        )
    if others:
        raise InputError(
            f"the output folder {path} holds {others[0]}, which no earlier run wrote, or which was changed since, so "
            "it is not replaced; move it away, or name a new folder"
        )


def claim_files(folder: Path, *names: str, adopt: bool = False) -> None:
    """Note files that are about to be written into a folder as ours; the folder is made where it is absent.

    Args:
        folder: may hold other things, which are left alone.
        names: of the files.
        adopt: take files of these names that are there for ours, as those of a folder that somebody passed on.

    Raises:
        InputError: the folder or a file of it cannot be written, or one of the files is there and no earlier run
            wrote it.
    """
    check_output_files(folder, *names)
    ours = _listed(folder) or {}
    for name in names if not adopt else ():
        if name not in ours and (folder / name).exists() and not _is_our_page(folder / name):
            raise InputError(
                f"the output folder {folder} holds {name}, which no earlier run wrote there, so it is not replaced; "
                "move it away, or name a new folder"
            )
    if not ours.keys() >= set(names):
        with atomic_path(folder / LIST) as temporary:
            _write_list(temporary, {**dict.fromkeys(names, ""), **ours})


def _is_our_page(file: Path) -> bool:
    """Whether a file is a page that this package made, which says so at its beginning."""
    with file.open("rb") as page:
        return _GENERATOR in page.read(_BEGINNING)


def not_ours(folder: Path) -> list[str] | None:
    """The files of a folder that `atomic_folder` did not write, or not as they are; None where it wrote none."""
    ours = _listed(folder)
    if ours is None:
        return None
    return [name for name, file in _files(folder) if name not in ours or ours[name] not in ("", _content(file))]


def _files(folder: Path) -> list[tuple[str, Path]]:
    """All files below a folder but the list, and empty folders, by their path in it."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir() or not any(path.iterdir()))
    return sorted((path.relative_to(folder).as_posix(), path) for path in found if path != folder / LIST)


def _content(file: Path) -> str:
    """What tells whether a file was changed: a hash, its size where that takes long, its kind where it is no file."""
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        return f"kind {stat.S_IFMT(status.st_mode):o}"
    return xxhash.xxh3_128_hexdigest(file.read_bytes()) if status.st_size <= _HASHED else f"{status.st_size} bytes"


def _listed(folder: Path) -> dict[str, str] | None:
    """The list of a folder: file to `_content`, which is empty for `claim_files`; None where none can be read."""
    file = folder / LIST
    try:
        return checked(read_json(file), dict[str, str], str(file)) if not file.is_symlink() else None
    except InputError:
        return None


def _write_list(file: Path, files: Mapping[str, str]) -> None:
    file.write_text(json.dumps(dict(sorted(files.items())), indent=1) + "\n", encoding="utf-8")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder; it takes the place of `path` when the block succeeds, else it is removed.

    What a process that was killed left of the same folder is removed too. A folder that is replaced keeps its mode. A
    link to a folder stays, and the folder that it leads to is the one written.

    Raises:
        InputError: the parent folder cannot be created or written to, there is no room, another process is writing
            the folder, or one that holds something has appeared in its place meanwhile.
    """
    target = _place(path)
    with scratch_beside(target) as (scratch, living):
        if living:
            raise InputError(f"another command is writing {path}; wait for it, or name another folder")
        replaced = _identity(target) if _holds_something(target) else None
        fresh = scratch / "new"
        try:
            fresh.mkdir()
        except OSError as error:
            raise unwritable(path, error) from error
        try:
            yield fresh
            _write_list(fresh / LIST, {name: _content(file) for name, file in _files(fresh)})
            if _holds_something(target) and _identity(target) != replaced:
                raise InputError(_kept_beside(fresh, target))
            if target.exists():
                fresh.chmod(stat.S_IMODE(target.stat().st_mode))
                target.rename(scratch / "old")
            fresh.rename(target)
        except (OSError, SafetensorError) as error:
            if not out_of_room(error):
                raise
            raise no_room_for(path) from error
        finally:
            put_back(scratch, target)


def _place(path: Path) -> Path:
    """The folder that a path leads to, by a path without links and dots: the working folder may be what is replaced.

    Raises:
        InputError: the name is impossible.
    """
    check_output_files(path)
    try:
        return path.resolve()
    except OSError as error:  # the working folder is gone
        raise unwritable(path, error) from error


def _holds_something(path: Path) -> bool:
    try:
        return path.is_dir() and any(path.iterdir())
    except OSError as error:
        raise unwritable(path, error) from error


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _kept_beside(fresh: Path, target: Path) -> str:
    """Keep a finished folder whose place was taken; say where."""
    number = 1
    while os.path.lexists(other := target.with_name(f"{target.name}-{number}")):
        number += 1
    fresh.rename(other)
    return f"the output folder {target} was filled by another meanwhile, so what was made is in {other}"
