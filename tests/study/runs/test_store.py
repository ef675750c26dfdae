"""The store keeps runs whole, passes them on as tables, and says in a sentence what is wrong."""

import sqlite3
from contextlib import closing

import pandas as pd
import pytest

from spectralbasis.errors import InputError
from spectralbasis.study.runs import DATABASE, MEASUREMENTS, ROWS, Outcome, Run, RunStore, _checksum
from tests.damage import flipped

TABLE = pd.DataFrame({"step": [1, 2], "matrix": ["a", "b"], "value": [0.25, float("nan")]})
OTHER = pd.DataFrame({"layer": [3], "score": [0.5]})
VERSIONS = {"torch": "2.13.0", "threads": 1}


@pytest.fixture
def filled(tmp_path):
    """A folder with three finished runs and a failed one."""
    with RunStore(tmp_path) as store:
        store.put(Run("tune", {"task": "RTE"}, 1), Outcome({"score": 0.5, "parts": {"a": [1]}}, TABLE), 2.5, VERSIONS)
        store.put(Run("tune", {"task": "RTE"}, 2), Outcome({"score": 0.75}), 3.5, VERSIONS)
        store.put(Run("probe", {}, 0), Outcome({}, OTHER), 1.0, VERSIONS)
        store.put_error(Run("tune", {"task": "CoLA"}), "diverged", 1.0, VERSIONS)
        store.export()
    return tmp_path


def check(store: RunStore) -> None:
    """Everything is there; whole numbers may have become floats on their way through a common table."""
    record = store.results.get(Run("tune", {"task": "RTE"}, 1))
    assert record.result == {"score": 0.5, "parts": {"a": [1]}}
    assert (record.seconds, record.seed, record.versions) == (2.5, 1, VERSIONS)
    pd.testing.assert_frame_equal(record.measurements, TABLE, check_dtype=False)
    assert store.results.get(Run("tune", {"task": "RTE"}, 2)).measurements.empty
    pd.testing.assert_frame_equal(store.results.get(Run("probe", {})).measurements, OTHER, check_dtype=False)
    assert store.results.error(Run("tune", {"task": "CoLA"})) == "diverged"
    assert store.results.get(Run("tune", {"task": "CoLA"})) is None
    assert sorted(timing.seconds for timing in store.timings) == [1.0, 2.5, 3.5]


def test_a_store_reads_back_what_was_put(filled):
    with RunStore(filled) as store:
        check(store)


def test_a_store_goes_on_from_exported_rows_that_are_trusted(filled):
    (filled / DATABASE).unlink()
    with pytest.raises(InputError, match=r"holds 4 exported rows that are not in runs\.sqlite; add --trust"):
        RunStore(filled)
    assert not (filled / DATABASE).exists()
    with RunStore(filled, trust=True) as store:
        check(store)
        store.export()
    with RunStore(filled) as store:  # they are this user's now
        check(store)


def test_a_store_that_was_killed_before_it_took_over_exported_rows_does_so_later(filled):
    change(filled, "DELETE FROM runs")
    with RunStore(filled, trust=True) as store:
        check(store)


def test_a_study_that_was_stopped_before_its_first_run_ended_goes_on(tmp_path):
    for _ in range(2):
        with RunStore(tmp_path) as store:
            store.export()
        assert len(pd.read_parquet(tmp_path / ROWS)) == 0
        (tmp_path / DATABASE).unlink()


def change(folder, statement, *values):
    with closing(sqlite3.connect(folder / DATABASE)) as connection, connection:
        connection.execute(statement, values)


def test_rows_are_a_table_that_others_read(filled):
    rows = pd.read_parquet(filled / ROWS)
    assert len(rows) == 4
    assert rows["action"].value_counts().to_dict() == {"tune": 3, "probe": 1}
    measured = pd.read_parquet(filled / MEASUREMENTS)
    assert measured["key"].nunique() == 2


def test_forgotten_errors_are_not_exported(filled):
    with RunStore(filled) as store:
        store.forget_errors()
        store.export()
    assert len(pd.read_parquet(filled / ROWS)) == 3


def test_a_store_of_another_version_is_refused(filled):
    change(filled, "PRAGMA user_version = 3")
    with pytest.raises(InputError, match="has format 3, this version reads format 2"):
        RunStore(filled)


