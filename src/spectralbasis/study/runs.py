"""Runs of a study, identified by their content, and the store of their results.

The store is a database during a study, and tables of its rows for archiving and sharing.
"""

import hashlib
import io
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import pandas as pd
import pyarrow.parquet
import xxhash

from spectralbasis.databases import Kind, is_sealed, opened, seal
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path, check_output_files, checksum, claim_files
from spectralbasis.records import Finite, checked, parse_json


@dataclass(frozen=True, eq=False)
class Run:
    """One unit of work; runs of the same content are one, whoever asks for them.

    Args:
        action: what is done, a key of `ACTIONS`.
        settings: plain JSON, all that decides the result save the seed and where the data lie.
        seed: of everything random in it.
        needs: role → an earlier run, whose folder this one reads.
    """

    action: str
    settings: Mapping[str, Any]
    seed: int = 0
    needs: Mapping[str, "Run"] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Hash of the content, the needs' included."""
        return run_key(self.action, self.settings, self.seed, {role: run.key for role, run in self.needs.items()})

    @property
    def kind(self) -> tuple[str, ...]:
        """The action, the model, the task and all other settings that are words, from the general to the special."""
        words = {name: value for name, value in self.settings.items() if isinstance(value, str)}
        order = sorted(words, key=lambda name: (name != "model", name != "task", name))
        return (self.action, *(words[name] for name in order))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        """The action and settings, words as they are and numbers by their names, and the seed."""
        words, others = [self.action], []
        for name, value in self.settings.items():
            if isinstance(value, str):
                words.append(value)
            elif value is True:
                others.append(name)
            elif isinstance(value, int | float) and value:
                others.append(f"{name} {value:g}")
        return ", ".join([" ".join(words), *others, f"seed {self.seed}"])


