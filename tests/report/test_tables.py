"""Table cells, settings and units as people read them."""

import pytest

from spectralbasis.report import sentences
from spectralbasis.report.results import headline, read_results
from tests.report import results


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return headline(read_results(results.write_results(folder, results.comparison(layers=1, k=8), results.summary())))


def test_a_row_holds_what_its_columns_say(numbers):
    groups = sentences.matrix_columns(numbers)
    assert [label for label, _ in groups] == [
        "Overlap, left",
        "Overlap, right",
        "Coverage, core, %",
        "Relative step, %",
    ]
    columns = [column for _, group in groups for column in group]
    row = sentences.matrix_rows(numbers, columns)[4]
    assert [cell.text for cell in row[:4]] == ["encoder.layer.0.intermediate.dense", "0", "1536 × 384", "8"]
    core = numbers.grids["coverage_core"]["value"][0, 4]
    assert row[4 + 6].text == f"{100 * core:.2f}"
    assert row[4 + 6].value == pytest.approx(core, rel=1e-5)


def test_a_matrix_outside_the_layers_has_none(numbers):
    assert sentences.matrix_rows(numbers, [])[-1][1] == sentences.Cell("–", -1)


@pytest.mark.parametrize(
    ("value", "cell"),
    [(-0.5, ("−50.0", -0.5)), (-1e-6, ("0.0", -1e-6)), (float("nan"), ("–", None)), (None, ("–", None))],
)
def test_numbers_are_fixed_and_absent_ones_sort_last(value, cell):
    assert sentences.fixed(value, 1, 100) == cell


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (612e6, "612.0 MB"), (None, "–")]
)
def test_sizes_have_units(count, text):
    assert sentences.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (83.2, "1 min 23 s"), (7265, "2 h 1 min"), (59.99, "60.0 s")]
)
def test_durations_have_units(seconds, text):
    assert sentences.duration(seconds) == text


@pytest.mark.parametrize(
    ("rule", "text"),
    [(64, "64 of each"), (0.1, "10 %"), ("mp", "Marchenko"), ("gd", "Gavish"), ("32", "32 of each"), (None, "")],
)
def test_the_leading_rule_is_spelled_out(rule, text):
    assert text in sentences.leading(rule)


def test_settings_leave_out_what_is_empty():
    names = [name for name, _ in sentences.settings(results.summary(null=False, versions={}), "", 3)]
    assert names == ["Base", "Finetuned", "Matrices", "Leading directions", "Null", "Seed", "Time", "Peak memory"]
    names = [name for name, _ in sentences.settings(results.summary(), "scrambled", 3)]
    assert {"Draws per matrix", "Versions"} < set(names)


def test_tuning_rows_have_a_cell_per_heading(numbers, tmp_path):
    from spectralbasis.report.figures import with_labels
    from spectralbasis.report.results import Tuning

    folder = results.write_results(tmp_path, results.comparison(layers=1, k=2), results.summary(), results.tuning())
    tuning = read_results(folder).tuning
    rows = sentences.tuning_rows(Tuning(with_labels(tuning.rows)))
    assert all(len(row) == len(sentences.TUNING_HEADINGS) for row in rows)
    assert [cell.text for cell in rows[2][:5]] == ["RTE", "spectral core", "accuracy", "0.6280", "41,472"]
