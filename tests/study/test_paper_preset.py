"""The preset "paper" does on small models in the hub's layouts what it does on the hub's own."""

import json
import os
import subprocess
import sys

import pytest

from spectralbasis.study.experiments import EXPERIMENTS, find_experiment, task_sharing
from spectralbasis.study.runs import Results, with_needs
from spectralbasis.study.subjects import LARGE
from spectralbasis.training.tasks import same_name, task_names


@pytest.mark.slow
def test_every_kind_of_run_works_on_models_and_data_in_the_layouts_of_the_hub(tmp_path):
    hub = pytest.importorskip("tests.study.hub", reason="sentencepiece or Pillow is not installed")
    hub.save_models(tmp_path / "models")
    hub.save_data(tmp_path / "data")
    places = {"HF_HUB_CACHE": str(tmp_path / "models"), "HF_HOME": str(tmp_path / "home")}
    environment = {**os.environ, **places, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.study.hub", str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["failed"] == {}
    assert {subject.model for subject in LARGE if not subject.name.startswith("MultiBERT")} < set(found["models"])
    assert found["done"] > 60


def test_all_models_and_tasks_of_the_preset_are_known():
    runs = [
        run
        for name in EXPERIMENTS
        for run in with_needs(find_experiment(name).plan(find_experiment(name).PRESETS["paper"], Results({})))
    ]
    tasks = {run.settings["task"] for run in runs if "task" in run.settings}
    assert all(any(same_name(task, name) for name in task_names()) for task in tasks)
    assert all(task in task_sharing.TASKS for subject in LARGE for task in subject.tasks)
