"""The store of a comparison gives back what it was given, or knows that it cannot."""

import json
import sqlite3

import pytest

from spectralbasis.comparison.rows import Row, SharedRow, row_values
from spectralbasis.comparison.store import Store
from spectralbasis.errors import InputError
from tests.damage import flipped

SETTINGS = {"leading": "4", "seed": "0"}
ROWS = [Row("tuned", f"layer.{i}", i, "dense", 24, 20, 4, "coverage_core", "both", -1, 0.25 * i) for i in range(9)]
SHARED = [SharedRow("a", "b", "layer.0", 0, "dense", 24, 20, 4, "subspace_overlap", "left", 0.5)]


def texts(rows):
    """Rows in a form in which NaN is NaN."""
    return [repr(row) for row in rows]


def filled(path):
    with Store(path, SETTINGS, resume=False) as store:
        for row in ROWS:
            store.put("tuned", row.matrix, f"hash of {row.matrix}", [row])
        store.put_shared(("a", "b"), "layer.0", "hash of both", SHARED)
    return path


def test_a_store_gives_back_what_it_was_given(tmp_path):
    with Store(filled(tmp_path / "store.sqlite"), SETTINGS, resume=True) as store:
        assert texts(store.rows([("tuned", row.matrix) for row in ROWS])) == texts(ROWS)
        assert store.contents("layer.3") == {"tuned": "hash of layer.3"}
        assert texts(store.shared_rows([(("a", "b"), "layer.0")])) == texts(SHARED)
        assert store.shared_contents("layer.0") == {("a", "b"): "hash of both"}


def test_no_turned_bit_passes_for_a_measurement(tmp_path):
    path = filled(tmp_path / "store.sqlite")
    refusals, missed = [], 0
    for damaged in flipped(path.read_bytes(), 300):
        path.write_bytes(damaged)
        try:
            with Store(path, SETTINGS, resume=True) as store:
                known = [row for row in ROWS if store.contents(row.matrix) == {"tuned": f"hash of {row.matrix}"}]
                assert texts(store.rows([("tuned", row.matrix) for row in known])) == texts(known)
                missed += len(ROWS) - len(known)
                if store.shared_contents("layer.0") == {("a", "b"): "hash of both"}:
                    assert texts(store.shared_rows([(("a", "b"), "layer.0")])) == texts(SHARED)
        except InputError as error:
            refusals.append(str(error))
    assert refusals
    assert all(str(path) in refusal for refusal in refusals)
    assert missed > 0


@pytest.fixture
def changed(tmp_path):
    """Make a store and change it with SQL."""

    def change(statement, *values):
        path = filled(tmp_path / "store.sqlite")
        connection = sqlite3.connect(path)
        with connection:
            connection.execute(statement, values)
        connection.close()
        return path

    return change


def test_rows_of_the_version_before_are_taken_over(changed, tmp_path):
    text = json.dumps([row_values(ROWS[3])])
    path = changed("UPDATE pairs SET rows = ? WHERE matrix = 'layer.3'", text)
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE settings SET value = '1' WHERE name = 'format'")
    connection.close()
    with Store(path, SETTINGS, resume=True) as store:
        assert texts(store.rows([("tuned", "layer.3")])) == texts(ROWS[3:4])
        assert store.contents("layer.3") == {"tuned": "hash of layer.3"}


def test_a_newer_version_is_refused_unless_it_is_to_be_replaced(changed):
    path = changed("UPDATE settings SET value = '3' WHERE name = 'format'")
    with pytest.raises(InputError, match="format 3, this version reads up to 2; update spectralbasis"):
        Store(path, SETTINGS, resume=True)
    with Store(path, SETTINGS, resume=False) as store:
        assert store.contents("layer.3") == {}


def test_rows_under_another_name_are_not_taken_over(changed):
    path = changed("UPDATE pairs SET matrix = 'layer.30' WHERE matrix = 'layer.3'")
    with Store(path, SETTINGS, resume=True) as store:
        assert store.contents("layer.30") == {}
