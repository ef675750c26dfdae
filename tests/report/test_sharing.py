"""Sharing and trajectories on the page: order, sentences and tables say what the summary says, where it does."""

import numpy as np
import pytest

from spectralbasis.report import write_report
from spectralbasis.report.groups import (
    RUN_PANELS,
    Sharing,
    cluster_order,
    explain_sharing,
    explain_tasks,
    read_trajectories,
    sharing_rows,
    trajectory_figure,
    trajectory_rows,
)
from tests.report import results

LABELS, TASKS = ("runs/a", "runs/b", "runs/c"), ("x", "x", "y")


def shared(**options):
    entry = results.sharing(LABELS, TASKS, **options)
    return Sharing.read({"sharing": entry})


def test_alike_checkpoints_stand_side_by_side():
    groups = np.array([0, 1, 2, 0, 1, 2, 0])
    likeness = np.where(groups[:, None] == groups, 0.4, 0.0)
    np.fill_diagonal(likeness, np.nan)
    ordered = groups[cluster_order(likeness)]
    assert (np.diff(ordered) != 0).sum() == 2
    assert sorted(cluster_order(likeness)) == list(range(7))


@pytest.mark.parametrize("likeness", [np.full((4, 4), np.nan), np.ones((3, 3)), np.full((3, 3), -2.0), np.eye(2)])
def test_any_likeness_has_an_order(likeness):
    assert sorted(cluster_order(likeness)) == list(range(len(likeness)))


def test_the_grid_is_symmetric_and_blank_on_its_diagonal():
    grid = shared().grid("effect")
    np.testing.assert_array_equal(grid, grid.T)
    assert np.isnan(grid.diagonal()).all()
    assert grid[0, 1] == 0.05


def test_sentences_say_the_excess_the_ceiling_and_the_test():
    said = " ".join(explain_sharing(shared()))
    for words in ("pairs of different tasks", "overlap by 0.8610", "leave 0.8420", "+0.0190", "+0.0080 to +0.0310"):
        assert words in said.replace("\u00a0", " ")
    ceiling, test = explain_tasks(shared())
    assert "is 0.8920 (excess +0.0500)" in ceiling
    assert "share 0.0381 more" in test
    assert "all 90 arrangements" in test


def test_without_a_null_nothing_is_claimed():
    (said,) = explain_sharing(shared(null=False))
    assert "the share due to chance is unknown" in said


def test_rows_give_each_pair_once():
    rows = sharing_rows(shared())
    assert [(row[0].text, row[1].text, row[2].text) for row in rows] == [
        ("a", "b", "same"),
        ("a", "c", "different"),
        ("b", "c", "different"),
    ]
    assert rows[0][5].text == "0.0500"


def test_a_figure_of_a_run_has_what_was_observed_and_its_null():
    runs = results.trajectory(("r",), points=3)
    by_step, by_size = (trajectory_figure(panel, runs) for panel in RUN_PANELS[:2])
    null, observed = by_step["traces"]
    assert observed["x"] == null["x"] == [200, 400, 600]
    assert observed["y"][0] == pytest.approx(0.97)
    assert null["y"][0] == pytest.approx(0.955)
    assert by_size["traces"][0]["x"] == pytest.approx([0.02, 0.02 * 2**0.5, 0.02 * 3**0.5], rel=1e-4)
    assert "between steps 200 and 600" in by_step["views"][0]["label"]
    assert [row[1].value for row in trajectory_rows(runs)] == [200, 400, 600]


def test_a_single_point_is_no_course():
    assert read_trajectories({"trajectory": results.trajectory(points=1)}) == []
    assert read_trajectories({}) == []


def test_sections_are_there_only_with_something_to_show(tmp_path):
    table = results.comparison(("a", "b"), layers=1, k=2)
    results.write_results(tmp_path, table, results.summary(("a", "b")))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert 'id="sharing"' not in page
    assert 'id="trajectory"' not in page
    two = results.sharing(("a", "b"))
    results.write_results(tmp_path, table, results.summary(("a", "b"), sharing=two))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert 'id="sharing-table"' in page
    assert 'id="sharing-map"' not in page
