"""What is measured while a model trains: the numbers of `compare`, planted updates, and training goes as without."""

import math

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from spectralbasis import compare
from spectralbasis.errors import InputError
from spectralbasis.study.trajectories import (
    COLUMNS,
    Origin,
    TrajectoryCallback,
    measure_null,
    measure_update,
    summarise_steps,
)
from tests.matrices import power_law, with_spectrum
from tests.models import tiny

NAME = "encoder.layer.0.attention.self.query"


def base():
    torch.manual_seed(0)
    return tiny("bert", "classifier")


def train(model, folder, *callbacks, steps=4):
    ids = torch.randint(1, 50, (16, 7), generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()})
    options = {"max_steps": steps, "learning_rate": 0.01, "logging_steps": 1, "save_strategy": "no"}
    arguments = TrainingArguments(folder, report_to=[], use_cpu=True, disable_tqdm=True, **options)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))
    trainer.train()
    return trainer


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_numbers_are_those_of_compare(tmp_path):
    model, callback = base(), TrajectoryCallback(steps=[2, 4, 9], leading=4, draws=2, trailing=True)
    before = weights(model)
    train(model, tmp_path, callback)
    table = callback.table()
    assert table["step"].unique().tolist() == [2, 4]
    compared = compare(before, [weights(model)], leading=4, draws=2, trailing=True).table
    full = compared[(compared["k"] == 4) & (compared["index"] == -1)]
    last = table[(table["step"] == 4) & (table["matrix"] != "")]
    both = last.merge(full, on=["matrix", "metric", "side"], suffixes=("", "_compared"))
    metrics = ["subspace_overlap", "overlap_haar", "wedin_bound", "coverage_diagonal", "coverage_core"]
    metrics += ["coverage_left", "coverage_right"]
    metrics += ["update_norm_relative", "trailing_overlap", "trailing_coverage"]
    assert set(both["metric"]) == set(metrics)
    assert len(both) == len(last[last["metric"].isin(metrics)])
    for column in ("value", "null_mean", "null_std"):
        expected = both[f"{column}_compared"].to_numpy()
        assert both[column].to_numpy() == pytest.approx(expected, abs=1e-5, nan_ok=True)
    cosines = compared[compared["metric"] == "matched_cosine"].groupby(["matrix", "side"])["value"].mean()
    mine = last[last["metric"] == "matched_cosine"].set_index(["matrix", "side"])["value"]
    assert mine.to_dict() == pytest.approx(cosines.to_dict(), abs=1e-5)


def test_training_goes_as_without(tmp_path):
    watched, alone, callback = base(), base(), TrajectoryCallback(steps=[1, 2, 3, 4], leading=4, draws=1)
    trainer = train(watched, tmp_path, callback)
    train(alone, tmp_path)
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in watched.state_dict().items())
    losses = callback.table().query("metric == 'train_loss'").set_index("step")["value"]
    logged = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert losses.to_dict() == pytest.approx(logged, abs=1e-3)
    assert not watched._forward_hooks


def test_a_base_of_the_past(tmp_path):
    model = base()
    before = weights(model)
    train(model, tmp_path, steps=2)
    since_then, since_now = (TrajectoryCallback(one, steps=[1], draws=0) for one in (before, None))
    train(model, tmp_path, since_then, since_now, steps=1)
    norms = [one.table().query("metric == 'update_norm_relative'")["value"].mean() for one in (since_then, since_now)]
    assert norms[0] > norms[1] > 0
    assert since_then.table()["null_mean"].isna().all()


def test_frozen_matrices_are_left_out(tmp_path):
    model, callback = base(), TrajectoryCallback(steps=[1], leading=4, draws=1)
    model.bert.encoder.layer[0].requires_grad_(False)
    train(model, tmp_path, callback, steps=1)
    assert set(callback.table()["layer"]) == {-1, 1}


def test_a_planted_update_in_the_core():
    W0, U, V = with_spectrum(48, 40, power_law(40))
    update = 0.01 * U[:, :4] @ torch.diag(torch.tensor([1.0, 2, 3, 4]).double()) @ V[:, :4].T
    origin = Origin.of(W0, 6, trailing=True)
    found = measure_update(origin, (W0 + update).float())
    assert found["coverage_core", "both"] == pytest.approx(1, abs=1e-4)
    assert found["coverage_diagonal", "both"] == pytest.approx(1, abs=1e-4)
    assert found["trailing_coverage", "both"] == pytest.approx(0, abs=1e-4)
    assert found["subspace_overlap", "left"] == pytest.approx(1, abs=1e-4)
    assert found["update_norm_relative", "both"] == pytest.approx(float(update.norm() / W0.norm()), rel=1e-3)
    chance = measure_null(origin, (W0 + update).float(), "scrambled", 3, 0)
    assert max(chance["coverage_core", "both"]) < 0.3


