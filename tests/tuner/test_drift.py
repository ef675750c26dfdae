"""What SpectralDriftCallback logs while a Trainer trains, and that training does not notice it."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from spectralbasis import SpectralConfig, SpectralDriftCallback
from spectralbasis.basis import SpectralBasis
from spectralbasis.errors import InputError
from spectralbasis.linalg import subspace_overlap
from spectralbasis.tuner import drift
from tests.models import tiny
from tests.tuner.cases import CASES

NAME = "encoder.layer.0.attention.self.query"


class Memory(TrainerCallback):
    """Keeps what a report would get."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.entries.append((state.global_step, dict(logs)))

    def drift(self):
        return [(step, logs) for step, logs in self.entries if "drift/overlap_left" in logs]


def rows():
    ids = torch.randint(1, 50, (8, 7), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()})


def run(model, folder, *callbacks, rate=0.01, **options):
    options = {"max_steps": 6, "logging_steps": 3, "save_strategy": "no", "learning_rate": rate, **options}
    arguments = TrainingArguments(folder, **{"report_to": [], "use_cpu": True, **options})
    trainer = Trainer(model, arguments, train_dataset=rows(), callbacks=list(callbacks))
    trainer.train()
    return trainer


def base():
    torch.manual_seed(0)
    return tiny("bert", "classifier")


def test_full_finetuning(tmp_path):
    memory, model, before = Memory(), base(), base().bert.encoder.layer[0].attention.self.query.weight.detach()
    trainer = run(model, tmp_path, memory, SpectralDriftCallback(leading=4, steps=2, matrices=100))
    assert [step for step, _ in memory.drift()] == [2, 4, 6]
    assert [entry["step"] for entry in trainer.state.log_history if "drift/overlap_left" in entry] == [2, 4, 6]
    last = memory.drift()[-1][1]
    U0, _, Vh0 = torch.linalg.svd(before.double())
    U1, _, Vh1 = torch.linalg.svd(model.bert.encoder.layer[0].attention.self.query.weight.detach().double())
    sides = subspace_overlap(U0[:, :4], U1[:, :4]), subspace_overlap(Vh0[:4].T, Vh1[:4].T)
    assert last[f"drift/overlap/{NAME}"] == pytest.approx(sum(sides) / 2, abs=1e-3)
    each = [value for name, value in last.items() if name.startswith("drift/overlap/")]
    assert len(each) == 13
    assert (last["drift/overlap_left"] + last["drift/overlap_right"]) / 2 == pytest.approx(sum(each) / len(each))
    assert 0 <= last["drift/overlap_min"] <= min(each)
    assert last["drift/singular_values"] > 0
    assert "drift/coefficients" not in last


def test_the_trainer_s_own_entries_are_all_there(tmp_path):
    memory = Memory()
    run(base(), tmp_path, memory, SpectralDriftCallback(leading=4, steps=1))
    assert [step for step, logs in memory.entries if "loss" in logs] == [3, 6]
    assert len(memory.drift()) == 6


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_spectral_adapter(rate, tmp_path):
    memory, model = Memory(), CASES["bert"].adapted(init_weights=True, leading=8)
    run(model, tmp_path, memory, SpectralDriftCallback(leading=4, steps=6), rate=rate)
    ((_, logs),) = memory.drift()
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    sizes = [
        (module.get_delta_weight("default").norm() / torch.linalg.svdvals(module.original_weight)[:4].norm()).item()
        for block in model.base_model.model.bert.encoder.layer
        for module in (block.attention.self.query, block.attention.self.value)
    ]
    assert logs["drift/coefficients"] == pytest.approx(sum(sizes) / 4, rel=1e-4, abs=1e-9)
    assert set(logs) >= {f"drift/overlap/{NAME}", "drift/overlap/encoder.layer.1.attention.self.value"}
    if rate == 0:
        assert logs["drift/overlap_min"] == pytest.approx(1, abs=1e-5)
        assert logs["drift/singular_values"] == pytest.approx(0, abs=1e-5)
    else:
        merged = layer.original_weight + layer.get_delta_weight("default")
        U0, U1 = (torch.linalg.svd(W.double())[0][:, :4] for W in (layer.original_weight, merged))
        assert logs["drift/overlap_left"] < 1
        assert logs["drift/overlap_min"] <= subspace_overlap(U0, U1) + 1e-5


def test_training_is_the_same_with_and_without_it(tmp_path):
    watched, alone = base(), base()
    run(watched, tmp_path, SpectralDriftCallback(leading=4, steps=1))
    run(alone, tmp_path)
    torch.testing.assert_close(watched.state_dict(), alone.state_dict(), rtol=0, atol=0)


def test_the_cost_is_bounded(tmp_path, monkeypatch):
    calls = []
    solve = drift.leading_svd
    monkeypatch.setattr(drift, "leading_svd", lambda W, k: calls.append(k) or solve(W, k))
    memory = Memory()
    run(base(), tmp_path, memory, SpectralDriftCallback(leading=4, steps=3, matrices=3))
    assert calls == [4] * 6
    names = [name for name in memory.drift()[0][1] if name.startswith("drift/overlap/")]
    assert [name.split("/")[-1].split(".")[-1] for name in names] == ["query", "query", "dense"]
    assert names[-1].endswith("pooler.dense")


def test_a_basis_of_the_base_where_training_goes_on_elsewhere(tmp_path):
    file = SpectralBasis.compute(base(), leading=6).save(tmp_path / "basis.safetensors")
    moved = base()
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    memory, blind = Memory(), Memory()
    run(moved, tmp_path, memory, SpectralDriftCallback(leading=4, steps=6, basis=file), rate=0.0)
    run(moved, tmp_path, blind, SpectralDriftCallback(leading=4, steps=6), rate=0.0)
    assert memory.drift()[0][1]["drift/overlap_left"] < 0.9
    assert blind.drift()[0][1]["drift/overlap_left"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["leading", "steps", "matrices"])
def test_counts_are_positive(name, value):
    with pytest.raises(InputError, match=f"{name} must be a whole number of at least 1, got {value}"):
        SpectralDriftCallback(**{name: value})


def test_nothing_to_watch(tmp_path):
    config = SpectralConfig(target_modules=["query"], leading=4, task_type="SEQ_CLS")
    with pytest.raises(InputError, match="more than leading=64 directions; pass a smaller leading"):
        run(get_peft_model(base(), config), tmp_path, SpectralDriftCallback(leading=64))


def test_weights_that_are_not_finite_end_no_training(tmp_path):
    memory, model = Memory(), base()
    callback = SpectralDriftCallback(leading=4, steps=1, matrices=2)

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            model.bert.encoder.layer[0].attention.self.query.weight.data.fill_(float("nan"))

    assert run(model, tmp_path, memory, Break(), callback).state.global_step == 6
    assert memory.drift() == []


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = SpectralDriftCallback(leading=4, steps=2)
    run(base(), tmp_path, callback, report_to=["tensorboard"], logging_dir=str(tmp_path / "board"))
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.step for event in board.Scalars("train/drift/overlap_left")] == [2, 4, 6]
