"""Output folders that appear whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from spectralbasis.errors import InputError
from spectralbasis.files import no_room_for, out_of_room
from spectralbasis.locks import held, is_held, left_over


def check_output(path: Path, *, overwrite: bool, written_file: str) -> None:
    """Refuse an output folder that holds something, unless `overwrite` is set and an earlier run wrote it.

    `written_file` is the file by which a folder of ours is known: nothing else is ever replaced.

    Raises:
        InputError: the folder is in use, or is a file.
    """
    if path.is_file():
        raise InputError(f"the output {path} is a file; name a new folder")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise InputError(f"the output folder {path} is not empty; name a new one, or pass overwrite to replace it")
    if not (path / written_file).is_file():
        raise InputError(f"the output folder {path} holds no {written_file}, so it is not replaced; name a new one")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it takes the path's place when the block succeeds, else it is removed.

    What a process that was killed left of the same folder is removed too.

    Raises:
        InputError: the parent folder cannot be created or written to, there is no room, or another process is writing
            the folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose a folder that you may write to") from error
    try:
        with held(scratch):
            fresh = scratch / "new"
            fresh.mkdir(parents=True)  # another may have cleared it away before it was locked
            _clear(path, scratch)
            yield fresh
            if path.exists():
                path.rename(scratch / "old")
            fresh.rename(path)
    except (OSError, SafetensorError) as error:
        if not out_of_room(error):
            raise
        raise no_room_for(path) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _clear(path: Path, ours: Path) -> None:
    """Remove what killed processes left of a folder; a living one, which holds its lock, is not disturbed."""
    for left in left_over(path):
        if left == ours or (state := is_held(left)) is None:
            continue
        if state:
            raise InputError(f"another command is writing {path}; wait for it, or name another folder")
        if (left / "old").is_dir() and not path.exists():
            (left / "old").rename(path)
        shutil.rmtree(left, ignore_errors=True)
