"""Write files and folders completely or not at all, and find damage by checksums.

Output is written into a hidden scratch folder beside its target. A locked file in it shows that the folder is ours and
that its process lives; later runs remove scratch folders of ended processes. Every output folder has a hidden list of
its files: a folder is replaced or removed only if it has such a list and holds only the listed files, unchanged.
"""

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from spectralbasis.errors import BusyError, InputError
from spectralbasis.records import checked, read_json

if TYPE_CHECKING:
    from torch import Tensor


def checksum(*texts: str, tensors: "Mapping[str, Tensor] | None" = None) -> str:
    """xxh3-128 of texts, and of tensors with their names, types and shapes, as 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode())
    for name, tensor in sorted((tensors or {}).items()):
        import torch  # takes longer to import than a command that fails at once

        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where results are kept for later: `SPECTRALBASIS_CACHE`, else `spectralbasis` in the user's cache folder."""
    given = os.environ.get("SPECTRALBASIS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectralbasis"


_OURS, _BEGINNING = b"spectralbasis", 4096
"""What our files say of themselves in so many first bytes: basis files and banks in the metadata of their header."""
_OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOCK = "spectralbasis.lock"
_ATTEMPTS = 10


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a path to write to; the file there takes the place of `path` when the block succeeds, else it is removed.

    A file that is written again keeps its mode; a new one gets the mode that the user's umask gives.

    Raises:
        InputError: `check_output_file` refuses the path, the folder cannot be created or written to, or there is no
            room for the file.
    """
    target = Path(path)
    check_output_file(target)
    with scratch_beside(target) as (scratch, _):
        temporary = scratch / "new" / target.name
        try:
            temporary.parent.mkdir()
            try:
                mode = stat.S_IMODE(target.stat().st_mode) & 0o777
            except FileNotFoundError:  # the mode that the umask gives a new file
                (scratch / "mode").touch(0o666, exist_ok=False)
                mode = stat.S_IMODE((scratch / "mode").stat().st_mode)
        except OSError as error:
            raise unwritable(target, error) from error
        try:
            yield temporary
            with temporary.open("r+b") as written:  # on the disk, so that losing power leaves no empty file
                os.fsync(written.fileno())
            with suppress(PermissionError):  # a file system without modes
                temporary.chmod(mode)
            temporary.replace(target)
        except (OSError, SafetensorError) as error:
            if not out_of_room(error):
                raise
            raise no_room_for(target) from error


def check_output_file(path: Path) -> None:
    """Refuse a path to which no file can be written: a folder, a link, a device, an impossible name.

    A link is refused because writing to it would either replace the link or change a file elsewhere.

    Raises:
        InputError: see above; call it before the work whose result the file takes.
    """
    status = _status(path)
    if status is None:
        return
    if stat.S_ISLNK(status.st_mode):
        raise InputError(f"the output {path} is a link to {path.readlink()}; name the file itself, or remove the link")
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"the output {path} is a folder, expected a file; name a file, such as {path / 'NAME'}")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"the output {path} is not a regular file; name another file")


def check_replaceable(path: Path) -> None:
    """Refuse to write over a file that this package did not write, besides what `check_output_file` refuses.

    Raises:
        InputError: see above; call it before the work whose result the file takes.
    """
    check_output_file(path)
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb") as file:
        if _OURS not in file.read(_BEGINNING):
            raise InputError(f"the output {path} is a file that spectralbasis did not write; name another")


def check_output_files(folder: Path, *names: str) -> None:
    """Refuse a path that is not a folder, and a folder in which one of these files can never be written.

    Raises:
        InputError: see above and `check_output_file`; call it before the work whose results the files take.
    """
    status = _status(folder)
    if status is not None and not folder.is_dir():
        what = "a file" if stat.S_ISREG(status.st_mode) else "no folder"
        if folder.is_symlink():
            what = f"a link to {folder.readlink()}, which is not a folder"
        raise InputError(f"the output {folder} is {what}; name a new folder")
    for name in names:
        check_output_file(folder / name)


def _status(path: Path) -> os.stat_result | None:
    """What lies at a path, links not followed; None where nothing does.

    Raises:
        InputError: no file can have this name, or what is above it is no folder.
    """
    try:
        return path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unwritable(path, error) from error
    except ValueError as error:
        raise InputError(
            f"the output {path} has a name that no file can have ({error}); choose another name"
        ) from error


@contextmanager
def scratch_beside(target: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield a new scratch folder beside an output, and those in which living processes write the same output.

    The folder is removed when the block ends. Those that killed processes left are removed before. Where the file
    system has no locks nobody can be told to live or not: nothing is removed or listed.

    Raises:
        InputError: the folder of the output cannot be created or written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch, lock = _new_scratch(target)
    except OSError as error:
        raise unwritable(target, error) from error
    try:
        yield scratch, (clear_leftovers(target, scratch) if lock.is_locked else [])
    finally:
        lock.release()
        shutil.rmtree(scratch, ignore_errors=True)


def _new_scratch(target: Path) -> tuple[Path, FileLock]:
    """A new scratch folder and its lock, which is held unless the file system has none."""
    for _ in range(_ATTEMPTS):
        scratch = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        lock = FileLock(scratch / _LOCK, timeout=0)
        try:
            with suppress(Timeout, NotImplementedError):
                lock.acquire()
        except OSError:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        if (scratch / _LOCK).exists():
            return scratch, lock
        lock.release()  # another took the folder for left over before it was locked
    raise OSError(errno.EAGAIN, "other processes keep removing the files that are being written")


def clear_leftovers(target: Path, ours: Path | None = None) -> list[Path]:
    """Remove the scratch folders of killed processes that wrote `target`; return those of living ones.

    A folder that such a process had moved out of the way is put back first, if nothing has taken its place.
    """
    living = []
    for scratch in target.parent.glob(f"{_prefix(target)}*"):
        if scratch == ours or not _is_ours(scratch):
            continue
        if not (scratch / _LOCK).exists():
            with suppress(OSError):
                scratch.rmdir()  # it is empty: its process ended at once
            continue
        lock = FileLock(scratch / _LOCK, timeout=0)
        try:
            with lock:
                put_back(scratch, target)
        except (Timeout, NotImplementedError, OSError):
            living.append(scratch)
        else:
            shutil.rmtree(scratch, ignore_errors=True)
    return living


def put_back(scratch: Path, target: Path) -> None:
    """Give an output folder that was moved into a scratch folder its place again, if nothing has taken it."""
    old = scratch / "old"
    if old.is_dir() and not old.is_symlink() and not os.path.lexists(target):
        old.rename(target)


def _is_ours(scratch: Path) -> bool:
    """Whether a folder with the name of a scratch folder is one: this user's, and with its lock, or empty."""
    try:
        folder = scratch.lstat()
        if not stat.S_ISDIR(folder.st_mode) or (hasattr(os, "getuid") and folder.st_uid != os.getuid()):
            return False
        return stat.S_ISREG((scratch / _LOCK).lstat().st_mode)
    except FileNotFoundError:
        return scratch.is_dir() and not any(scratch.iterdir())
    except OSError:
        return False


def _prefix(target: Path) -> str:
    """How the scratch folders of an output begin: of one length, however long its name is."""
    return f".spectralbasis-{xxhash.xxh3_64_hexdigest(os.fsencode(target.name))}-"


def unwritable(target: Path, error: OSError) -> InputError:
    """The error where the system refuses a place."""
    if out_of_room(error):
        return no_room_for(target)
    what_now = "give a shorter name" if error.errno == errno.ENAMETOOLONG else "choose a folder that you may write to"
    return InputError(f"cannot write {target}: {error.strerror}; {what_now}")


def no_room_for(target: Path) -> InputError:
    """The error where a disk is full."""
    return InputError(f"cannot write {target}: the disk is full; free some space, or choose another disk")


def out_of_room(error: OSError | SafetensorError) -> bool:
    """Whether an error says that a disk, or what a user may have of it, is full."""
    if isinstance(error, OSError):
        return error.errno in _OUT_OF_ROOM
    return any(f"os error {number}" in str(error) for number in _OUT_OF_ROOM)


def came_of_no_room(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that a disk is full."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError | SafetensorError) and out_of_room(link):
            return True
        link = link.__cause__ or link.__context__
    return False


LIST = ".spectralbasis"
_GENERATOR = b'<meta name="generator" content="spectralbasis '
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
        raise InputError(f"the output folder {path} is the root of a disk; name a folder on it")
    if not _holds_something(place):
        return
    if not overwrite:
        raise InputError(
            f"the output folder {path} is not empty; name a new one, or add --overwrite (overwrite=True) to replace it"
        )
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
    """Record files that are about to be written into a folder; the folder is made where it is absent.

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
        file = folder / name
        if name in ours or not file.exists():
            continue
        with file.open("rb") as page:  # a page that this package made says so at its beginning
            is_our_page = _GENERATOR in page.read(_BEGINNING)
        if not is_our_page:
            raise InputError(
                f"the output folder {folder} holds {name}, which no earlier run wrote there, so it is not replaced; "
                "move it away, or name a new folder"
            )
    if not ours.keys() >= set(names):
        with atomic_path(folder / LIST) as temporary:
            _write_list(temporary, {**dict.fromkeys(names, ""), **ours})


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
            raise BusyError(f"another command is writing {path}; wait for it, or name another folder")
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
                number = 1
                while os.path.lexists(other := target.with_name(f"{target.name}-{number}")):
                    number += 1
                fresh.rename(other)
                raise InputError(f"the output folder {target} was written by another process; the result is in {other}")
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