def test_without_draws_the_null_is_that_of_many_draws():
    W0 = with_spectrum(48, 40, power_law(40))[0]
    noise = torch.randn(48, 40, generator=torch.Generator().manual_seed(0))
    W1 = (W0 + 0.03 * W0.norm() * noise / noise.norm()).float()
    origin = Origin.of(W0, 6, trailing=False)
    closed, drawn = (measure_null(origin, W1, "scrambled", draws, 0) for draws in (None, 60))
    assert ("coverage_diagonal", "both") in closed
    for key, (mean, std) in drawn.items():
        assert closed[key][0] == pytest.approx(mean, abs=4 * std / 60**0.5)
        assert closed[key][1] == pytest.approx(std, rel=0.5)
    trailing = measure_null(Origin.of(W0, 6, trailing=True), W1, "scrambled", None, 0)
    assert trailing["subspace_overlap", "left"] == closed["subspace_overlap", "left"]
    assert 0 < trailing["trailing_overlap", "left"][0] < 1


def test_several_nulls_are_measured_at_once(tmp_path):
    model, names = base(), ["scrambled", "scrambled-left", "energy"]
    callback = TrajectoryCallback(steps=[2], leading=4, draws=2, nulls=names)
    before = weights(model)
    train(model, tmp_path, callback, steps=2)
    table = callback.table()
    after = weights(model)
    for name in names:
        compared = compare(before, [after], leading=4, draws=2, null=name).table
        full = compared[(compared["k"] == 4) & (compared["null"] == name)]
        mine = table[table["null"] == name]
        both = mine.merge(full, on=["matrix", "metric", "side"], suffixes=("", "_compared"))
        assert len(both) == len(mine) > 0
        assert both["null_mean"].to_numpy() == pytest.approx(both["null_mean_compared"].to_numpy(), abs=1e-5)
        assert both["value"].to_numpy() == pytest.approx(both["value_compared"].to_numpy(), abs=1e-5)
    assert set(table.query("null == 'energy'")["metric"]) == {"subspace_overlap"}
    assert set(table.query("null == 'scrambled-left'")["metric"]) == {
        "subspace_overlap", "coverage_left", "coverage_core", "coverage_diagonal",
    }  # fmt: skip
    with pytest.raises(ValueError, match="energy, scrambled, scrambled-left were measured"):
        summarise_steps(table)
    by_energy, by_left = (summarise_steps(table, null=name).iloc[0] for name in ("energy", "scrambled-left"))
    assert by_energy["overlap"] == pytest.approx(by_left["overlap"])
    assert by_energy["right"] == pytest.approx(by_left["right"]), "what was observed is there without a null, too"
    assert math.isfinite(by_left["left_gain"])
    assert math.isfinite(by_energy["held"])


def test_the_effect_is_the_mean_of_the_matrices_logarithms():
    places = [(1, name, layer, "dense") for layer, name in enumerate(["a", "b"])]
    rotations = {"a": [(0.01, 0.04), (0.03, 0.04)], "b": [(0.8, 0.2), (0.8, 0.2)]}  # one matrix turns most, four times
    rows = [
        (*place, "subspace_overlap", side, 1 - seen, 1 - chance, 0.0, "scrambled")
        for place in places
        for side, (seen, chance) in zip(("left", "right"), rotations[place[1]], strict=True)
    ]
    shares = zip(places, (0.02, 0.64), strict=True)
    rows += [(*place, "coverage_core", "both", share, 0.01, 0.0, "scrambled") for place, share in shares]
    found = summarise_steps(pd.DataFrame(rows, columns=list(COLUMNS))).iloc[0]
    assert found["held"] == pytest.approx((1 - 2) / 2)
    assert found["core_gain"] == pytest.approx((1 + 6) / 2)
    assert found["overlap"] == pytest.approx(1 - (0.02 + 0.8) / 2)


def test_small_matrices_get_half_of_their_directions():
    W = with_spectrum(48, 4, power_law(4))[0]
    assert Origin.of(W, 16, trailing=False).k == 2
    assert Origin.of(W, 0.5, trailing=False).k == 2


def test_what_cannot_be_is_said(tmp_path):
    for options in ({"nulls": ["haar"]}, {"nulls": "scrambled"}, {"draws": -1}, {"steps": [0]}):
        with pytest.raises(InputError):
            TrajectoryCallback(**{"steps": [1], **options})
    with pytest.raises(InputError, match="whose adapter was not merged"):
        train(get_peft_model(base(), LoraConfig(target_modules="all-linear")), tmp_path, TrajectoryCallback(steps=[1]))
    with pytest.raises(InputError, match="no weight matrix"):
        train(base(), tmp_path, TrajectoryCallback(tiny("gpt2"), steps=[1]))


def test_a_loss_that_was_not_given_is_nan():
    assert math.isnan(next(TrajectoryCallback(steps=[1])._measure(1))[6])