def run_key(action: str, settings: Mapping[str, Any], seed: int, needs: Mapping[str, str]) -> str:
    """What identifies a run; see `Run`. `needs` is role → key."""
    content = json.dumps([action, settings, seed, needs], sort_keys=True, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def with_needs(runs: Iterable[Run]) -> Iterator[Run]:
    """Each run once, after those that it needs."""
    seen: set[Run] = set()

    def visit(run: Run) -> Iterator[Run]:
        if run not in seen:
            seen.add(run)
            for need in run.needs.values():
                yield from visit(need)
            yield run

    for run in runs:
        yield from visit(run)


@dataclass(frozen=True)
class Site:
    """Where a run happens.

    Args:
        data: the folder of all data sets that the user named, or None.
        folder: the run's own, empty at first; what it writes there is kept while later runs need it.
        needs: role → folder of the finished run.
    """

    data: Path | None
    folder: Path
    needs: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The result of a run: plain JSON, and tidy measurements where there are many."""

    result: Mapping[str, Any]
    measurements: pd.DataFrame | None = None


Action = Callable[[Run, Site], Outcome]


@dataclass(frozen=True)
class Record:
    """A finished run as the store keeps it; `measurements` is empty where there are none."""

    result: Mapping[str, Any]
    measurements: pd.DataFrame
    seconds: float
    versions: Mapping[str, Any]
    seed: int


class Results:
    """What is known so far: the records of finished runs, and the errors of failed ones."""

    def __init__(self, records: Mapping[str, Record], errors: Mapping[str, str] | None = None) -> None:
        self._records = records
        self._errors = errors or {}

    def get(self, run: Run) -> Record | None:
        """The record of a run; None where it is not done, or failed."""
        return self._records.get(run.key)

    def error(self, run: Run) -> str | None:
        """Why the run failed; None where it did not."""
        return self._errors.get(run.key)


DATABASE = "runs.sqlite"
ROWS = "runs.parquet"
MEASUREMENTS = "measurements.parquet"
_COLUMNS = ("key", "action", "settings", "seed", "needs", "result", "error", "seconds", "versions", "finished")
STORE = Kind(
    application_id=0x53505253,
    version=2,
    tables=(
        f"CREATE TABLE runs ({', '.join(_COLUMNS)}, measurements BLOB, seal TEXT NOT NULL, checksum TEXT NOT NULL,"
        " PRIMARY KEY (key))",
    ),
    writer="study",
    remedy=f"remove it to go on from the exported rows in {ROWS} (with --trust), or choose another folder",
)
_INSERT = f"INSERT OR REPLACE INTO runs VALUES ({', '.join('?' * (len(_COLUMNS) + 3))})"
_VALUES: Any = tuple[str, str, str, int, str, str | None, str | None, Finite, str, str]


@dataclass(frozen=True)
class Timing:
    """How long one run took: its kind, see `Run.kind`, and its seconds."""

    kind: tuple[str, ...]
    seconds: float


class RunStore:
    """The runs of a study folder. One process at a time holds it; each run is written whole or not at all.

    A run whose row fails its checksum, as after a bad disk changed it, counts as not done. A run is believed only with
    its seal, which this user alone can make (`databases.seal`): runs that were stored elsewhere are refused, or taken
    over where the caller trusts them. Exported rows have no seals; a folder without a database starts from them where
    they are trusted.
    """

    def __init__(self, folder: Path, *, trust: bool = False) -> None:
        """Open the store of a folder, which is made where it is absent.

        Raises:
            InputError: the folder cannot be written, another study uses it, its files are damaged or of another
                version, or hold runs that this user did not store, without `trust`.
        """
        self.folder = folder
        self.path = folder / DATABASE
        self._records: dict[str, Record] = {}
        self._errors: dict[str, str] = {}
        self.timings: list[Timing] = []
        self._dropped = False
        check_output_files(folder, ROWS, MEASUREMENTS)
        exported = self._exported()
        if exported and not trust and not self.path.exists():
            raise self._untrusted(exported)
        claim_files(folder, ROWS, MEASUREMENTS, adopt=trust)
        with ExitStack() as stack:
            self._connection = stack.enter_context(opened(self.path, STORE))
            try:
                is_empty = self._connection.execute("SELECT 1 FROM runs").fetchone() is None
                if is_empty and exported and not trust:  # an import that was killed, or refused
                    raise self._untrusted(exported)
                if is_empty and exported:
                    self._import()
                self._read(trust)
            except sqlite3.DatabaseError as error:
                raise InputError(f"{self.path} cannot be used ({error}); {STORE.remedy}") from error
            self._closing = stack.pop_all()

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
        self._write(run, content, None, seconds, versions, _to_bytes(table))
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
            self._connection.execute("DELETE FROM runs WHERE error IS NOT NULL")
        self._errors.clear()

    def export(self) -> None:
        """Write all rows beside the database, measurements apart, as tables that other tools read.

        After damaged rows were dropped, the tables of before stay until as many runs are there again.
        """
        if self._dropped and len(self._records) + len(self._errors) < self._exported():
            return
        rows = pd.read_sql(f"SELECT {', '.join(_COLUMNS)} FROM runs ORDER BY finished, key", self._connection)
        with atomic_path(self.folder / ROWS) as temporary:
            rows.astype({"result": "string", "error": "string"}).to_parquet(
                temporary, index=False, write_page_checksum=True
            )
        measured = {key: record.measurements for key, record in self._records.items() if len(record.measurements)}
        with atomic_path(self.folder / MEASUREMENTS) as temporary:
            table = pd.concat(measured, names=["key"]).reset_index("key") if measured else pd.DataFrame({"key": []})
            table.to_parquet(temporary, index=False, compression="zstd", write_page_checksum=True)

    def _exported(self) -> int:
        """How many runs the table beside the database holds."""
        if not (self.folder / ROWS).exists():
            return 0
        try:
            return int(pyarrow.parquet.read_metadata(self.folder / ROWS).num_rows)
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def _untrusted(self, rows: int) -> InputError:
        return InputError(
            f"{self.folder} holds {rows} exported rows that are not in {DATABASE}; add --trust (trust=True) to build "
            f"on {ROWS}, or move it away to start again"
        )

    def _unreadable(self, error: Exception) -> InputError:
        return InputError(
            f"the rows in {self.folder} cannot be read ({error}); restore {ROWS} and {MEASUREMENTS}, "
            "or move them away to start again"
        )

    def _import(self) -> None:
        """Fill a new database with the rows that an earlier one exported."""
        try:
            read = partial(pd.read_parquet, page_checksum_verification=True)
            rows = read(self.folder / ROWS)
            file = self.folder / MEASUREMENTS
            measured = read(file) if file.exists() else pd.DataFrame({"key": []})
            tables = {str(key): table.drop(columns="key") for key, table in measured.groupby("key", sort=False)}
            values = []
            for row in rows[list(_COLUMNS)].to_dict("records"):
                table = tables.get(row["key"])
                if table is not None:  # without the columns that only other runs have
                    table = table.dropna(axis="columns", how="all").reset_index(drop=True)
                values.append((*(_plain(row[column]) for column in _COLUMNS), _to_bytes(table)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(error) from error
        try:
            with self._connection:
                self._connection.executemany(_INSERT, map(_signed, values))
        except (OverflowError, sqlite3.Error) as error:  # a number beyond 64 bits, a value of no type of SQLite's
            raise self._unreadable(error) from error

    def _read(self, trust: bool) -> None:
        """Take what is to be believed; what is damaged is dropped, so that it is done again."""
        sound, elsewhere = [], []
        for *row, sealed, check in self._connection.execute("SELECT * FROM runs").fetchall():
            if check != _checksum(*row, sealed):
                with self._connection:
                    self._connection.execute("DELETE FROM runs WHERE checksum IS ?", (check,))
                self._dropped = True
                continue
            sound.append(row)
            if not is_sealed(sealed, *_parts(row)):
                elsewhere.append(row)
        if elsewhere and not trust:
            raise InputError(
                f"{self.path} holds {len(elsewhere)} runs that this user did not store on this machine; add --trust "
                "(trust=True) to build on them, or choose another folder"
            )
        for row in sound:  # not before it is certain that these are believed
            self._take(row)
        with self._connection:
            self._connection.executemany(_INSERT, map(_signed, elsewhere))

    def _take(self, row: list[Any]) -> None:
        *values, blob = row
        values = [repr(value) if isinstance(value, bytes) else value for value in values]
        where = f"the run {values[0]} in {self.path}"
        key, action, settings, seed, needs, result, error, seconds, versions, _ = checked(
            values, _VALUES, where, STORE.remedy
        )
        content, roles = (checked(parse_json(text, where), dict[str, Any], where) for text in (settings, needs))
        if key != run_key(action, content, seed, roles):
            raise InputError(f"{where} is of another run; {STORE.remedy}")
        if error is not None:
            self._errors[key] = error
            return
        try:
            table = pd.DataFrame() if blob is None else pd.read_parquet(io.BytesIO(blob))
        except (OSError, ValueError, TypeError) as problem:
            raise InputError(f"the measurements of {where} cannot be read ({problem}); {STORE.remedy}") from problem
        found, made_with = (
            checked(parse_json(text or "null", where), dict[str, Any], where) for text in (result, versions)
        )
        self._records[key] = Record(found, table, seconds, made_with, seed)
        self.timings.append(Timing(Run(action, content).kind, seconds))

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
            run.key, run.action, settings, run.seed, needs, result, error, seconds, made_with, finished, measurements,
        )  # fmt: skip
        try:
            with self._connection:
                self._connection.execute(_INSERT, _signed(row))
        except sqlite3.DatabaseError as problem:
            raise InputError(
                f"{self.path} cannot be written ({problem}); what was finished before is kept: free some room, or "
                "make the folder writable, and give the same command again"
            ) from problem

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()


def _signed(row: Sequence[Any]) -> tuple[Any, ...]:
    """A row with its seal and its checksum."""
    sealed = seal(*_parts(row))
    return (*row, sealed, _checksum(*row, sealed))


def _parts(row: Sequence[Any]) -> list[str | bytes | None]:
    """What a seal is of: the values as the database gives them back, and the measurements."""
    *values, measurements = row
    return [*map(repr, values), measurements if isinstance(measurements, bytes) else repr(measurements)]


def _checksum(*row: Any) -> str:
    """Of a row and its seal, of whatever types a damaged file may give it."""
    return checksum(*(xxhash.xxh3_128_hexdigest(part) if isinstance(part, bytes) else repr(part) for part in row))


def _to_bytes(table: pd.DataFrame | None) -> bytes | None:
    if table is None:
        return None
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, compression="zstd")
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    if value is None or value is pd.NA:
        return None
    return value.item() if hasattr(value, "item") else value
