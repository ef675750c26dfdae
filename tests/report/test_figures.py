"""Figures are valid for Plotly and say in words what they show."""

import json
import re

import pandas as pd
import plotly.graph_objects as go
import pytest

from spectralbasis.report import figures
from spectralbasis.report.figures import tuning_figure, with_labels
from spectralbasis.report.results import COVERAGE, OVERLAP, read_results
from tests.report import results


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return read_results(
        results.write_results(folder, results.comparison(layers=2, k=8), results.summary(), results.tuning())
    )


def validated(figure, view=0):
    """The figure as plotly.py checks it, with a colour in place of the style sheet's."""
    text = re.sub(r'"var\(--font\)"', '"Arial"', json.dumps({key: figure[key] for key in ("traces", "layout")}))
    plain = json.loads(re.sub(r'"var\(--[a-z0-9-]+\)"', '"#123456"', text))
    data = figure["views"][view]["traces"] if "views" in figure else [{}] * len(plain["traces"])
    return go.Figure([{**trace, **more} for trace, more in zip(plain["traces"], data, strict=True)], plain["layout"])


@pytest.mark.parametrize("panel", [*OVERLAP, *COVERAGE], ids=lambda panel: panel.key)
def test_a_curve_has_a_view_per_selection_that_plotly_accepts(read, panel):
    figure = figures.curve_figure(panel, figures.panel_curves(read, panel), ("All 2 checkpoints", "rte", "sst2"))
    assert len(figure["views"]) == 3
    for view in range(3):
        drawn = validated(figure, view)
        assert list(drawn.data[-1].x) == [1, 2, 4, 8]
        assert len(drawn.data[0].x) == len(drawn.data[0].y) == 8
    json.dumps(figure, allow_nan=False)


def test_a_curves_label_says_the_last_point_and_its_null(read):
    panel = OVERLAP[0]
    figure = figures.curve_figure(
        panel, panel_curves := figures.panel_curves(read, panel), ("All 2 checkpoints", "rte", "sst2")
    )
    last = panel_curves[0].loc[8]
    expected = f"At k = 8: observed {last['value']:.4f}, null {last['null_mean']:.4f}."
    assert figure["views"][0]["label"] == f"Line chart. Left vectors, All 2 checkpoints. {expected}"


def test_the_zoom_shows_observed_and_null_but_not_the_unrelated(read):
    panel = OVERLAP[0]
    curve = figures.panel_curves(read, panel)[0]
    low, high = figures.curve_figure(panel, [curve], ["all"])["views"][0]["range"]
    assert low <= curve["null_low"].min()
    assert high >= curve["high"].max()
    assert low > curve["unrelated"].max()


def test_a_curve_without_a_null_draws_none(tmp_path):
    folder = results.write_results(
        tmp_path, results.comparison(("a",), layers=1, k=4, null=False), results.summary(("a",))
    )
    panel = COVERAGE[0]
    figure = figures.curve_figure(panel, figures.panel_curves(read_results(folder), panel), ["a"])
    drawn = validated(figure)
    assert len(drawn.data[0].x) == 0
    assert set(drawn.data[3].y) == {None}
    assert "null" not in figure["views"][0]["label"]


def test_the_looks_of_heat_map_and_spectra_are_valid():
    for figure in (figures.heatmap_figure(), *figures.spectrum_figures()):
        assert len(validated(figure).data) == len(figure["traces"])


def test_every_matrix_has_a_cell_at_its_kind_and_layer():
    matrices = results.matrices(2)
    cells = figures.heatmap_cells(matrices)
    assert cells["columns"] == ["none", "0", "1"]
    assert cells["rows"] == [*results.KINDS, "pooler.dense"]
    assert cells["cells"][0] == [-1, 0, 6]
    assert cells["cells"][-1] == [12, -1, -1]


def test_matrices_of_one_kind_and_layer_get_rows_of_their_own():
    names = ["encoder.layer.0.q", "decoder.layer.0.q", "decoder.layer.1.q"]
    matrices = pd.DataFrame({"matrix": names, "layer": [0, 0, 1], "kind": "q", "m": 4, "n": 4})
    cells = figures.heatmap_cells(matrices)
    assert cells["rows"] == ["encoder.layer.*.q", "decoder.layer.*.q", "q"]
    assert sorted(place for row in cells["cells"] for place in row if place >= 0) == [0, 1, 2]


def test_short_labels_are_cut_before_they_are_escaped():
    matrices = pd.DataFrame({"matrix": ["a"], "layer": [0], "kind": ["<" * 20], "m": 4, "n": 4})
    assert figures.heatmap_cells(matrices)["short"] == ["…" + "&lt;" * 15]


def test_methods_that_train_no_backbone_are_lines_and_the_others_points(read):
    figure = tuning_figure(with_labels(read.tuning.rows), "RTE")
    drawn = validated(figure)
    assert [trace.name for trace in drawn.data] == ["spectral diagonal", "spectral core", "lora", "full"]
    assert drawn.layout.shapes[0].y0 == 0.561
    assert "head: 0.561" in drawn.layout.annotations[0].text
    assert "spectral core 0.628 with 41,472" in figure["views"][0]["label"]
