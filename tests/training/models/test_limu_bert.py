"""LIMU-BERT against plain functions on the released weights, and as a model that tasks are tuned on."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModel

from spectralbasis.errors import InputError
from spectralbasis.training import load_model, load_task, tune
from spectralbasis.training.limu_bert import (
    LimuBertConfig,
    LimuBertForSignalClassification,
    LimuBertModel,
    read_released,
)
from tests.training.examples import bright_side_task
from tests.training.tasks.test_signals import write_motionsense


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def normalised(x, gamma, beta):
    centred = x - x.mean(-1, keepdims=True)
    return gamma * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) + beta


def plain_limu_bert(w, signals, heads=4, layers=4):
    """The encoder as its authors describe it, on one window (time, channels) in NumPy; `w` as in the released file."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        return normalised(x, w[f"{name}.gamma"], w[f"{name}.beta"])

    h = norm(linear(signals, "embed.lin"), "embed.norm")
    h = norm(h + w["embed.pos_embed.weight"][: len(h)], "embed.norm")
    for _ in range(layers):
        q, k, v = (np.split(linear(h, f"attn.proj_{part}"), heads, axis=1) for part in "qkv")
        mixed = []
        for i in range(heads):
            scores = np.exp(q[i] @ k[i].T / math.sqrt(q[i].shape[1]))
            mixed.append(scores / scores.sum(1, keepdims=True) @ v[i])
        a = np.concatenate(mixed, axis=1)
        h = norm(a + linear(a, "proj"), "norm1")
        h = norm(h + linear(gelu(linear(h, "pwff.fc1")), "pwff.fc2"), "norm2")
    return h


def states_agree(model, signals):
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        found = model.eval().double()(torch.tensor(signals).double()).last_hidden_state.numpy()
    return found == pytest.approx(np.stack([plain_limu_bert(weights, window) for window in signals]), abs=1e-8)


def test_a_random_model_computes_what_the_authors_describe():
    model = LimuBertModel(LimuBertConfig(initializer_range=0.3))
    assert states_agree(model, np.random.default_rng(0).normal(size=(3, 20, 6)))


@pytest.mark.data
@pytest.mark.parametrize("name", ["limu_bert_x", "limu_pretrain"])
def test_the_released_weights_compute_what_the_authors_describe(data_dir, name):
    model = read_released(data_dir / "limu_bert" / "x" / "weights" / f"{name}.pt")
    windows = load_task("MotionSense", data_dir).train[:3]["signals"].reshape(-1, 20, 6)
    assert states_agree(model, windows)


def test_a_signal_is_classified_from_the_mean_over_its_windows():
    model = LimuBertForSignalClassification(LimuBertConfig(num_labels=3, initializer_range=0.3)).eval()
    signals = torch.randn(2, 60, 6)
    with torch.no_grad():
        parts = [model.transformer(window).last_hidden_state.mean(1) for window in signals.split(20, dim=1)]
        expected = model.classifier(torch.stack(parts).mean(0))
        output = model(signals, labels=torch.tensor([0, 2]))
    assert torch.allclose(output.logits, expected, atol=1e-6)
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(expected, torch.tensor([0, 2])), atol=1e-6)


def test_it_is_saved_and_opened_like_any_model_and_its_head_is_fresh(tmp_path):
    model = LimuBertModel(LimuBertConfig())
    model.save_pretrained(tmp_path / "model")
    assert isinstance(AutoModel.from_pretrained(tmp_path / "model"), LimuBertModel)
    write_motionsense(tmp_path)
    loaded = load_model(tmp_path / "model", load_task("MotionSense", tmp_path))
    assert loaded.head == ("classifier",)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.transformer.state_dict()[name], tensor)


@pytest.mark.parametrize("method", ["full", pytest.param("spectral", marks=pytest.mark.slow)])
def test_it_is_tuned_to_signals(tmp_path, method):
    torch.manual_seed(0)
    LimuBertModel(LimuBertConfig(initializer_range=0.2)).save_pretrained(tmp_path / "model")
    activity = np.arange(16) // 2 % 2
    x = np.random.default_rng(0).normal(size=(16, 40, 6)) + 3 * activity[:, None, None]
    write_motionsense(tmp_path, activity=activity, x=x)
    result = tune(
        tmp_path / "model", task="MotionSense", data=tmp_path, output=tmp_path / "tuned", method=method, steps=40,
        batch_size=8, learning_rate=1e-2, progress=False,
    )  # fmt: skip
    assert result.score == 1


def test_models_and_tasks_of_other_kinds_are_refused(tmp_path):
    LimuBertModel(LimuBertConfig()).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="is a limu_bert model, which cannot classify images"):
        load_model(tmp_path / "model", bright_side_task())


def test_files_that_are_not_the_released_weights_are_named(tmp_path):
    with pytest.raises(InputError, match="no LIMU-BERT weights at"):
        read_released(tmp_path / "absent.pt")
    torch.save({"transformer.proj.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt cannot be read as weights of LIMU-BERT-X"):
        read_released(tmp_path / "other.pt")
    torch.save({"transformer.proj.weight": np.float64}, tmp_path / "code.pt")
    with pytest.raises(InputError, match=r"code\.pt cannot be read"):
        read_released(tmp_path / "code.pt")
