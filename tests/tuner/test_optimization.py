"""Coefficients and heads in groups of their own, for any optimizer and for the Trainer."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from spectralbasis.errors import InputError
from spectralbasis.tuner.calibration import parameter_groups
from tests.models import tiny
from tests.tuner.cases import CASES


def names(model, group):
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return {known[id(parameter)] for parameter in group["params"]}


def test_every_trained_parameter_is_in_one_group():
    model = CASES["bert"].adapted()
    coefficients, head = parameter_groups(model, learning_rate=1e-2, head_learning_rate=1e-3)
    assert (coefficients["lr"], head["lr"]) == (1e-2, 1e-3)
    assert all("spectral_coefficients" in name for name in names(model, coefficients))
    assert all("classifier.modules_to_save" in name for name in names(model, head))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names(model, coefficients) | names(model, head) == trained
    assert not names(model, coefficients) & names(model, head)


def test_heads_by_name():
    model = tiny("bert", "classifier")
    rest, head = parameter_groups(model, learning_rate=1e-4, head_learning_rate=1e-3, head=["classifier"])
    assert names(model, head) == {"classifier.weight", "classifier.bias"}
    assert len(rest["params"]) + 2 == len(list(model.parameters()))


def test_without_a_head_there_is_one_group_and_one_rate_by_default():
    assert [group["lr"] for group in parameter_groups(CASES["mlp"].adapted(), learning_rate=0.1)] == [0.1]
    assert [group["lr"] for group in parameter_groups(CASES["mlp, head"].adapted(), learning_rate=0.1)] == [0.1, 0.1]


def test_nothing_to_train():
    with pytest.raises(InputError, match="no parameter that requires a gradient"):
        parameter_groups(CASES["mlp"].base().requires_grad_(False), learning_rate=0.1)


def test_the_trainer_takes_them(tmp_path):
    """Adam's first step moves a parameter by its rate."""
    model = CASES["bert"].adapted(init_weights=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    groups = parameter_groups(model, learning_rate=0.5, head_learning_rate=1e-3)
    rows = [{"input_ids": [1, 2, 3 + i], "labels": i % 2} for i in range(4)]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", save_strategy="no", use_cpu=True,
                                  lr_scheduler_type="constant", disable_tqdm=True)  # fmt: skip
    Trainer(
        model, arguments, train_dataset=Dataset.from_list(rows), optimizers=(torch.optim.Adam(groups), None)
    ).train()
    for name, parameter in model.named_parameters():
        if name in before:
            moved = (before[name] - parameter.detach()).abs().max()
            assert moved.item() == pytest.approx(0.5 if "spectral_" in name else 1e-3, rel=1e-2), name
