"""The actions that tune, make bases and measure gradients, as the runner calls them."""

import json

import pandas as pd
import pytest

from spectralbasis.basis import SpectralBasis
from spectralbasis.errors import InputError
from spectralbasis.study.actions import find_action
from spectralbasis.study.directions import QUANTITIES
from spectralbasis.study.runs import Outcome, Run, Site
from tests.training.examples import save_image_model, save_text_model

DIGITS = {"task": "digits-parity", "steps": 3, "batch_size": 8, "train_examples": 64}


@pytest.fixture
def model(tmp_path):
    return save_image_model(tmp_path / "model")


def perform(run: Run, folder, **needs) -> Outcome:
    folder.mkdir()
    outcome = find_action(run.action)(run, Site(None, folder, needs))
    json.dumps(outcome.result, allow_nan=False)
    return outcome


def test_tune_reports_both_halves_and_leaves_the_adapter(tmp_path, model):
    run = Run("tune", {"model": str(model), "method": "lora", "rank": 2, **DIGITS}, seed=3)
    outcome = perform(run, tmp_path / "run")
    assert {"score", "selection_score", "parameters_backbone", "adapter_bytes", "seconds_per_step"} <= set(
        outcome.result
    )
    assert outcome.result["seed"] == 3
    assert "update_norm_relative" not in outcome.result
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert outcome.measurements is None


def test_no_folder_of_a_machine_is_in_what_a_run_found(tmp_path, model):
    folder = tmp_path / "data" / "text_classification" / "trec"
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text("text,label\n" + "a film,person\na plane,place\n" * 8)
    (folder / "test.csv").write_text("text,label\na good film,person\n")
    text = save_text_model(tmp_path / "text")
    settings = {"model": str(text), "task": "trec", "method": "head", "steps": 2, "max_length": 16,
                "select_on": "train alone"}  # fmt: skip
    (tmp_path / "run").mkdir()
    found = find_action("tune")(Run("tune", settings), Site(tmp_path / "data", tmp_path / "run", {})).result
    assert str(tmp_path) not in json.dumps(found)
    assert found["selection_score"] == found["score"]


def test_a_fully_tuned_model_tells_its_distance_and_its_trajectory_and_serves_others(tmp_path, model):
    measure = {"steps": [1, 3], "leading": 2, "draws": 1}
    run = Run("tune", {"model": str(model), "method": "full", "measure": measure, **DIGITS})
    outcome = perform(run, tmp_path / "full")
    assert 0 < outcome.result["update_norm_relative"] < 1
    assert set(outcome.measurements["step"]) == {1, 3}
    on_it = perform(Run("tune", {"method": "bitfit", **DIGITS}), tmp_path / "next", model=tmp_path / "full")
    assert on_it.result["method"] == "bitfit"


@pytest.mark.parametrize(
    "tasks", [["digits-parity"], pytest.param(["digits-rotated", "digits-parity"], marks=pytest.mark.slow)]
)
def test_a_curvature_basis_of_one_task_or_several_can_be_tuned_in(tmp_path, model, tasks):
    settings = {"kind": "curvature", "tasks": tasks, "model": str(model), "leading": 4, "head_steps": 2}
    assert perform(Run("basis", settings), tmp_path / "basis").result["matrices"] == 12
    tuned = Run("tune", {"model": str(model), "coefficients": "core", "leading": 3, **DIGITS})
    assert perform(tuned, tmp_path / "run", basis=tmp_path / "basis").result["parameters_backbone"] == 12 * 9


def test_tasks_together_make_another_basis_than_each_alone(tmp_path, model):
    bases = []
    for name, tasks in {"a": ["digits"], "b": ["digits-parity"], "ab": ["digits", "digits-parity"]}.items():
        perform(Run("basis", {"kind": "curvature", "tasks": tasks, "model": str(model), "leading": 2}), tmp_path / name)
        bases.append(SpectralBasis.load(tmp_path / name / "basis.safetensors"))
    matrix = next(iter(bases[0]))
    first, second, both = (basis[matrix].U for basis in bases)
    assert not first.allclose(both, atol=1e-3)
    assert not second.allclose(both, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*computed from other weights")
def test_the_directions_of_another_checkpoint_are_a_basis_too(tmp_path, model):
    other = Run("tune", {"model": str(model), "method": "full", "learning_rate": 1e-2, **DIGITS})
    perform(other, tmp_path / "other")
    settings = {"kind": "checkpoint", "leading": 3}
    perform(Run("basis", settings), tmp_path / "basis", checkpoint=tmp_path / "other")
    tuned = Run("tune", {"model": str(model), "coefficients": "diagonal", "leading": 3, **DIGITS})
    outcome = perform(tuned, tmp_path / "run", basis=tmp_path / "basis")
    assert outcome.result["parameters_backbone"] == 12 * 3


def test_an_unknown_kind_of_basis_is_refused(tmp_path, model):
    with pytest.raises(InputError, match="kind='best' of a basis is unknown"):
        perform(Run("basis", {"kind": "best", "leading": 3}), tmp_path / "basis")


@pytest.mark.slow
def test_gradients_and_their_noise_are_far_more_in_the_tasks_own_curvature_than_in_a_random_basis(tmp_path, model):
    curvature = {"kind": "curvature", "tasks": ["digits-parity"], "model": str(model), "leading": 4, "head_steps": 20}
    perform(Run("basis", curvature), tmp_path / "basis")
    tuned = {**DIGITS, "task": "digits-parity", "method": "full"}
    perform(Run("tune", {"model": str(model), **tuned, "learning_rate": 1e-3}), tmp_path / "tuned")
    settings = {
        "model": str(model), "task": "digits-parity", "bases": ["pretrained", "random", "minor", "own"], "k": [2, 4],
        "head_steps": 20, "examples": 64,
    }  # fmt: skip
    needs = {"own": tmp_path / "basis", "tuned": tmp_path / "tuned"}
    outcome = perform(Run("gradient_coverage", settings), tmp_path / "run", **needs)
    table = outcome.measurements
    assert isinstance(table, pd.DataFrame)
    assert len(table) == 4 * 2 * 2 * len(QUANTITIES)
    assert table[table["quantity"] != "signal"]["value"].between(0, 1).all()
    assert outcome.result["own core"] > 3 * outcome.result["random core"]
    wide = table[table["form"] == "core"].pivot(index=["basis", "quantity"], columns="k", values="value")
    shares = wide.drop("signal", level="quantity")
    assert (shares[4] >= shares[2]).all()
    assert wide.loc[("own", "noise"), 4] > 3 * wide.loc[("random", "noise"), 4]
