"""Penalties of parts of the update: their gradients, and what training with them leaves."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from spectralbasis.errors import InputError
from spectralbasis.study.penalty import PARTS, UpdatePenalty
from spectralbasis.study.trajectories import TrajectoryCallback
from tests.models import tiny


def train(folder, *callbacks, model_type="bert"):
    torch.manual_seed(0)
    model = tiny(model_type, "classifier", **({"pad_token_id": 0} if model_type == "gpt2" else {}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(1, 50, (16, 7), generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()})
    options = {"max_steps": 12, "learning_rate": 3e-3, "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(folder, report_to=[], use_cpu=True, **options)
    Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks)).train()
    return before, model


def share_and_norm(folder, *callbacks):
    """Coverage of the update by the core, and its relative norm."""
    trajectory = TrajectoryCallback(steps=[12], leading=4, draws=0)
    train(folder, trajectory, *callbacks)
    means = trajectory.table().groupby("metric")["value"].mean()
    return means["coverage_core"], means["update_norm_relative"]


@pytest.mark.parametrize("part", PARTS)
def test_the_gradient_is_that_of_the_penalty(part):
    torch.manual_seed(0)
    callback, model = UpdatePenalty(part, strength=0.7, leading=3), tiny("gpt2", "classifier")
    callback.on_train_begin(None, None, None, model=model)
    for one in callback._held:
        one.layer.weight.data += torch.randn_like(one.layer.weight)
        conv1d = type(one.layer).__name__ == "Conv1D"
        W = one.layer.weight.detach().clone().requires_grad_()
        update = (W.T if conv1d else W) - one.W0
        (0.7 * PARTS[part](one.U, one.Vh, update).square().sum()).backward()
        one.layer.weight.grad = torch.zeros_like(W)
        expected = W.grad
        callback.gradient(one)
        torch.testing.assert_close(callback.gradient(one), expected.T if conv1d else expected, rtol=1e-4, atol=1e-4)
    callback.on_pre_optimizer_step(None, None, None)
    added = callback._held[0].layer.weight.grad
    assert added.norm() > 0
    assert len(callback._held) == 8


def test_parts_add_up():
    torch.manual_seed(0)
    U, Vh = torch.linalg.qr(torch.randn(9, 3))[0], torch.linalg.qr(torch.randn(7, 3))[0].T
    update = torch.randn(9, 7)
    core, outside = PARTS["core"](U, Vh, update), PARTS["outside"](U, Vh, update)
    torch.testing.assert_close(core + outside, update)
    assert float((core * outside).sum()) == pytest.approx(0, abs=1e-4)


def test_training_obeys(tmp_path):
    free = share_and_norm(tmp_path)
    held = share_and_norm(tmp_path, UpdatePenalty("core", strength=10.0, leading=4))
    inside = share_and_norm(tmp_path, UpdatePenalty("outside", strength=10.0, leading=4))
    near = share_and_norm(tmp_path, UpdatePenalty("whole", strength=10.0, leading=4))
    assert held[0] < 0.7 * free[0]
    assert inside[0] > 1.5 * free[0]
    assert near[1] < 0.7 * free[1]
    assert held[1] > near[1]


def test_no_strength_changes_nothing(tmp_path):
    _, alone = train(tmp_path)
    _, with_none = train(tmp_path, UpdatePenalty("whole", strength=0.0))
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in with_none.state_dict().items())


def test_what_cannot_be_is_said():
    with pytest.raises(InputError, match="core, outside, whole"):
        UpdatePenalty("middle", strength=1.0)
    with pytest.raises(InputError, match="strength must be at least 0"):
        UpdatePenalty("core", strength=-1.0)
    frozen = tiny("bert").requires_grad_(False)
    with pytest.raises(InputError, match="no trained linear layer"):
        UpdatePenalty("core", strength=1.0).on_train_begin(None, None, None, model=frozen)
