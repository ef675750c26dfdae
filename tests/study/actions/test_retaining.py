"""What is left of a first task: all of it under an adapter of zeros, less under one that trained."""

import pytest
from safetensors.torch import load_file, save_file

from spectralbasis.study.actions import retention, tune
from spectralbasis.study.runs import Run, Site
from spectralbasis.study.starting import find_architecture, random_model

SETTINGS = {"task": "digits-parity", "second_task": "digits"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model tuned to a first task, and an adapter on it, at a high rate, for one with other classes."""
    root = tmp_path_factory.mktemp("models")
    architecture = find_architecture("vit-tiny")
    random_model(architecture.auto_model, architecture.make_config(), 0).save_pretrained(root / "base")
    tuning = {"steps": 40, "batch_size": 64}
    first = Run("tune", {"task": "digits-parity", "method": "full", "learning_rate": 3e-3, **tuning})
    second = Run("tune", {"task": "digits", "coefficients": "core", "leading": 8, "learning_rate": 3.0, **tuning})
    for run, name, model in ((first, "model", "base"), (second, "adapter", "model")):
        (root / name).mkdir()
        tune(run, Site(None, root / name, {"model": root / model}))
    return root


def score(folders, tmp_path):
    needs = {"model": folders / "model", "adapter": folders / "adapter"}
    return retention(Run("retention", SETTINGS), Site(None, tmp_path, needs)).result


def test_an_adapter_makes_forget(folders, tmp_path):
    found = score(folders, tmp_path)
    assert found["after"] < found["before"] - 0.02
    assert found["before"] > 0.6


@pytest.mark.parametrize(
    "method", ["full", *(pytest.param(one, marks=pytest.mark.slow) for one in ("bitfit", "subspace"))]
)
def test_tuning_by_any_other_method_counts_too(folders, tmp_path, method):
    run = Run("tune", {"task": "digits", "method": method, "learning_rate": 3e-2, "steps": 20, "batch_size": 64})
    (tmp_path / "second").mkdir()
    tune(run, Site(None, tmp_path / "second", {"model": folders / "model"}))
    needs = {"model": folders / "model", "adapter": tmp_path / "second"}
    found = retention(Run("retention", SETTINGS), Site(None, tmp_path, needs)).result
    assert found["after"] != found["before"]


def test_an_adapter_of_zeros_does_not(folders, tmp_path):
    file = folders / "adapter" / "adapter_model.safetensors"
    trained = load_file(file)
    save_file({name: one * 0 if "spectral_" in name else one for name, one in trained.items()}, file)
    found = score(folders, tmp_path)
    save_file(trained, file)
    assert found["after"] == found["before"]
