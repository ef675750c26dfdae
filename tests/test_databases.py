"""A database is opened only when all of it is ours; what it would run or lead to is never run or followed."""

import os
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing

import pytest

from spectralbasis import databases
from spectralbasis.databases import Kind, is_sealed, opened, seal
from spectralbasis.errors import InputError

KIND = Kind(7, 2, ("CREATE TABLE a (x TEXT PRIMARY KEY)", "CREATE TABLE b (y)"), "test", "remove it")


def make(path, *statements, ours=True):
    if ours:
        with opened(path, KIND) as connection, connection:
            connection.execute("INSERT INTO a VALUES ('kept')")
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)
    return path


def test_what_was_written_is_read_again_and_a_fresh_start_is_empty(tmp_path):
    path = make(tmp_path / "db")
    with opened(path, KIND) as connection:
        assert connection.execute("SELECT x FROM a").fetchall() == [("kept",)]
    with opened(path, KIND, fresh=True) as connection:
        assert connection.execute("SELECT x FROM a").fetchall() == []


def test_a_second_process_is_refused_at_once(tmp_path):
    with (
        opened(tmp_path / "db", KIND),
        pytest.raises(InputError, match="another test is writing"),
        opened(tmp_path / "db", KIND),
    ):
        pass


@pytest.mark.parametrize("exists", [False, True])
def test_another_process_is_refused_while_one_lives(tmp_path, exists):
    path = make(tmp_path / "db") if exists else tmp_path / "db"
    program = (
        "import sys, pathlib\nfrom spectralbasis.databases import Kind, opened\n"
        f"with opened(pathlib.Path(sys.argv[1]), {KIND!r}):\n    print('open', flush=True)\n    sys.stdin.read()\n"
    )
    arguments = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(InputError, match="another test is writing"), opened(path, KIND):
            pass
        process.stdin.close()
    with opened(path, KIND):
        pass


ENDLESS = "WITH RECURSIVE c(y) AS (SELECT 1 UNION ALL SELECT y FROM c) SELECT y FROM c"
PREPARED = [
    ("CREATE VIEW v AS SELECT 1",),
    ("DROP TABLE b", f"CREATE VIEW b AS {ENDLESS}"),
    ("CREATE TRIGGER t AFTER INSERT ON a BEGIN DELETE FROM a; END",),
    ("CREATE TABLE c (z)",),
    ("DROP TABLE b", "CREATE TABLE b (y, z)"),
    ("DROP TABLE b", "CREATE TABLE b (y CHECK (y > 1))"),
    ("DROP TABLE b", "CREATE TABLE b (y DEFAULT (randomblob(9)))"),
    ("DROP TABLE b", "CREATE TABLE b (x, y AS (x + 1))"),
    ("DROP TABLE b",),
    ("CREATE INDEX i ON b (y)",),
    ("DROP TABLE b", "CREATE VIRTUAL TABLE b USING fts5(y)"),
]


@pytest.mark.parametrize("statements", PREPARED)
def test_a_schema_that_is_not_exactly_ours_is_refused_and_the_file_left_as_it_is(tmp_path, statements):
    path = make(tmp_path / "db", *statements)
    content = path.read_bytes()
    with pytest.raises(InputError, match="tables that do not belong to a spectralbasis test"), opened(path, KIND):
        pass
    assert path.read_bytes() == content


@pytest.mark.parametrize("statements", [PREPARED[0], PREPARED[2], PREPARED[-1]])
def test_not_even_a_fresh_start_drops_what_runs_code(tmp_path, statements):
    path = make(tmp_path / "db", *statements)
    content = path.read_bytes()
    with pytest.raises(InputError, match="tables that do not belong"), opened(path, KIND, fresh=True):
        pass
    assert path.read_bytes() == content


@pytest.mark.parametrize("fresh", [True, False])
def test_the_database_of_another_program_is_refused_and_left_as_it_is(tmp_path, fresh):
    path = make(tmp_path / "db", "CREATE TABLE a (x TEXT PRIMARY KEY)", ours=False)
    (tmp_path / "text").write_text("a person's notes " * 30)
    (tmp_path / "link").symlink_to(make(tmp_path / "linked"))
    os.mkfifo(tmp_path / "fifo")
    before = {file: file.read_bytes() for file in (path, tmp_path / "text", tmp_path / "linked")}
    refusals = {"db": "not a database", "text": "not a database", "link": "is a link", "fifo": "not a regular"}
    for name, why in refusals.items():
        with pytest.raises(InputError, match=why), opened(tmp_path / name, KIND, fresh=fresh):
            pass
    assert {file: file.read_bytes() for file in before} == before


