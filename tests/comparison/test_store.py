"""The store of a comparison gives back what it was given, or knows that it cannot."""

import json
import sqlite3
from dataclasses import replace

import pytest

from spectralbasis import databases
from spectralbasis.comparison.metrics import Row, SharedRow, row_values
from spectralbasis.comparison.store import Store, _checksum
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


def test_another_version_is_refused_unless_it_is_to_be_replaced(changed):
    path = changed("PRAGMA user_version = 5")
    with pytest.raises(InputError, match="has format 5, this version reads format 4"):
        Store(path, SETTINGS, resume=True)
    with Store(path, SETTINGS, resume=False) as store:
        assert store.contents("layer.3") == {}


def test_rows_under_another_name_are_not_taken_over(changed):
    path = changed("UPDATE pairs SET matrix = 'layer.30' WHERE matrix = 'layer.3'")
    with Store(path, SETTINGS, resume=True) as store:
        assert store.contents("layer.30") == {}


def forged(path, **changes):
    """Change a row as somebody does who can compute its checksum, but has not the secret of this user."""
    connection = sqlite3.connect(path)
    with connection:
        query = "SELECT tuned, matrix, content, seal FROM pairs WHERE matrix = 'layer.3'"
        *key, sealed = connection.execute(query).fetchone()
        text = changes.pop("text", None) or json.dumps([row_values(replace(ROWS[3], **changes))])
        values = (text, _checksum(*key, text, sealed))
        connection.execute("UPDATE pairs SET rows = ?, checksum = ? WHERE matrix = 'layer.3'", values)
    connection.close()


def test_a_forged_measurement_is_refused_whoever_computed_its_checksum(tmp_path):
    path = filled(tmp_path / "store.sqlite")
    forged(path, value=0.999)
    with pytest.raises(InputError, match=r"results of 1 matrices that this user did not store .* add --trust"):
        Store(path, SETTINGS, resume=True)


def test_rows_of_another_user_are_taken_over_where_they_are_trusted(tmp_path, monkeypatch):
    path = filled(tmp_path / "store.sqlite")
    monkeypatch.setenv("SPECTRALBASIS_CACHE", str(tmp_path / "of another user"))
    with pytest.raises(InputError, match="results of 9 matrices that this user did not store"):
        Store(path, SETTINGS, resume=True)
    for trust in (True, False):  # once trusted, they are this user's
        with Store(path, SETTINGS, resume=True, trust=trust) as store:
            assert texts(store.rows([("tuned", row.matrix) for row in ROWS])) == texts(ROWS)
            assert texts(store.shared_rows([(("a", "b"), "layer.0")])) == texts(SHARED)


def test_rows_of_other_settings_are_not_those_of_these(tmp_path):
    path = filled(tmp_path / "store.sqlite")
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE settings SET value = '8' WHERE name = 'leading'")
    connection.close()
    with pytest.raises(InputError, match="did not store"):
        Store(path, {**SETTINGS, "leading": "8"}, resume=True)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000 + "]" * 5000,
        "[[1]]",
        "{}",
        json.dumps([row_values(replace(ROWS[3], value="high"))]),
        json.dumps([row_values(replace(ROWS[3], matrix="layer.4"))]),
    ],
)
def test_trusted_rows_that_are_no_rows_are_a_sentence(tmp_path, text):
    path = filled(tmp_path / "store.sqlite")
    forged(path, text=text)
    with pytest.raises(InputError, match=r"the rows of layer\.3 in .*leave out --resume to measure them again"):
        Store(path, SETTINGS, resume=True, trust=True)


def test_where_no_secret_can_be_kept_a_run_believes_its_own_rows_and_the_next_asks(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPECTRALBASIS_CACHE", str(tmp_path / "file"))
    path = tmp_path / "store.sqlite"
    with Store(path, SETTINGS, resume=False) as store:
        store.put("tuned", "layer.3", "hash", ROWS[3:4])
        assert texts(store.rows([("tuned", "layer.3")])) == texts(ROWS[3:4])
    databases._key.cache_clear()  # as in another process
    with pytest.raises(InputError, match="did not store"):
        Store(path, SETTINGS, resume=True)
    with Store(path, SETTINGS, resume=True, trust=True) as store:
        assert store.contents("layer.3") == {"tuned": "hash"}
