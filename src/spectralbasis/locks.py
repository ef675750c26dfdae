"""Locks that the system takes back when their process ends, however it ends."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder that exists; where the system has no locks, nothing is held."""
    handle = _lock(path)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock of a file or folder; True where that cannot be told."""
    handle = _lock(path)
    if handle is None:
        return path.exists()
    os.close(handle)
    return False


def _lock(path: Path) -> int | None:
    """The handle that holds the lock; None where another holds it, or there are no locks here."""
    if fcntl is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def left_over(target: Path, suffix: str = "") -> Iterator[Path]:
    """The temporary files or folders beside `target` that `tempfile` named `.TARGET.XXXXXXXX` with a suffix."""
    pattern = re.compile(re.escape(f".{target.name}.") + "[a-z0-9_]{8}" + re.escape(suffix))
    yield from (path for path in target.parent.iterdir() if pattern.fullmatch(path.name))
