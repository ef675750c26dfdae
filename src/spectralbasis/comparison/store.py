"""Results on disk while a comparison runs, so that one that was stopped goes on."""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from spectralbasis.comparison.rows import Row, row_values
from spectralbasis.errors import InputError

FORMAT_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS pairs (
    tuned TEXT NOT NULL, matrix TEXT NOT NULL, content TEXT NOT NULL, rows TEXT NOT NULL,
    PRIMARY KEY (tuned, matrix)
);
"""


class Store:
    """Rows by (tuned, matrix); a pair counts as done only for the very weights (`content`) that it was made from."""

    def __init__(self, path: Path | None, settings: dict[str, str], *, resume: bool) -> None:
        """Open the store of a folder, or one in memory where `path` is None.

        Raises:
            InputError: the file is damaged or not writable, or `resume` meets results of other settings.
        """
        self.path = path
        if path is not None and not resume:
            path.unlink(missing_ok=True)
        try:
            self._connection = sqlite3.connect(path or ":memory:")
            with self._connection:
                self._connection.executescript(_SCHEMA)
            self._check_settings({"format": str(FORMAT_VERSION), **settings})
        except sqlite3.Error as error:
            raise InputError(f"{path} cannot be used ({error}); remove it, or choose another output folder") from error

    def _check_settings(self, settings: dict[str, str]) -> None:
        known = dict(self._connection.execute("SELECT name, value FROM settings"))
        for name, value in settings.items():
            if known.get(name, value) != value:
                raise InputError(
                    f"{self.path} was made with {name}={known[name]}, not {value}; "
                    "resume with the same settings, or leave out --resume to start again"
                )
        with self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", settings.items())

    def has(self, tuned: str, matrix: str, content: str) -> bool:
        """Whether this pair was measured on weights with this content."""
        query = "SELECT 1 FROM pairs WHERE tuned = ? AND matrix = ? AND content = ?"
        return self._connection.execute(query, (tuned, matrix, content)).fetchone() is not None

    def put(self, tuned: str, matrix: str, content: str, rows: Iterable[Row]) -> None:
        """Record one measured pair, all of it or nothing."""
        record = (tuned, matrix, content, json.dumps([row_values(row) for row in rows]))
        with self._connection:
            self._connection.execute("INSERT OR REPLACE INTO pairs VALUES (?, ?, ?, ?)", record)

    def rows(self, pairs: Iterable[tuple[str, str]]) -> Iterator[Row]:
        """The rows of these (tuned, matrix) pairs, in their order."""
        for pair in pairs:
            query = "SELECT rows FROM pairs WHERE tuned = ? AND matrix = ?"
            for (text,) in self._connection.execute(query, pair):
                yield from (Row(*values) for values in json.loads(text))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()
