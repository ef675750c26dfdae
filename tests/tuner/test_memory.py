"""What a layer keeps for the backward pass: `x V`, tokens × k numbers, and nothing else of its own."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from spectralbasis.tuner import SpectralConfig


def saved_bytes(model, x):
    """Bytes of distinct storages saved for backward, but for parameters, buffers and the input itself."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    return sum(saved.values()), output


class Pair(nn.Sequential):
    """Two linear layers, so that the second one's input needs a gradient."""

    def __init__(self):
        super().__init__(nn.Linear(32, 48), nn.Linear(48, 40))


@pytest.mark.parametrize("coefficients", ["diagonal", "core"])
@pytest.mark.parametrize("tokens", [20, 200])
@pytest.mark.parametrize("autocast", [False, True])
def test_each_layer_keeps_tokens_times_k_numbers(coefficients, tokens, autocast):
    k = 4
    config = SpectralConfig(target_modules=["0", "1"], coefficients=coefficients, leading=k, init_weights=False)
    model = get_peft_model(Pair(), config)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept, output = saved_bytes(model, torch.randn(tokens, 32, requires_grad=True))
    itemsize = output.element_size()
    # Under autocast the 16-bit copies of the base weights are kept as well, as they are without an adapter.
    floor = sum(layer.weight.numel() for layer in Pair()) * itemsize if autocast else 0
    # What the layers hold once for all steps: singular values, and U and V in the unit of C.
    singular_values = 2 * k * 4
    copies = 4 * k * sum(layer.in_features + layer.out_features for layer in Pair())
    in_their_unit = 2 * 4 * (k if coefficients == "diagonal" else k * k)
    assert output.requires_grad
    assert kept <= 2 * tokens * k * itemsize + singular_values + in_their_unit + copies + floor
