"""Finished runs on disk: a database while a study goes on, and tables of its rows to keep and to pass on."""

import io
import json
import sqlite3
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

import pandas as pd
import xxhash

from spectralbasis.checksums import checksum
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path
from spectralbasis.study.runs.run import Outcome, Record, Results, Run

FORMAT_VERSION = 1
DATABASE = "runs.sqlite"
ROWS = "runs.parquet"
MEASUREMENTS = "measurements.parquet"
_COLUMNS = ("key", "action", "settings", "seed", "needs", "result", "error", "seconds", "versions", "finished")
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS format (version INTEGER NOT NULL)",
    f"CREATE TABLE IF NOT EXISTS runs ({', '.join(_COLUMNS)}, measurements BLOB, PRIMARY KEY (key))",
    # Apart, so that a folder of an earlier version is one of this version, and the other way round.
    "CREATE TABLE IF NOT EXISTS checksums (key PRIMARY KEY, checksum TEXT NOT NULL)",
)
_INSERT = f"INSERT OR REPLACE INTO runs VALUES ({', '.join('?' * (len(_COLUMNS) + 1))})"
_INSERT_CHECKSUM = "INSERT OR REPLACE INTO checksums VALUES (?, ?)"


@dataclass(frozen=True)
class Timing:
    """How long one run took: its kind, see `Run.kind`, and its seconds."""

    kind: tuple[str, ...]
    seconds: float