def test_another_version_is_refused_unless_all_is_to_be_made_anew(tmp_path):
    path = make(tmp_path / "db", "PRAGMA user_version = 3", "DROP TABLE b", "CREATE TABLE b2 (z)")
    with pytest.raises(InputError, match="has format 3, this version reads format 2"), opened(path, KIND):
        pass
    with opened(path, KIND, fresh=True) as connection:
        assert connection.execute("SELECT * FROM b").fetchall() == []


@pytest.mark.parametrize("suffix", ["-journal", "-wal", "-shm"])
def test_a_journal_that_is_a_link_is_refused(tmp_path, suffix):
    path, elsewhere = make(tmp_path / "db"), tmp_path / "precious"
    elsewhere.write_text("a person's")
    (tmp_path / f"db{suffix}").symlink_to(elsewhere)
    with pytest.raises(InputError, match="is a link to"), opened(path, KIND):
        pass
    assert elsewhere.read_text() == "a person's"


def test_a_journal_that_names_another_file_for_sqlite_to_delete_is_refused(tmp_path):
    path, precious = make(tmp_path / "db"), tmp_path / "precious"
    precious.write_text("a person's")
    name = os.fsencode(precious)
    header = bytes.fromhex("d9d505f920a163d7") + (0).to_bytes(4, "big") * 2
    header += (path.stat().st_size // 4096).to_bytes(4, "big") + (512).to_bytes(4, "big") + (4096).to_bytes(4, "big")
    journal = header.ljust(512, b"\0") + (0x40000000 // 4096 + 1).to_bytes(4, "big") + name
    journal += len(name).to_bytes(4, "big") + sum(name).to_bytes(4, "big") + header[:8]
    (tmp_path / "db-journal").write_bytes(journal)
    with pytest.raises(InputError, match="spectralbasis left: it names other files"), opened(path, KIND):
        pass
    assert precious.read_text() == "a person's"


def test_what_never_ends_is_stopped():
    started = time.monotonic()
    with (
        closing(sqlite3.connect(":memory:")) as connection,
        pytest.raises(sqlite3.OperationalError, match="interrupted"),
        databases._within(0.2, connection),
    ):
        connection.execute(f"SELECT count(*) FROM ({ENDLESS})").fetchall()
    assert time.monotonic() - started < 5


def test_a_cell_larger_than_any_of_ours_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(databases, "LARGEST_CELL", 1000)
    path = make(tmp_path / "db", "INSERT INTO b VALUES (zeroblob(5000))")
    with pytest.raises((InputError, sqlite3.DataError), match="too big"), opened(path, KIND) as connection:
        connection.execute("SELECT * FROM b").fetchall()


def test_a_seal_is_of_its_parts_and_of_this_user(tmp_path, monkeypatch):
    made = seal("ab", "c", None, b"d")
    assert is_sealed(made, "ab", "c", None, b"d")
    for parts in (("a", "bc", None, b"d"), ("ab", "c", "", b"d"), ("ab", "c", None, b"e"), ("ab", "c", None)):
        assert not is_sealed(made, *parts)
    for other in (None, 5, "", made.upper(), made.encode()):
        assert not is_sealed(other, "ab", "c", None, b"d")
    monkeypatch.setenv("SPECTRALBASIS_CACHE", str(tmp_path))
    assert not is_sealed(made, "ab", "c", None, b"d")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("planted", ["short", "link", "folder"])
def test_a_secret_that_another_may_know_is_used_by_no_process(tmp_path, monkeypatch, planted):
    key = tmp_path / "key"
    if planted == "short":
        key.write_bytes(b"known")
    elif planted == "link":
        (tmp_path / "known").write_bytes(b"k" * 32)
        key.symlink_to(tmp_path / "known")
    else:
        key.mkdir()
    monkeypatch.setenv("SPECTRALBASIS_CACHE", str(tmp_path))
    made = seal("a")
    assert is_sealed(made, "a")
    databases._key.cache_clear()  # as in another process
    assert not is_sealed(made, "a")
    assert not is_sealed("", "a")
