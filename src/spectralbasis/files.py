"""Writing files so that a reader never sees half of one."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from spectralbasis.errors import InputError
from spectralbasis.locks import held, left_over, shared

_OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` when the block succeeds and is removed when it fails.

    What a process that was killed left of the same file is removed too.

    Raises:
        InputError: the folder cannot be created or written to, or there is no room for the file.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with held(target.parent) as nobody_writes:
            for left in left_over(target, target.suffix) if nobody_writes else ():
                left.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from error
    with shared(target.parent):
        try:
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
        except OSError as error:
            raise _unwritable(target, error) from error
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            _to_disk(temporary)
            temporary.replace(target)
        except (OSError, SafetensorError) as error:
            if not out_of_room(error):
                raise
            raise no_room_for(target) from error
        finally:
            temporary.unlink(missing_ok=True)


def _unwritable(target: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {target}: {error.strerror}; choose a folder that you may write to")


def _to_disk(file: Path) -> None:
    """Wait until the bytes are on the disk, so that a machine that loses its power leaves no empty file."""
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())


def no_room_for(target: Path) -> InputError:
    """The error where a disk is full."""
    return InputError(f"cannot write {target}: there is no room for it; free some, or choose another disk")


def out_of_room(error: OSError | SafetensorError) -> bool:
    """Whether an error says that a disk, or what a user may have of it, is full."""
    if isinstance(error, OSError):
        return error.errno in _OUT_OF_ROOM
    return any(f"os error {number}" in str(error) for number in _OUT_OF_ROOM)


def came_of_no_room(error: BaseException) -> bool:
    """Whether an error, or one that it came of, says that a disk is full."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError | SafetensorError) and out_of_room(link):
            return True
        link = link.__cause__ or link.__context__
    return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
