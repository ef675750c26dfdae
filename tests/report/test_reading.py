"""What the report needs from a folder, and what it says where the folder lacks it."""

import json

import numpy as np
import pandas as pd
import pytest

from spectralbasis.errors import InputError
from spectralbasis.report.results import CURVES, SPECTRA, read_results
from tests.damage import flipped
from tests.report import results


@pytest.fixture
def folder(tmp_path):
    return results.write_results(tmp_path, results.comparison(layers=1, k=4), results.summary(), results.tuning())


def test_rows_are_split_by_what_they_are_drawn_as(folder):
    read = read_results(folder)
    assert set(read.spectra["metric"]) == set(SPECTRA)
    assert set(CURVES) < set(read.measurements["metric"])
    assert not set(SPECTRA) & set(read.measurements["metric"])
    assert len(read.tuning.rows) == 10


def test_checkpoints_follow_the_summary_and_need_measurements(tmp_path):
    table = results.comparison(("b", "a"), layers=1, k=2)
    folder = results.write_results(tmp_path, table, results.summary(("a", "lost", "b")))
    assert read_results(folder).tuned == ("a", "b")


def test_tuning_is_optional(folder):
    (folder / "tuning.json").unlink()
    assert read_results(folder).tuning is None


@pytest.mark.parametrize("name", ["comparison.parquet", "summary.json"])
def test_a_missing_file_is_named_with_what_to_run(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"there is no .*{name}; run `spectralbasis compare BASE TUNED"):
        read_results(folder)


@pytest.mark.parametrize("name", ["comparison.parquet", "summary.json", "tuning.json"])
@pytest.mark.parametrize("content", [b"", b"PAR1 torn", b"\xff\xfe{"])
def test_a_corrupt_file_is_an_input_error(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        read_results(folder)


def test_a_truncated_table_is_an_input_error(folder):
    path = folder / "comparison.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"comparison\.parquet is not a readable Parquet file"):
        read_results(folder)


def test_a_turned_bit_in_the_table_is_an_input_error_or_changes_nothing(folder):
    path, whole = folder / "comparison.parquet", read_results(folder)
    results.comparison(layers=1, k=4).to_parquet(path, write_page_checksum=True)
    refused = 0
    for damaged in flipped(path.read_bytes(), 40):
        path.write_bytes(damaged)
        try:
            pd.testing.assert_frame_equal(read_results(folder).measurements, whole.measurements)
        except InputError:
            refused += 1
    assert refused > 10


def test_missing_columns_are_named(folder):
    results.comparison(layers=1, k=2).drop(columns=["z", "m"]).to_parquet(folder / "comparison.parquet")
    with pytest.raises(InputError, match="lacks the columns m, z"):
        read_results(folder)


def test_a_table_without_measurements_is_refused(folder):
    results.comparison(layers=1, k=2).iloc[:0].to_parquet(folder / "comparison.parquet")
    with pytest.raises(InputError, match="holds no measurement"):
        read_results(folder)


@pytest.mark.parametrize("content", [[], {}, {"base": "x", "tuned": ["a"], "stability": {}}])
def test_missing_keys_are_named(folder, content):
    (folder / "summary.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"summary\.json: .* (is missing|is \[\], expected an object)"):
        read_results(folder)


def test_a_tuning_row_that_lacks_its_score_is_refused(folder):
    content = results.tuning()
    for row in content["rows"]:
        del row["score"]
    (folder / "tuning.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"tuning\.json: rows\[0\]\.score is missing"):
        read_results(folder)


@pytest.mark.parametrize("empty", [None, "", np.nan])
def test_an_empty_null_is_the_empty_name(tmp_path, empty):
    table = results.comparison(layers=1, k=2, null=False)
    table["null"] = empty
    folder = results.write_results(tmp_path, table, results.summary(null=False))
    assert set(read_results(folder).measurements["null"]) == {""}