class RunStore:
    """The runs of a study folder. One process at a time holds it; each run is written whole or not at all.

    A folder without a database but with exported rows starts from those. A run whose row has not its checksum, as
    where a bad disk has changed it, counts as not done.
    """

    def __init__(self, folder: Path) -> None:
        """Open the store of a folder, which is made where it is absent.

        Raises:
            InputError: the folder cannot be written, another study uses it, or its files are damaged or of a newer
                version.
        """
        self.folder = folder
        self.path = folder / DATABASE
        self._records: dict[str, Record] = {}
        self._errors: dict[str, str] = {}
        self.timings: list[Timing] = []
        with ExitStack() as on_failure:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._connection = sqlite3.connect(self.path, timeout=0)
                on_failure.callback(self._connection.close)
                self._connection.text_factory = partial(str, encoding="utf-8", errors="replace")
                self._begin()
                is_empty = self._connection.execute("SELECT 1 FROM runs").fetchone() is None
            except (sqlite3.DatabaseError, OSError) as error:
                raise InputError(self._explain(error)) from error
            if is_empty and (folder / ROWS).exists():
                self._import()
            self._read()
            on_failure.pop_all()

    @property
    def results(self) -> Results:
        """What is known; it grows with the store."""
        return Results(self._records, self._errors)

    def put(self, run: Run, outcome: Outcome, seconds: float, versions: Mapping[str, Any]) -> None:
        """Record a finished run.

        Raises:
            InputError: the database cannot be written, as on a full disk.
        """
        table = outcome.measurements
        content = json.dumps(outcome.result)
        self._write(run, content, None, seconds, versions, None if table is None else _to_bytes(table))
        record = Record(
            json.loads(content), pd.DataFrame() if table is None else table, seconds, dict(versions), run.seed
        )
        self._errors.pop(run.key, None)
        self._records[run.key] = record
        self.timings.append(Timing(run.kind, seconds))

    def put_error(self, run: Run, error: str, seconds: float, versions: Mapping[str, Any]) -> None:
        """Record a run that failed."""
        self._write(run, None, error, seconds, versions, None)
        self._errors[run.key] = error

    def forget_errors(self) -> None:
        """Take failed runs for not done, so that they are tried again."""
        with self._connection:
            self._connection.execute(
                "DELETE FROM checksums WHERE key IN (SELECT key FROM runs WHERE error IS NOT NULL)"
            )
            self._connection.execute("DELETE FROM runs WHERE error IS NOT NULL")
        self._errors.clear()

    def export(self) -> None:
        """Write all rows beside the database, measurements apart, as tables that other tools read."""
        rows = pd.read_sql(f"SELECT {', '.join(_COLUMNS)} FROM runs ORDER BY finished, key", self._connection)
        with atomic_path(self.folder / ROWS) as temporary:
            rows.astype({"result": "string", "error": "string"}).to_parquet(
                temporary, index=False, write_page_checksum=True
            )
        measured = {key: record.measurements for key, record in self._records.items() if len(record.measurements)}
        with atomic_path(self.folder / MEASUREMENTS) as temporary:
            table = pd.concat(measured, names=["key"]).reset_index("key") if measured else pd.DataFrame({"key": []})
            table.to_parquet(temporary, index=False, compression="zstd", write_page_checksum=True)

    def _begin(self) -> None:
        # Held until the connection closes, also by a crash: a second study in the folder finds it locked.
        self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        with self._connection:
            self._connection.execute("BEGIN EXCLUSIVE")
            for statement in _SCHEMA:
                self._connection.execute(statement)
            found = self._connection.execute("SELECT version FROM format").fetchone()
            if found is None:
                self._connection.execute("INSERT INTO format VALUES (?)", (FORMAT_VERSION,))
        (state,) = self._connection.execute("PRAGMA integrity_check(1)").fetchone()
        if state != "ok":
            raise sqlite3.DatabaseError(state)
        if found is not None and found[0] > FORMAT_VERSION:
            raise InputError(
                f"{self.path} was written by a newer spectralbasis (format {found[0]}, this one reads up to "
                f"{FORMAT_VERSION}); update spectralbasis, or choose another folder"
            )

    def _explain(self, error: Exception) -> str:
        if isinstance(error, OSError):
            return f"cannot write {self.folder}: {error.strerror}; choose a folder that you may write to"
        if "locked" in str(error):
            return f"another study is writing into {self.folder}; wait for it, or choose another folder"
        return (
            f"{self.path} cannot be used ({error}); remove it to go on from the exported rows, or choose another folder"
        )

    def _import(self) -> None:
        """Fill a new database with the rows that an earlier one exported."""
        try:
            read = partial(pd.read_parquet, page_checksum_verification=True)
            rows = read(self.folder / ROWS)
            file = self.folder / MEASUREMENTS
            measured = read(file) if file.exists() else pd.DataFrame({"key": []})
            tables = {str(key): table.drop(columns="key") for key, table in measured.groupby("key", sort=False)}
            values = [
                (*(_plain(row[column]) for column in _COLUMNS), _blob(tables.get(row["key"])))
                for row in rows[list(_COLUMNS)].to_dict("records")
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._connection.close()
            self.path.unlink(missing_ok=True)
            raise InputError(
                f"the rows in {self.folder} cannot be read ({error}); restore {ROWS} and {MEASUREMENTS}, "
                "or move them away to start again"
            ) from error
        with self._connection:
            self._connection.executemany(_INSERT, values)
            self._connection.executemany(_INSERT_CHECKSUM, ((row[0], _checksum(row)) for row in values))

    def _read(self) -> None:
        self._forget_damaged()
        columns = "key, action, settings, result, error, seconds, versions, seed, measurements"
        for key, action, settings, result, error, seconds, versions, seed, blob in self._connection.execute(
            f"SELECT {columns} FROM runs"
        ):
            if error is not None:
                self._errors[key] = error
                continue
            table = pd.DataFrame() if blob is None else pd.read_parquet(io.BytesIO(blob))
            self._records[key] = Record(json.loads(result), table, seconds, json.loads(versions), seed)
            self.timings.append(Timing(Run(action, json.loads(settings)).kind, seconds))

    def _forget_damaged(self) -> None:
        """Drop the runs whose rows have not their checksum; rows of earlier versions have none."""
        kept = dict(self._connection.execute("SELECT key, checksum FROM checksums"))
        rows = self._connection.execute(f"SELECT {', '.join(_COLUMNS)}, measurements FROM runs")
        damaged = [row[:1] for row in rows if row[0] in kept and kept.pop(row[0]) != _checksum(row)]
        with self._connection:
            self._connection.executemany("DELETE FROM runs WHERE key = ?", damaged)

    def _write(
        self,
        run: Run,
        result: str | None,
        error: str | None,
        seconds: float,
        versions: Mapping[str, Any],
        measurements: bytes | None,
    ) -> None:
        needs = json.dumps({role: need.key for role, need in run.needs.items()})
        settings, made_with = json.dumps(run.settings, sort_keys=True), json.dumps(versions)
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        row = (
            run.key,
            run.action,
            settings,
            run.seed,
            needs,
            result,
            error,
            seconds,
            made_with,
            finished,
            measurements,
        )
        try:
            with self._connection:
                self._connection.execute(_INSERT, row)
                self._connection.execute(_INSERT_CHECKSUM, (run.key, _checksum(row)))
        except sqlite3.DatabaseError as problem:
            raise InputError(
                f"{self.path} cannot be written ({problem}); what was finished before is kept: free some room, or "
                "make the folder writable, and give the same command again"
            ) from problem

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()


def _checksum(row: tuple[Any, ...]) -> str:
    """Of a row of the table `runs`, as the database gives it back."""
    *values, measurements = row
    return checksum(*map(repr, values), xxhash.xxh3_128_hexdigest(measurements or b""))


def _to_bytes(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, compression="zstd")
    return buffer.getvalue()


def _blob(table: pd.DataFrame | None) -> bytes | None:
    """The measurements of one run; columns that only other runs have are left out."""
    return None if table is None else _to_bytes(table.dropna(axis="columns", how="all").reset_index(drop=True))


def _plain(value: Any) -> Any:
    if value is None or value is pd.NA:
        return None
    return value.item() if hasattr(value, "item") else value
