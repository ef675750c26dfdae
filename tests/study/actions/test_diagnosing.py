"""The actions `diagnose` and `power_laws` on a small model and on itself."""

import pytest

from spectralbasis.study.actions import diagnose, power_laws, tune
from spectralbasis.study.runs import Run, Site
from spectralbasis.study.starting import find_architecture, random_model

SETTINGS = {"task": "digits-parity", "examples": 100, "probe_examples": 150}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    architecture = find_architecture("vit-tiny")
    random_model(architecture.auto_model, architecture.make_config(), 0).save_pretrained(root / "base")
    (root / "tuned").mkdir()
    run = Run("tune", {"task": "digits-parity", "method": "full", "steps": 5, "learning_rate": 3e-3})
    tune(run, Site(None, root / "tuned", {"model": root / "base"}))
    return root


def test_before_and_after(folders, tmp_path):
    needs = {"model": folders / "base", "tuned": folders / "tuned"}
    table = diagnose(Run("diagnose", SETTINGS), Site(None, tmp_path, needs)).measurements
    assert set(table["metric"]) == {"cka", "svcca", "probe_before", "probe_after"}
    assert sorted(table["layer"].unique()) == [-1, 0, 1]
    assert table["value"].between(0, 1).all()
    assert table.query("metric == 'cka'")["value"].max() < 0.9999


def test_a_model_and_itself(folders, tmp_path):
    needs = {"model": folders / "tuned", "tuned": folders / "tuned"}
    result = diagnose(Run("diagnose", SETTINGS), Site(None, tmp_path, needs)).result
    assert result["cka"] == pytest.approx(1)
    assert result["svcca"] == pytest.approx(1)
    assert result["probe_before"] == result["probe_after"]


def test_power_laws_before_and_after(folders, tmp_path):
    pytest.importorskip("weightwatcher")
    needs = {"model": folders / "base", "tuned": folders / "tuned"}
    found = power_laws(Run("power_laws", {"task": "digits-parity"}), Site(None, tmp_path, needs))
    exponents = found.measurements.pivot(index=["layer", "matrix"], columns="metric", values="value")
    assert set(exponents.index.get_level_values("layer")) == {-1, 0, 1}
    assert (exponents > 1).all(axis=None)
    assert (exponents["power_law_before"] != exponents["power_law_after"]).all()
    assert found.result["power_law_before"] == pytest.approx(exponents["power_law_before"].mean())
    assert found.result["weightwatcher"]
