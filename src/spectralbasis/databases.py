"""SQLite files of this package: opened by one process at a time, and only if they hold nothing else.

A database may come from an unknown source. Views, triggers and virtual tables run code when a table is read, a link can
lead to another program's database, and a journal can name files that SQLite deletes. So the file is checked before
SQLite opens it, and its schema before any table is read.
"""

import hashlib
import hmac
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from spectralbasis.errors import InputError
from spectralbasis.files import cache_folder, check_output_file

LARGEST_CELL = 1 << 30
"""Bytes of one value: the measurements of one run or of one matrix take a thousandth of it."""
_SECONDS = 20
"""How long a sound file takes at most until its schema is read; a prepared one may never come to an end."""
_HEADER = b"SQLite format 3\0"
_SUPER_JOURNAL = bytes.fromhex("d9d505f920a163d7")
_KEY_BYTES = 32


@dataclass(frozen=True)
class Kind:
    """A kind of database.

    Attributes:
        application_id: tells our files from those of others.
        version: of the tables; files of other versions are refused.
        tables: the statements that make them, as SQLite keeps them.
        writer: what writes into it, for messages: "comparison".
        remedy: what a person can do about a file that cannot be used.
    """

    application_id: int
    version: int
    tables: tuple[str, ...]
    writer: str
    remedy: str


@contextmanager
def opened(path: Path | None, kind: Kind, *, fresh: bool = False) -> Iterator[sqlite3.Connection]:
    """Open a database for this process alone, or make it; the one way to open one, with its lock and its messages.

    Args:
        path: the file; None: a database in memory.
        kind: what it must be.
        fresh: drop what is in it, of whatever version.

    Raises:
        InputError: another process uses the file, it is damaged, not writable, not ours, or of another version.
    """
    with ExitStack() as stack:
        try:
            if path is not None:
                _check_file(path, kind, fresh)
            connection = sqlite3.connect(path or ":memory:", timeout=0)
            stack.callback(connection.close)
            _prepare(connection, path, kind, fresh)
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # the last: SQLite quotes what a bad disk made
            folder = path and path.parent
            if isinstance(error, OSError):
                message = f"cannot write {folder}: {error.strerror}; choose a folder that you may write to"
            elif "locked" in str(error):
                message = f"another {kind.writer} is writing into {folder}; wait for it, or choose another folder"
            else:
                message = f"{path} cannot be used ({error}); {kind.remedy}"
            raise InputError(message) from error
        yield connection


def _check_file(path: Path, kind: Kind, fresh: bool) -> None:
    """Refuse links, files that are no database of this kind, and journals that no process of ours left."""
    check_output_file(path)
    for suffix in ("-journal", "-wal", "-shm"):
        check_output_file(path.with_name(path.name + suffix))
    with suppress(FileNotFoundError), path.with_name(f"{path.name}-journal").open("rb") as journal:
        start = journal.read(28)
        pages, size = int.from_bytes(start[16:20], "big"), int.from_bytes(start[24:28], "big")
        if path.exists() and pages * size > path.stat().st_size:
            raise InputError(
                f"{journal.name} is not a journal that spectralbasis left: it belongs to a larger file; {kind.remedy}"
            )
        journal.seek(max(os.fstat(journal.fileno()).st_size - len(_SUPER_JOURNAL), 0))
        if journal.read() == _SUPER_JOURNAL:
            raise InputError(
                f"{journal.name} is not a journal that spectralbasis left: it names other files; {kind.remedy}"
            )
    with suppress(FileNotFoundError), path.open("rb") as file:
        header = file.read(100)
        if not header:
            return
        found = int.from_bytes(header[68:72], "big"), int.from_bytes(header[60:64], "big")
        if header[:16] != _HEADER or header[18:20] != b"\x01\x01" or found[0] != kind.application_id:
            raise InputError(
                f"{path} is not a database of a spectralbasis {kind.writer}, or it is damaged; {kind.remedy}"
            )
        if found[1] != kind.version and not fresh:
            raise InputError(
                f"{path} has format {found[1]}, this version reads format {kind.version}; use the version of "
                f"spectralbasis that wrote it, or {kind.remedy}"
            )


