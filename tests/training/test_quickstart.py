"""The quickstart with almost no training: that its parts fit, and that it can be run again."""

import json

import pytest

from spectralbasis.training import load_model, load_task, quickstart, tune


@pytest.mark.slow
def test_one_folder_holds_models_adapters_measurements_and_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "tune", lambda *args, **options: tune(*args, **{**options, "steps": 2}))
    monkeypatch.setattr(quickstart, "TASKS", ("digits-rotated",))
    page = quickstart.quickstart(tmp_path / "new" / "folder", progress=False)
    folder = tmp_path / "new" / "folder"
    assert page == folder / "index.html"
    assert "digits-rotated" in page.read_text()
    rows = json.loads((folder / "tuning.json").read_text())["rows"]
    assert {(row["task"], row["method"], row["coefficients"]) for row in rows} == {
        ("digits-rotated", *method)
        for method in (("full", ""), ("spectral", "diagonal"), ("spectral", "core"), ("lora", ""))
    }
    trained = {(row["method"], row["coefficients"]): row["parameters_backbone"] for row in rows}
    assert (trained["spectral", "diagonal"], trained["spectral", "core"]) == (24 * 64, 24 * 12**2)
    assert 0.9 < trained["spectral", "core"] / trained["lora", ""] < 1.1
    assert all(row["score"] > 0 and row["adapter_bytes"] > 0 for row in rows)
    load_model(folder / "models" / "digits-rotated", load_task("digits-rotated"), head="stored")
    assert quickstart.quickstart(folder, progress=False) == page
