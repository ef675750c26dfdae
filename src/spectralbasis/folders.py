"""Output folders that appear whole or not at all, and that say what in them is ours.

Every folder has a hidden list of what was written into it. Only a folder with such a list, and with nothing beside
what it lists, is ever replaced or removed.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from spectralbasis.errors import InputError
from spectralbasis.files import (
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
            f"the output folder {path} holds {others[0]}, which no earlier run wrote, so it is not replaced; move it "
            "away, or name a new folder"
        )


def not_ours(folder: Path) -> list[str] | None:
    """What a folder holds beside what `atomic_folder` wrote into it; None where it wrote none of it."""
    file = folder / LIST
    try:
        ours = set(checked(read_json(file), list[str], str(file))) if not file.is_symlink() else None
    except InputError:
        return None
    return None if ours is None else sorted(entry.name for entry in folder.iterdir() if entry.name not in {*ours, LIST})


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
            names = sorted(entry.name for entry in fresh.iterdir())
            (fresh / LIST).write_text(json.dumps(names) + "\n", encoding="utf-8")
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
    return path.resolve()


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
