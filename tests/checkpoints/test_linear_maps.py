"""A matrix is the linear map that its layer computes, `layer(x) − layer(0) = x Wᵀ`, however its weight is laid out."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spectralbasis.checkpoints import logical_matrices, match_matrices, open_checkpoint
from tests.models import tiny

MODELS = ["bert", "distilbert", "t5", "gpt2", "gpt_bigcode", "gpt_neox", "llama", "phi3", "mixtral", "vit", "resnet",
          "convnext", "wav2vec2"]  # fmt: skip
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def linear_map(layer: nn.Module) -> torch.Tensor:
    """The matrix (out, in) of a layer, found by feeding it unit vectors."""
    if isinstance(layer, CONVOLUTIONS):
        inputs = layer.weight[0].numel()
        patches = torch.cat([torch.eye(inputs).reshape(inputs, *layer.weight.shape[1:])] * layer.groups, dim=1)
        convolve = torch.conv1d if isinstance(layer, nn.Conv1d) else torch.conv2d
        return convolve(patches, layer.weight, groups=layer.groups).flatten(1).T
    inputs = layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.weight.shape[1]
    return (layer(torch.eye(inputs)) - layer(torch.zeros(1, inputs))).T


def layers(model: nn.Module) -> dict[str, torch.Tensor]:
    kinds = (nn.Linear, Conv1D, *CONVOLUTIONS)
    return {name: linear_map(layer) for name, layer in model.named_modules() if isinstance(layer, kinds)}


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
@torch.no_grad()
def test_matrices_are_the_maps_of_their_layers(model_type, saved, tmp_path):
    model = tiny(model_type)
    expected = layers(model)
    if saved:
        model.save_pretrained(tmp_path)
    # A file may have other names than the module, whose layers are the truth.
    pairs = match_matrices(open_checkpoint(tmp_path if saved else model), open_checkpoint(model)).pairs

    compared = 0
    for matrix, of_module in pairs:
        layer = of_module.cut.tensor.removesuffix(".weight")
        if of_module.cut.rows is not None or layer not in expected:
            continue  # a part of a fused weight, or one of a stack of experts: other tests have these
        found = matrix.read()
        assert tuple(found.shape) == matrix.shape
        torch.testing.assert_close(found, expected[layer], rtol=1e-5, atol=1e-6, msg=matrix.name)
        compared += 1
    assert compared
    assert {of_module.cut.tensor.removesuffix(".weight") for _, of_module in pairs} >= set(expected)


@torch.no_grad()
def test_transposed_convolution_of_a_module():
    layer = nn.ConvTranspose2d(3, 5, 2)
    matrices, _ = logical_matrices(open_checkpoint(nn.Sequential(layer)))
    pixel = layer(torch.eye(3)[:, :, None, None]) - layer.bias[:, None, None]
    expected = pixel.permute(1, 0, 2, 3).reshape(5, -1)
    torch.testing.assert_close(matrices["0"].read(), expected)


def test_three_dimensional_convolution():
    layer = nn.Conv3d(2, 4, (2, 3, 1))
    matrices, _ = logical_matrices(open_checkpoint(nn.Sequential(layer)))
    assert matrices["0"].shape == (4, 12)
    assert torch.equal(matrices["0"].read()[1], layer.weight[1].flatten())


def test_linear_attention_named_like_gpt2_is_not_transposed():
    state = {"h.0.attn.c_attn.weight": torch.randn(24, 8), "h.0.attn.c_proj.weight": torch.randn(8, 8)}
    matrices, _ = logical_matrices(open_checkpoint(state))
    assert torch.equal(matrices["h.0.attn.c_attn.key"].read(), state["h.0.attn.c_attn.weight"][8:16])
    assert torch.equal(matrices["h.0.attn.c_proj"].read(), state["h.0.attn.c_proj.weight"])


def test_state_dict_of_gpt2_needs_no_config():
    model = tiny("gpt2")
    from_module, _ = logical_matrices(open_checkpoint(model))
    from_state, _ = logical_matrices(open_checkpoint(model.state_dict()))
    assert from_state.keys() == from_module.keys()
    assert all(torch.equal(from_state[name].read(), matrix.read()) for name, matrix in from_module.items())
