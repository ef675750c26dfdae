"""The store keeps runs whole, passes them on as tables, and says in a sentence what is wrong."""

import sqlite3

import pandas as pd
import pytest

from spectralbasis.errors import InputError
from spectralbasis.study.runs import Outcome, Run
from spectralbasis.study.runs.store import DATABASE, FORMAT_VERSION, MEASUREMENTS, ROWS, RunStore
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


def test_a_store_goes_on_from_exported_rows(filled):
    (filled / DATABASE).unlink()
    with RunStore(filled) as store:
        check(store)
        store.export()
    (filled / DATABASE).unlink()
    with RunStore(filled) as store:
        check(store)


def test_a_store_that_was_killed_before_it_took_over_exported_rows_does_so_later(filled):
    connection = sqlite3.connect(filled / DATABASE)
    with connection:
        connection.execute("DELETE FROM runs")
    connection.close()
    with RunStore(filled) as store:
        check(store)


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


def test_a_newer_store_is_refused(filled):
    connection = sqlite3.connect(filled / DATABASE)
    with connection:
        connection.execute("UPDATE format SET version = ?", (FORMAT_VERSION + 1,))
    connection.close()
    with pytest.raises(InputError, match="newer spectralbasis"):
        RunStore(filled)


@pytest.mark.parametrize("file", [DATABASE, ROWS])
def test_damaged_files_are_named(filled, file):
    if file == ROWS:
        (filled / DATABASE).unlink()
    (filled / file).write_bytes(b"no such format" * 100)
    with pytest.raises(InputError, match=file if file == DATABASE else "cannot be read"):
        RunStore(filled)
    assert (filled / ROWS).exists()


def test_a_run_whose_row_was_changed_is_not_done(filled):
    run = Run("tune", {"task": "RTE"}, 2)
    connection = sqlite3.connect(filled / DATABASE)
    with connection:
        connection.execute("UPDATE runs SET result = replace(result, '0.75', '0.76') WHERE key = ?", (run.key,))
    connection.close()
    with RunStore(filled) as store:
        assert store.results.get(run) is None
        assert store.results.get(Run("probe", {})) is not None
        store.put(run, Outcome({"score": 0.75}), 3.5, VERSIONS)
    with RunStore(filled) as store:
        check(store)


def test_a_store_of_the_version_before_is_read_and_goes_on(filled):
    connection = sqlite3.connect(filled / DATABASE)
    with connection:
        connection.execute("DROP TABLE checksums")
    connection.close()
    with RunStore(filled) as store:
        check(store)
        store.put(Run("probe", {}, 1), Outcome({}), 1.0, VERSIONS)
    with RunStore(filled) as store:
        assert store.results.get(Run("probe", {}, 1)) is not None


@pytest.mark.parametrize("file", [DATABASE, ROWS, MEASUREMENTS])
def test_no_turned_bit_passes_for_a_result(filled, file):
    if file != DATABASE:
        (filled / DATABASE).unlink()
    content, refusals = (filled / file).read_bytes(), []
    for damaged in flipped(content, 80):
        (filled / file).write_bytes(damaged)
        try:
            with RunStore(filled) as store:
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
    with pytest.raises(InputError, match="cannot write"):
        RunStore(tmp_path / "file")
