"""Runs of pretraining at several scales, and comparing runs where they moved equally far."""

import math

import pandas as pd
import pytest

from spectralbasis.study.runs import Run
from spectralbasis.study.subjects import BERT, ROBERTA_LINEAGE, TINY, VIT, at_equal_norm, at_last_step

MEASURED = {"leading": 4, "draws": 1, "shares": (0.001, 0.5, 1.0)}


@pytest.mark.parametrize("lineage", [VIT, BERT, TINY])
def test_sizes_span_a_factor_of_64_at_equal_updates_from_the_same_weights(lineage):
    assert len(lineage.sizes) >= 4
    assert list(lineage.sizes) == sorted(lineage.sizes)
    assert lineage.sizes[-1] >= 64 * lineage.sizes[0]
    runs = [lineage.pretrained(size, 3) for size in lineage.sizes]
    assert [run.settings["train_examples"] for run in runs] == list(lineage.sizes)
    assert len({run.settings["steps"] for run in runs}) == 1
    assert {run.needs["model"] for run in runs} == {Run("initialise", {"architecture": lineage.architecture}, 3)}
    assert len(set(runs)) == len(runs)


def test_every_update_of_the_largest_size_can_see_new_examples():
    for lineage in (VIT, BERT):
        seen = lineage.pretraining["steps"] * lineage.pretraining["batch_size"]
        assert lineage.sizes[-1] <= seen


def test_released_models_are_taken_as_they_are():
    assert ROBERTA_LINEAGE.pretrained(10**8, 1) == "nyu-mll/roberta-base-100M-2"
    run = ROBERTA_LINEAGE.finetune(ROBERTA_LINEAGE.pretrained(10**7, 0), "RTE", 0, MEASURED)
    assert (run.settings["model"], dict(run.needs)) == ("nyu-mll/roberta-base-10M-1", {})


def test_finetuning_is_measured_at_its_shares_of_all_steps():
    run = TINY.finetune(TINY.pretrained(20, 0), "digits-parity", 0, MEASURED)
    assert run.settings["measure"] == {"leading": 4, "draws": 1, "steps": [1, 6, 12]}
    faster = TINY.finetune(TINY.untrained(0), "digits-parity", 0, MEASURED, learning_rate=0.5)
    assert (faster.settings["learning_rate"], faster.settings["method"]) == (0.5, "full")


def paths():
    """Runs a and b of group x, and c of y: norms 1, 2, 4 or more, rotations their squares, of the null four times."""
    rows = [
        {"run": run, "group": group, "step": step, "norm": factor * 2.0**step}
        for run, group, factor in (("a", "x", 1), ("b", "x", 2), ("c", "y", 4))
        for step in (0, 1, 2)
    ]
    table = pd.DataFrame(rows)
    rotation = 1e-4 * table["norm"] ** 2
    return table.assign(overlap=1 - rotation, overlap_null=1 - 4 * rotation, held=2.0 + table["step"])


def test_runs_are_compared_at_the_largest_norm_that_all_of_their_group_reached():
    found = at_equal_norm(paths().sample(frac=1, random_state=0), ["run", "group"], ["group"])
    found = found.sort_values("run")
    assert found["norm"].tolist() == [4, 4, 16]
    assert (1 - found["overlap"]).tolist() == pytest.approx([16e-4, 16e-4, 256e-4])
    assert found["held"].tolist() == pytest.approx([4, 3, 4]), "those of the steps at which the runs had that norm"


def test_a_norm_between_two_steps_has_the_rotation_of_a_power_law():
    between = paths().query("run != 'c'").assign(norm=lambda table: table["norm"] * (1 + 0.3 * (table["run"] == "a")))
    rotation = 1e-4 * between["norm"] ** 2
    found = at_equal_norm(between.assign(overlap=1 - rotation), ["run", "group"], ["group"])
    assert (1 - found["overlap"]).tolist() == pytest.approx([1e-4 * 5.2**2] * 2)


def test_a_run_that_began_beyond_that_norm_has_no_value():
    far = paths().assign(norm=lambda table: table["norm"].where(table["run"] != "b", table["norm"] * 100))
    found = at_equal_norm(far, ["run", "group"], ["group"]).set_index("run")["overlap"]
    assert math.isnan(found["b"])
    assert found["a"] == pytest.approx(1 - 16e-4)


def test_the_last_step_is_that_of_each_run():
    steps = paths().query("run != 'a' or step < 2")
    assert at_last_step(steps, ["run"]).set_index("run")["step"].to_dict() == {"a": 1, "b": 2, "c": 2}