def test_runs_of_another_user_are_taken_over_where_they_are_trusted(filled, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPECTRALBASIS_CACHE", str(tmp_path_factory.mktemp("another")))
    with pytest.raises(InputError, match="holds 4 runs that this user did not store on this machine; add --trust"):
        RunStore(filled)
    for trust in (True, False):
        with RunStore(filled, trust=trust) as store:
            check(store)


def forge(folder, **changes):
    """Change the second run as somebody does who can compute its checksum, but has not the secret of this user."""
    with closing(sqlite3.connect(folder / DATABASE)) as connection, connection:
        key = Run("tune", {"task": "RTE"}, 2).key
        *row, sealed, _ = connection.execute("SELECT * FROM runs WHERE key = ?", (key,)).fetchone()
        names = [column[1] for column in connection.execute("PRAGMA table_info(runs)")][: len(row)]
        row = [changes.get(name, value) for name, value in zip(names, row, strict=True)]
        places = ", ".join(f"{name} = ?" for name in (*names, "seal", "checksum"))
        connection.execute(f"UPDATE runs SET {places} WHERE key = ?", (*row, sealed, _checksum(*row, sealed), key))


def test_a_forged_result_is_refused_whoever_computed_its_checksum(filled):
    forge(filled, result='{"score": 0.999}')
    with pytest.raises(InputError, match="holds 1 runs that this user did not store"):
        RunStore(filled)


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": "long"},
        {"result": "[1]"},
        {"result": None},
        {"settings": "[" * 5000 + "]" * 5000},
        {"settings": '{"task": "CoLA"}'},
        {"versions": b"blob"},
        {"action": 5},
        {"measurements": b"no table"},
        {"measurements": "text"},
    ],
)
def test_trusted_runs_that_are_no_runs_are_a_sentence(filled, changes):
    forge(filled, **changes)
    with pytest.raises(InputError, match=r"the run [0-9a-f]{24} in .*runs\.sqlite"):
        RunStore(filled, trust=True)


@pytest.mark.parametrize("file", [DATABASE, ROWS])
def test_damaged_files_are_named(filled, file):
    if file == ROWS:
        (filled / DATABASE).unlink()
    (filled / file).write_bytes(b"no such format" * 100)
    for trust in (True, False):
        with pytest.raises(InputError, match=file if file == DATABASE else "cannot be read"):
            RunStore(filled, trust=trust)
        if file == ROWS:
            (filled / DATABASE).unlink(missing_ok=True)
    assert (filled / ROWS).exists()


def test_a_run_whose_row_was_changed_is_not_done(filled):
    run = Run("tune", {"task": "RTE"}, 2)
    change(filled, "UPDATE runs SET result = replace(result, '0.75', '0.76') WHERE key = ?", run.key)
    with RunStore(filled) as store:
        assert store.results.get(run) is None
        assert store.results.get(Run("probe", {})) is not None
        store.put(run, Outcome({"score": 0.75}), 3.5, VERSIONS)
    with RunStore(filled) as store:
        check(store)


@pytest.mark.parametrize("file", [DATABASE, ROWS, MEASUREMENTS])
def test_no_turned_bit_passes_for_a_result(filled, file):
    if file != DATABASE:
        (filled / DATABASE).unlink()
    content, refusals = (filled / file).read_bytes(), []
    for damaged in flipped(content, 80):
        (filled / file).write_bytes(damaged)
        try:
            with RunStore(filled, trust=file != DATABASE) as store:
                for run, score in ((Run("tune", {"task": "RTE"}, 1), 0.5), (Run("tune", {"task": "RTE"}, 2), 0.75)):
                    record = store.results.get(run)
                    assert record is None or record.result["score"] == score
                    if record is not None and run.seed == 1 and len(record.measurements):
                        pd.testing.assert_frame_equal(record.measurements, TABLE, check_dtype=False)
        except InputError as error:
            refusals.append(str(error))
        if file != DATABASE:
            (filled / DATABASE).unlink(missing_ok=True)
    assert all(str(filled) in refusal for refusal in refusals)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; name a new folder"):
        RunStore(tmp_path / "file")


def test_exported_rows_outlive_an_empty_database_and_damaged_rows(filled):
    before = (filled / ROWS).read_bytes()
    change(filled, "UPDATE runs SET seconds = 7 WHERE seed = 2")
    with RunStore(filled) as store:
        assert store.results.get(Run("tune", {"task": "RTE"}, 2)) is None
        store.export()
    assert (filled / ROWS).read_bytes() == before
    change(filled, "DELETE FROM runs")
    with pytest.raises(InputError, match="add --trust"):
        RunStore(filled)
    assert (filled / ROWS).read_bytes() == before
