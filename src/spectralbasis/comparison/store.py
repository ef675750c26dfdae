"""Results stored on disk during a comparison, so that a stopped comparison can be continued."""

import json
import math
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, Self, TypeVar

from spectralbasis.comparison.metrics import Row, SharedRow, row_values
from spectralbasis.comparison.sharing import Pair
from spectralbasis.databases import Kind, is_sealed, opened, seal
from spectralbasis.errors import InputError
from spectralbasis.files import checksum
from spectralbasis.printable import shortened
from spectralbasis.records import checked, parse_json

AnyRow = TypeVar("AnyRow", Row, SharedRow)
STORE = Kind(
    application_id=0x53504343,
    version=4,
    tables=(
        "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
        "CREATE TABLE pairs (tuned TEXT NOT NULL, matrix TEXT NOT NULL, content TEXT NOT NULL, rows TEXT NOT NULL,"
        " seal TEXT NOT NULL, checksum TEXT NOT NULL, PRIMARY KEY (tuned, matrix))",
        "CREATE TABLE shared (tuned_a TEXT NOT NULL, tuned_b TEXT NOT NULL, matrix TEXT NOT NULL,"
        " content TEXT NOT NULL, rows TEXT NOT NULL, seal TEXT NOT NULL, checksum TEXT NOT NULL,"
        " PRIMARY KEY (tuned_a, tuned_b, matrix))",
    ),
    writer="comparison",
    remedy="remove it, or choose another output folder",
)
_TABLES = ("pairs", "shared")


class Store:
    """Rows by (tuned, matrix), and by (tuned_a, tuned_b, matrix) what two finetuned checkpoints share.

    Both count as done only for the weights (`content`) that they were made from, and only with their checksum: what a
    bad disk has changed is measured again. Both are used only with their seal, which only this user can make
    (`databases.seal`): rows that were stored elsewhere are refused, or sealed where the caller trusts them.
    """

    def __init__(self, path: Path | None, settings: dict[str, str], *, resume: bool, trust: bool = False) -> None:
        """Open the store of a folder, or one in memory where `path` is None, for this process alone.

        Raises:
            InputError: see `databases.opened`; or `resume` meets results of other settings, or results that this user
                did not store, without `trust`.
        """
        self.path = path
        self._settings = json.dumps(settings, sort_keys=True)
        with ExitStack() as stack:
            self._connection = stack.enter_context(opened(path, STORE, fresh=not resume))
            try:
                self._check_settings(settings)
                for table in _TABLES:
                    self._check_origin(table, trust)
            except sqlite3.DatabaseError as error:
                raise InputError(f"{path} cannot be used ({error}); {STORE.remedy}") from error
            self._closing = stack.pop_all()

    def _check_settings(self, settings: dict[str, str]) -> None:
        known = dict(self._connection.execute("SELECT name, value FROM settings"))
        for name, value in settings.items():
            if known.get(name, value) != value:
                raise InputError(
                    f"{self.path} was made with {name}={shortened(known[name], 80)}, not {value}; "
                    "resume with the same settings, or leave out --resume to start again"
                )
        with self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", settings.items())

    def _check_origin(self, table: str, trust: bool) -> None:
        """Refuse intact rows of other users, or seal them where they are trusted."""
        elsewhere = [
            (*key, text)
            for *key, text, sealed, check in self._connection.execute(f"SELECT * FROM {table}").fetchall()
            if check == _checksum(*key, text, sealed) and not is_sealed(sealed, self._settings, *key, text)
        ]
        if elsewhere and not trust:
            raise InputError(
                f"{self.path} holds results of {len({key[-3] for key in elsewhere})} matrices that this user did not "
                "store on this machine; add --trust (trust=True) to build on them, or leave out --resume to measure "
                "them again"
            )
        kind: type[Any] = Row if table == "pairs" else SharedRow
        for *key, text in elsewhere:
            self._rows(text, kind, *key)  # which checks them
            self._put(table, text, *key)

    def contents(self, matrix: str) -> dict[str, str]:
        """Label → content hash of the pairs of this matrix that were measured."""
        return {tuned: content for (tuned, _, content), _ in self._found("pairs", matrix=matrix)}

    def put(self, tuned: str, matrix: str, content: str, rows: Iterable[Row]) -> None:
        """Record one measured pair, all of it or nothing."""
        self._put("pairs", _text(rows), tuned, matrix, content)

    def rows(self, pairs: Iterable[tuple[str, str]]) -> Iterator[Row]:
        """The rows of these (tuned, matrix) pairs, in their order."""
        for tuned, matrix in pairs:
            for key, text in self._found("pairs", tuned=tuned, matrix=matrix):
                yield from self._rows(text, Row, *key)

    def shared_contents(self, matrix: str) -> dict[Pair, str]:
        """Two labels → content hash of what was measured of this matrix between them."""
        return {(a, b): content for (a, b, _, content), _ in self._found("shared", matrix=matrix)}

    def put_shared(self, pair: Pair, matrix: str, content: str, rows: Iterable[SharedRow]) -> None:
        """Record what two finetuned checkpoints share in a matrix, all of it or nothing."""
        self._put("shared", _text(rows), *pair, matrix, content)

    def shared_rows(self, pairs: Iterable[tuple[Pair, str]]) -> Iterator[SharedRow]:
        """The rows of these (two labels, matrix), in their order."""
        for (a, b), matrix in pairs:
            for key, text in self._found("shared", tuned_a=a, tuned_b=b, matrix=matrix):
                yield from self._rows(text, SharedRow, *key)

    def _found(self, table: str, **where: str) -> Iterator[tuple[list[str], str]]:
        """Key and rows of the records that have their checksum and seal."""
        condition = " AND ".join(f"{name} = ?" for name in where)
        query = f"SELECT * FROM {table} WHERE {condition}"
        for *key, text, sealed, check in self._connection.execute(query, tuple(where.values())):
            if check == _checksum(*key, text, sealed) and is_sealed(sealed, self._settings, *key, text):
                yield key, text

    def _rows(self, text: str, kind: type[AnyRow], *key: str) -> list[AnyRow]:
        where, remedy = f"the rows of {key[-2]} in {self.path}", "leave out --resume to measure them again"
        types: Any = tuple[tuple(field.type for field in fields(kind))]  # type: ignore[misc]
        found = [kind(*values) for values in checked(parse_json(text, where, remedy), list[types], where, remedy)]
        if any(row_values(row)[: len(key) - 1] != tuple(key[:-1]) for row in found):
            raise InputError(f"{where} belong to another matrix; {remedy}")
        if any(not (math.isnan(p := getattr(row, "p_value", math.nan)) or 0 <= p <= 1) for row in found):
            raise InputError(f"{where} hold a p_value outside 0 to 1; {remedy}")
        return found

    def _put(self, table: str, text: str, *key: str) -> None:
        sealed = seal(self._settings, *key, text)
        record = (*key, text, sealed, _checksum(*key, text, sealed))
        try:
            with self._connection:
                places = ", ".join("?" * len(record))
                self._connection.execute(f"INSERT OR REPLACE INTO {table} VALUES ({places})", record)
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"{self.path} cannot be written ({error}); what was measured before is kept: free some room, or make "
                "the folder writable, and continue with --resume"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()


def _text(rows: Iterable[Row] | Iterable[SharedRow]) -> str:
    return json.dumps([row_values(row) for row in rows])


def _checksum(*parts: object) -> str:
    """Checksum of a record, whose parts may have any type in a damaged file."""
    return checksum(*map(repr, parts))
