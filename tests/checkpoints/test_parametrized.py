"""Normalised and pruned layers are read as the weight that they compute with."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from spectralbasis.checkpoints import logical_matrices, match_matrices, open_checkpoint

LAYERS = [(nn.Linear(3, 4), 0), (nn.Linear(3, 4), None), (nn.Conv1d(4, 6, 5, groups=2), 2), (nn.Conv1d(4, 6, 5), 0)]


def normalised(layer, dim, old):
    weight_norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    layer = weight_norm(layer, dim=dim)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1
    layer(torch.ones(1, *layer.weight.shape[1:]).repeat_interleave(getattr(layer, "groups", 1), 1))
    return nn.ModuleDict({"layer": layer})


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(("layer", "dim"), LAYERS)
def test_weight_is_the_one_in_effect(layer, dim, old, as_module):
    model = normalised(type(layer)(**arguments(layer)), dim, old)
    checkpoint = open_checkpoint(model if as_module else model.state_dict())
    assert set(checkpoint.names()) == {"layer.weight", "layer.bias"}
    torch.testing.assert_close(checkpoint.read("layer.weight"), model["layer"].weight.data)
    matrices, skipped = logical_matrices(checkpoint)
    assert (list(matrices), skipped) == (["layer"], {})


def arguments(layer):
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    return {name: getattr(layer, name) for name in ("in_channels", "out_channels", "kernel_size", "groups")}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_both_ways_of_storing_match():
    before, after = normalised(nn.Linear(3, 4), 0, True), normalised(nn.Linear(3, 4), 0, False)
    found = match_matrices(open_checkpoint(before.state_dict()), open_checkpoint(after.state_dict()))
    pairs, skipped = found.pairs, found.skipped
    assert ([ours.name for ours, _ in pairs], skipped) == (["layer"], {})


SPECTRAL = [(nn.Linear(3, 4), 0), (nn.Linear(4, 4), 0), (nn.Conv1d(4, 6, 5), 0), (nn.Conv2d(5, 5, 3), 0),
            (nn.ConvTranspose2d(4, 6, 3), 1), (nn.ConvTranspose1d(4, 4, 3), 1)]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*spectral_norm")
@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(("layer", "dim"), SPECTRAL)
def test_spectral_normalisation_in_evaluation(layer, dim, old, as_module):
    spectral_norm = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
    names = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size")
    layer = spectral_norm(
        type(layer)(**{name: getattr(layer, name) for name in names if hasattr(layer, name)}), dim=dim
    )
    features = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    inputs = torch.randn(3, features, *([7] * (layer.weight.ndim - 2)))
    for _ in range(3):
        layer(inputs)  # the vectors follow the weight by one power iteration each
    model = nn.ModuleDict({"layer": layer}).eval()
    layer(inputs)
    checkpoint = open_checkpoint(model if as_module else model.state_dict())
    assert set(checkpoint.names()) == {"layer.weight", "layer.bias"}
    torch.testing.assert_close(checkpoint.read("layer.weight"), layer.weight.detach(), rtol=1e-5, atol=1e-6)
    assert list(logical_matrices(checkpoint)[0]) == ["layer"]


@pytest.mark.parametrize("as_module", [True, False])
def test_pruned_weights_are_masked(as_module):
    model = nn.ModuleDict({"layer": prune.l1_unstructured(nn.Linear(8, 6), "weight", amount=0.5)})
    checkpoint = open_checkpoint(model if as_module else model.state_dict())
    matrices, skipped = logical_matrices(checkpoint)
    assert (list(matrices), skipped) == (["layer"], {})
    assert (matrices["layer"].read() == 0).sum() == 24
    assert torch.equal(matrices["layer"].read(), model["layer"].weight.detach())


def test_other_parametrizations_are_listed():
    model = nn.ModuleDict({"layer": nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), "plain": nn.Linear(4, 4)})
    matrices, skipped = logical_matrices(open_checkpoint(model.state_dict()))
    assert list(matrices) == ["plain"]
    assert list(skipped) == ["layer"]
    assert "remove the parametrization" in skipped["layer"]


def test_gates_called_v_and_g_are_no_weight_normalisation():
    state = {f"mixer.w_{part}": torch.randn(4, 4) for part in "vg"} | {"mixer.weight_v": torch.randn(4, 4)}
    matrices, skipped = logical_matrices(open_checkpoint(state))
    assert set(matrices) == {"mixer.w_v", "mixer.w_g"}
    assert list(skipped) == ["mixer.weight_v"]
