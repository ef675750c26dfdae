"""Locks that the system takes back when their process ends, however it ends."""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Hold the lock of a file or folder that exists, and say whether; not where another holds it or there are none."""
    try:
        handle = _lock(path)
    except BlockingIOError:
        handle = None
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def is_held(path: Path) -> bool | None:
    """Whether a living process holds the lock of a file or folder; None where that cannot be told."""
    try:
        handle = _lock(path)
    except BlockingIOError:
        return True
    if handle is None:
        return None
    os.close(handle)
    return False


def _lock(path: Path) -> int | None:
    """The handle that holds a lock; None where there is no such path, or the file system has no locks.

    Raises:
        BlockingIOError: another holds it.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle


@contextmanager
def shared(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder together with others, once nobody holds it alone; not where there are none."""
    with ExitStack() as held_open:
        if fcntl is not None:
            with suppress(OSError):
                handle = os.open(folder, os.O_RDONLY)
                held_open.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_SH)
        yield


def left_over(target: Path, suffix: str = "") -> Iterator[Path]:
    """The temporary files or folders beside `target` that `tempfile` named `.TARGET.XXXXXXXX` with a suffix."""
    pattern = re.compile(re.escape(f".{target.name}.") + "[a-z0-9_]{8}" + re.escape(suffix))
    yield from (path for path in target.parent.iterdir() if pattern.fullmatch(path.name))
