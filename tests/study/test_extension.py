"""A task, a method and an experiment of one's own, each one record: they work to the end and are listed."""

import math

import pytest

import spectralbasis as sb
from spectralbasis.errors import InputError
from spectralbasis.study.claims import Claim, Experiment, Findings
from spectralbasis.study.conduct import study
from spectralbasis.study.experiments import EXPERIMENTS, register_experiment
from spectralbasis.study.runs import Run
from spectralbasis.training import METHODS, Method, load_task, register_method, register_task
from spectralbasis.training.known_tasks import TASKS, folder_of
from spectralbasis.training.methods import train_head_and
from tests.training.examples import bright_side_task, save_image_model

SHORT = {"steps": 3, "batch_size": 8, "progress": False}


@pytest.fixture(autouse=True)
def registered():
    """What a test registers is gone after it."""
    saved = [(known, dict(known)) for known in (TASKS, METHODS, EXPERIMENTS)]
    yield
    for known, entries in saved:
        known.clear()
        known.update(entries)


def test_a_task_is_tuned_scored_and_listed(tmp_path):
    given = []

    def load(data):
        given.append(data)
        return bright_side_task()

    register_task("Bright-Side", load, description="which half is bright", folder="bright")
    model = save_image_model(tmp_path / "model")
    tuned = sb.tune(model, task="bright_side", data=tmp_path, output=tmp_path / "a", leading=4, **SHORT)
    again = sb.evaluate(model, tmp_path / "a", task="brightside", data=tmp_path, progress=False)
    assert again.metrics == tuned.metrics
    assert "(which half is bright)" in (tmp_path / "a" / "README.md").read_text("utf-8")
    assert given == [tmp_path, tmp_path]
    assert folder_of("bright-side", tmp_path) == tmp_path / "bright"
    with pytest.raises(InputError, match=r"unknown task 'dark'; .*; Bright-Side \(registered\)"):
        load_task("dark")


def test_a_method_is_tuned_scored_and_listed(tmp_path):
    def prepare(setup):
        return train_head_and(setup, lambda name: "layernorm" in name)

    register_method(Method("layernorms", "mine", prepare, 1e-2, writes="trained"))
    model, task = save_image_model(tmp_path / "model"), bright_side_task()
    tuned = sb.tune(model, task=task, output=tmp_path / "a", method="layernorms", **SHORT)
    assert 0 < tuned.parameters.backbone < tuned.parameters.model / 10
    assert sb.evaluate(model, tmp_path / "a", task=task, progress=False).metrics == tuned.metrics
    with pytest.raises(InputError, match=r"unknown method 'norms'; .*; layernorms \(mine\)"):
        sb.tune(model, task=task, output=tmp_path / "b", method="norms", **SHORT)
    with pytest.raises(InputError, match="the option rank does not apply to the method layernorms"):
        sb.tune(model, task=task, output=tmp_path / "b", method="layernorms", rank=2, **SHORT)


def plan(settings, results):
    return [Run("tests.study.runs.planted:act", {"value": value}, 0) for value in settings]


def analyse(settings, results):
    totals = [record.result["total"] for run in plan(settings, results) if (record := results.get(run))]
    claim = Claim("above zero", "Values are above zero.", "supported", max(totals), math.nan, math.nan, math.nan,
                  "points", "A value below.", len(totals), "2 values")  # fmt: skip
    return Findings([claim])


def test_an_experiment_is_run_analysed_and_listed(tmp_path):
    register_experiment(Experiment("toy", "Are <values> above zero?", {"quick": (1, 3)}, plan, analyse))
    content = study("toy", preset="quick", output=tmp_path, progress=False)
    part = content["experiments"]["toy"]
    assert (part["finished"], part["claims"][0]["effect"]) == (2, 3)
    assert "# Toy" in (tmp_path / "toy.md").read_text()
    with pytest.raises(InputError, match=r"unknown experiment 'game'; the known ones are stability, .*, toy, and all"):
        study("game", output=tmp_path)
    with pytest.raises(InputError, match="toy has no preset 'cpu'; it has quick"):
        study("toy", output=tmp_path)