def _prepare(connection: sqlite3.Connection, path: Path | None, kind: Kind, fresh: bool) -> None:
    """Lock the file, and make its tables or check that they are ours and whole."""
    # Text that a bad disk has damaged is read all the same, so that its checksum shows it.
    connection.text_factory = partial(str, encoding="utf-8", errors="replace")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST_CELL)
    foreign = InputError(f"{path} holds tables that do not belong to a spectralbasis {kind.writer}; {kind.remedy}")
    with _within(_SECONDS, connection):
        # Held until the connection closes, also by a crash: a second process finds the file locked.
        for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "locking_mode = EXCLUSIVE"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("BEGIN EXCLUSIVE")
        found = connection.execute("SELECT type, name, sql FROM sqlite_master LIMIT 100").fetchall()
        if fresh:
            for what, name, sql in found:  # nothing is dropped but plain tables of ours, of whatever version
                plain = sql is None if what == "index" else what == "table" and str(sql).startswith("CREATE TABLE ")
                if not plain or not str(name).replace("_", "").isalnum():
                    raise foreign
            for name in (name for what, name, _ in found if what == "table"):
                connection.execute(f'DROP TABLE "{name}"')
            found = []
        if not found:
            for statement in (*kind.tables, f"PRAGMA application_id = {kind.application_id}"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {kind.version}")
            found = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
        # Indexes of keys belong to their table; anything else that is no table is refused.
        tables = {sql for what, _, sql in found if not (what == "index" and sql is None)}
        if tables != set(kind.tables) or len(found) > 2 * len(kind.tables):
            raise foreign
        connection.execute("COMMIT")
    (state,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if state != "ok":
        raise sqlite3.DatabaseError(state)


@contextmanager
def _within(seconds: float, connection: sqlite3.Connection) -> Iterator[None]:
    """Stop what a database is made to do when the time is over."""
    end = time.monotonic() + seconds
    connection.set_progress_handler(lambda: time.monotonic() > end, 10_000)
    try:
        yield
    finally:
        connection.set_progress_handler(None, 0)


def seal(*parts: str | bytes | None) -> str:
    """A checksum that only this user can make, by which a row that was stored here is told from one from elsewhere.

    It is keyed by a secret in the user's cache folder. Where that cannot be read or made, as in a folder that may not
    be written to, the secret belongs to this process alone, and the next process takes its rows for foreign ones.
    """
    digest = hashlib.blake2b(key=_key(cache_folder()), digest_size=16)
    for part in parts:
        content = b"" if part is None else part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        digest.update(f"{-1 if part is None else len(content)}:".encode() + content)
    return digest.hexdigest()


def is_sealed(found: object, *parts: str | bytes | None) -> bool:
    """Whether a seal is the one that this user makes of these parts."""
    return isinstance(found, str) and hmac.compare_digest(seal(*parts).encode(), found.encode("utf-8", "replace"))


@cache
def _key(folder: Path) -> bytes:
    """The secret of this user, made when it is first needed; one for this process where none can be kept."""
    file = folder / "key"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(file):
            _make_key(file)
        return _read_key(file) or os.urandom(_KEY_BYTES)
    except OSError:
        return os.urandom(_KEY_BYTES)


def _make_key(file: Path) -> None:
    """Write a new secret, whole before it has its name, unless another process has written one meanwhile."""
    temporary = file.with_name(f"key.{os.getpid()}.{os.urandom(4).hex()}")
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(handle, "wb") as opened_file:
            opened_file.write(os.urandom(_KEY_BYTES))
        try:
            os.link(temporary, file)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _read_key(file: Path) -> bytes | None:
    """The secret in a file; None where another user may have put it there."""
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
        return None
    with file.open("rb") as opened_file:
        key = opened_file.read(_KEY_BYTES + 1)
    return key if len(key) == _KEY_BYTES else None
