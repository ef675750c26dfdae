"""Weight-normalised layers read as the weight that they compute with."""

import pytest
import torch
from torch import nn

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
