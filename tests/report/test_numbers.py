"""The numbers that are drawn, against closed forms on small tables."""

import numpy as np
import pandas as pd
import pytest

from spectralbasis.report.figures import panel_curves, spectra
from spectralbasis.report.results import COVERAGE, OVERLAP, headline, read_results
from spectralbasis.report.sentences import Finding, tracks
from tests.report import results


def row(matrix, k, value, *, tuned="a", metric="subspace_overlap", side="left", index=-1, null_mean=0.5, null_std=0.1):
    size = {"layer": 0, "kind": matrix, "m": 8, "n": 16, "k": k}
    null = {"null": "scrambled", "null_mean": null_mean, "null_std": null_std, "z": 2.0, "p_value": 0.25}
    return (
        {"tuned": tuned, "matrix": matrix, "metric": metric, "side": side, "index": index, "value": value} | size | null
    )


def read(tmp_path, rows, tuned=("a",)):
    return read_results(results.write_results(tmp_path, pd.DataFrame(rows), results.summary(tuned)))


def test_a_curve_is_the_mean_over_matrices_beside_the_nulls_band_and_the_haar_line(tmp_path):
    rows = [row("q", 2, 0.9, null_std=0.03), row("v", 2, 0.7, null_std=0.04, null_mean=0.6)]
    (curve,) = panel_curves(read(tmp_path, rows), OVERLAP[0])
    at = curve.loc[2]
    assert at["value"] == pytest.approx(0.8)
    assert at["null_mean"] == pytest.approx(0.55)
    assert at["null_high"] - at["null_low"] == pytest.approx(4 * 0.035)
    assert at["unrelated"] == pytest.approx(2 / 8)
    assert (at["low"], at["high"]) == pytest.approx((0.72, 0.88))


@pytest.mark.parametrize(
    ("place", "expected"),
    [(0, 4 * 4 / 128), (1, 4 / 128), (2, 4 / 8), (3, 4 / 16)],
    ids=["core", "diagonal", "left", "right"],
)
def test_unrelated_coverage_is_its_haar_expectation(tmp_path, place, expected):
    panel = COVERAGE[place]
    (curve,) = panel_curves(read(tmp_path, [row("q", 4, 0.9, metric=panel.metric, side=panel.side)]), panel)
    assert curve.loc[4, "unrelated"] == pytest.approx(expected)


def test_a_k_that_few_matrices_reach_is_not_drawn(tmp_path):
    rows = [row(name, k, 0.9) for name in "abc" for k in (1, 2)] + [row("a", 8, 0.1)]
    (curve,) = panel_curves(read(tmp_path, rows), OVERLAP[0])
    assert list(curve.index) == [1, 2]


def test_several_checkpoints_come_after_all_of_them_together(tmp_path):
    rows = [row("q", 1, 0.9, tuned="a"), row("q", 1, 0.5, tuned="b")]
    everything, first, second = panel_curves(read(tmp_path, rows, ("a", "b")), OVERLAP[0])
    assert [curve.loc[1, "value"] for curve in (everything, first, second)] == pytest.approx([0.7, 0.9, 0.5])


def test_the_headline_is_each_matrixs_largest_k(tmp_path):
    rows = [row("q", 1, 0.1), row("q", 4, 0.4), row("v", 2, 0.2), row("v", 1, 0.3)]
    found = headline(read(tmp_path, rows))
    assert list(found.matrices["k"]) == [4, 2]
    assert found.grids["overlap_left"]["value"].tolist() == [[0.4, 0.2]]


def test_the_mean_of_checkpoints_skips_what_one_of_them_lacks_and_has_no_p(tmp_path):
    rows = [row("q", 1, 0.2, tuned="a"), row("q", 1, 0.4, tuned="b"), row("v", 1, 0.5, tuned="b")]
    found = headline(read(tmp_path, rows, ("a", "b")))
    assert found.selections == ("All 2 checkpoints", "a", "b")
    grid = found.grids["overlap_left"]
    np.testing.assert_allclose(grid["value"], [[0.3, 0.5], [0.2, np.nan], [0.4, 0.5]])
    np.testing.assert_allclose(grid["p_value"], [[np.nan, np.nan], [0.25, np.nan], [0.25, 0.25]])


def test_measures_that_were_not_taken_have_no_grid(tmp_path):
    found = headline(read(tmp_path, [row("q", 1, 0.2, null_mean=np.nan, null_std=np.nan)]))
    assert [measure.key for measure in found.measures] == ["overlap_left"]
    assert "null_mean" not in found.grids["overlap_left"]


def spectrum_rows(depth, tuned=("a", "b")):
    rows = [row("q", depth, 0.5, tuned=name) for name in tuned]
    for shift, name in enumerate(tuned):
        for index in range(depth):
            for metric, value in (
                ("singular_value_base", 10.0 - index),
                ("singular_value_tuned", 10.0 - index + shift),
            ):
                rows.append(row("q", depth, value, tuned=name, metric=metric, side="both", index=index))
    return rows


def test_spectra_hold_the_base_once_and_every_checkpoint(tmp_path):
    shown = spectra(read(tmp_path, spectrum_rows(3), ("a", "b")), pd.Series(["q"]))
    assert shown.base.tolist() == [[10, 9, 8]]
    assert shown.tuned[:, 0].tolist() == [[10.5, 9.5, 8.5], [10, 9, 8], [11, 10, 9]]
    assert shown.low.tolist() == [[10, 9, 8]]
    assert shown.high.tolist() == [[11, 10, 9]]


def test_spectra_too_large_to_carry_are_thinned_to_their_mean(tmp_path):
    shown = spectra(read(tmp_path, spectrum_rows(40), ("a", "b")), pd.Series(["q"]), carried=30)
    assert len(shown.tuned) == 1
    assert shown.directions[0] == 0
    assert shown.directions[-1] == 39
    assert len(shown.directions) <= 16
    np.testing.assert_allclose(shown.tuned[0, 0], 10.5 - shown.directions)


def test_a_comparison_without_spectra_has_none(tmp_path):
    assert spectra(read(tmp_path, [row("q", 1, 0.2)]), pd.Series(["q"])) is None


def test_tracks_share_a_scale_that_holds_zero_and_every_interval():
    numbers = [
        results.finding(0.9, 0.8, 0.05, 0.15, 0.01, "supported"),
        results.finding(0.5, 0.6, -0.2, 0.0, 0.1, "undecided"),
    ]
    first, second = tracks([Finding.read("stability", entry) for entry in numbers])
    assert first.zero == second.zero
    assert 0 < second.low < second.effect < second.high == first.zero < first.low < first.effect < first.high < 100


def test_a_track_without_a_null_shows_nothing():
    (track,) = tracks([Finding.read("stability", results.finding(0.9, None, None, None, None, "undecided"))])
    assert (track.effect, track.low, track.high) == (None, None, None)
