"""Locks that the system takes back when their process ends, however it ends."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


TRIES, PAUSE = 10, 0.005
"""How often, and with which pause in seconds, a shared lock is asked for while somebody clears a folder."""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder that exists; where another holds it or there are no locks, hold nothing."""
    try:
        handle = _lock(path)
    except BlockingIOError:
        handle = None
    try:
        yield
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
    """Keep `is_quiet` of a folder false meanwhile, for as many as ask; where there are no locks, do nothing."""
    handle = None
    if fcntl is not None:
        handle = os.open(folder, os.O_RDONLY)
        for _ in range(TRIES):
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(PAUSE)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def quiet(folder: Path) -> Iterator[bool]:
    """Whether nobody holds the lock of a folder, shared or alone; nobody gets it meanwhile."""
    try:
        handle = _lock(folder)
    except BlockingIOError:
        handle = None
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def left_over(target: Path, suffix: str = "") -> Iterator[Path]:
    """The temporary files or folders beside `target` that `tempfile` named `.TARGET.XXXXXXXX` with a suffix."""
    pattern = re.compile(re.escape(f".{target.name}.") + "[a-z0-9_]{8}" + re.escape(suffix))
    yield from (path for path in target.parent.iterdir() if pattern.fullmatch(path.name))
