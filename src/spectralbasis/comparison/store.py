"""Results on disk while a comparison runs, so that one that was stopped goes on."""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

from spectralbasis.checksums import checksum
from spectralbasis.comparison.rows import Row, SharedRow, row_values
from spectralbasis.comparison.sharing import Pair
from spectralbasis.errors import InputError

FORMAT_VERSION = 2
_WITHOUT_CHECKSUMS = 1
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS pairs (tuned TEXT NOT NULL, matrix TEXT NOT NULL, content TEXT NOT NULL,"
    " rows TEXT NOT NULL, PRIMARY KEY (tuned, matrix))",
    "CREATE TABLE IF NOT EXISTS shared (tuned_a TEXT NOT NULL, tuned_b TEXT NOT NULL, matrix TEXT NOT NULL,"
    " content TEXT NOT NULL, rows TEXT NOT NULL, PRIMARY KEY (tuned_a, tuned_b, matrix))",
)


class Store:
    """Rows by (tuned, matrix), and by (tuned_a, tuned_b, matrix) what two finetuned checkpoints share.

    Either counts as done only for the very weights (`content`) that it was made from, and only while it has its
    checksum: what a bad disk has changed is measured again.
    """

    def __init__(self, path: Path | None, settings: dict[str, str], *, resume: bool) -> None:
        """Open the store of a folder, or one in memory where `path` is None, for this process alone.

        Raises:
            InputError: another process uses the file, it is damaged or not writable, or `resume` meets results of
                other settings or of a newer version.
        """
        self.path = path
        with ExitStack() as on_failure:
            try:
                self._connection = sqlite3.connect(path or ":memory:", timeout=0)
                on_failure.callback(self._connection.close)
                self._connection.text_factory = partial(str, encoding="utf-8", errors="replace")
                self._begin(settings, resume)
            except sqlite3.DatabaseError as error:
                raise InputError(self._explain(error)) from error
            on_failure.pop_all()

    def _begin(self, settings: dict[str, str], resume: bool) -> None:
        # Held until the connection closes, also by a crash: a second comparison into the folder finds it locked.
        self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        with self._connection:
            self._connection.execute("BEGIN EXCLUSIVE")
            if not resume:
                for table in ("settings", "pairs", "shared"):
                    self._connection.execute(f"DROP TABLE IF EXISTS {table}")
            for statement in _SCHEMA:
                self._connection.execute(statement)
        (state,) = self._connection.execute("PRAGMA integrity_check(1)").fetchone()
        if state != "ok":
            raise sqlite3.DatabaseError(state)
        self._check_format()
        self._check_settings(settings)

    def _explain(self, error: sqlite3.Error) -> str:
        if "locked" in str(error):
            return (
                f"another comparison is writing into {self.path and self.path.parent}; wait for it, or choose another"
            )
        return f"{self.path} cannot be used ({error}); remove it, or choose another output folder"

    def _check_format(self) -> None:
        found = self._connection.execute("SELECT value FROM settings WHERE name = 'format'").fetchone()
        if found is not None and found[0] not in (str(FORMAT_VERSION), str(_WITHOUT_CHECKSUMS)):
            raise InputError(
                f"{self.path} has format {found[0]}, this version reads up to {FORMAT_VERSION}; update spectralbasis, "
                "or leave out --resume to start again"
            )

    def _check_settings(self, settings: dict[str, str]) -> None:
        known = dict(self._connection.execute("SELECT name, value FROM settings"))
        for name, value in settings.items():
            if known.get(name, value) != value:
                raise InputError(
                    f"{self.path} was made with {name}={known[name]}, not {value}; "
                    "resume with the same settings, or leave out --resume to start again"
                )
        with self._connection:
            now = {"format": str(FORMAT_VERSION), **settings}
            self._connection.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", now.items())

    def contents(self, matrix: str) -> dict[str, str]:
        """Label → content hash of the pairs of this matrix that were measured."""
        query = "SELECT tuned, content, rows FROM pairs WHERE matrix = ?"
        found = self._connection.execute(query, (matrix,))
        return {tuned: content for tuned, content, text in found if _values(text, tuned, matrix, content) is not None}

    def put(self, tuned: str, matrix: str, content: str, rows: Iterable[Row]) -> None:
        """Record one measured pair, all of it or nothing."""
        record = (tuned, matrix, content, _text(rows, tuned, matrix, content))
        self._write("INSERT OR REPLACE INTO pairs VALUES (?, ?, ?, ?)", record)

    def rows(self, pairs: Iterable[tuple[str, str]]) -> Iterator[Row]:
        """The rows of these (tuned, matrix) pairs, in their order."""
        for pair in pairs:
            query = "SELECT content, rows FROM pairs WHERE tuned = ? AND matrix = ?"
            for content, text in self._connection.execute(query, pair):
                yield from (Row(*values) for values in _values(text, *pair, content) or ())

    def _write(self, statement: str, record: tuple[str, ...]) -> None:
        try:
            with self._connection:
                self._connection.execute(statement, record)
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"{self.path} cannot be written ({error}); what was measured before is kept: free some room, or make "
                "the folder writable, and go on with --resume"
            ) from error

    def shared_contents(self, matrix: str) -> dict[Pair, str]:
        """Two labels → content hash of what was measured of this matrix between them."""
        query = "SELECT tuned_a, tuned_b, content, rows FROM shared WHERE matrix = ?"
        found = self._connection.execute(query, (matrix,))
        return {(a, b): content for a, b, content, text in found if _values(text, a, b, matrix, content) is not None}

    def put_shared(self, pair: Pair, matrix: str, content: str, rows: Iterable[SharedRow]) -> None:
        """Record what two finetuned checkpoints share in a matrix, all of it or nothing."""
        record = (*pair, matrix, content, _text(rows, *pair, matrix, content))
        self._write("INSERT OR REPLACE INTO shared VALUES (?, ?, ?, ?, ?)", record)

    def shared_rows(self, pairs: Iterable[tuple[Pair, str]]) -> Iterator[SharedRow]:
        """The rows of these (two labels, matrix), in their order."""
        for (a, b), matrix in pairs:
            query = "SELECT content, rows FROM shared WHERE tuned_a = ? AND tuned_b = ? AND matrix = ?"
            for content, text in self._connection.execute(query, (a, b, matrix)):
                yield from (SharedRow(*values) for values in _values(text, a, b, matrix, content) or ())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()


def _text(rows: Iterable[Row] | Iterable[SharedRow], *key: str) -> str:
    """Rows as the store keeps them: the checksum of them and of what they belong to, and their values."""
    text = json.dumps([row_values(row) for row in rows])
    return f"{checksum(*key, text)} {text}"


def _values(stored: str, *key: str) -> list[Any] | None:
    """The values of rows as `_text` wrote them, or as format 1 did, without checksum; None where they are damaged."""
    kept, _, text = ("", "", stored) if stored.startswith("[") else stored.partition(" ")
    if kept and kept != checksum(*key, text):
        return None
    try:
        values: list[Any] = json.loads(text)
    except ValueError:
        return None
    return values
