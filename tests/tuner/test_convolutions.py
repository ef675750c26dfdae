"""Convolutions against the same convolution with the dense `W + ΔW`, in float64."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.func import functional_call

from spectralbasis.basis import SpectralBasis
from spectralbasis.tuner import Convolution, SpectralConfig

LAYERS = {
    "1d, circular": (nn.Conv1d, {"padding": 2, "padding_mode": "circular"}, (5, 3, 8)),
    "2d, strided": (nn.Conv2d, {"stride": (2, 1), "padding": (1, 0)}, (5, 3, 7, 6)),
    "2d, one by one": (nn.Conv2d, {"bias": False, "kernel_size": 1}, (5, 3, 4, 4)),
    "3d, dilated": (nn.Conv3d, {"dilation": (1, 2, 1)}, (5, 3, 4, 6, 4)),
}


def adapted(name, coefficients="core"):
    kind, options, shape = LAYERS[name]
    layer = kind(3, 4, **{"kernel_size": 3, **options}).double()
    config = SpectralConfig(target_modules=["0"], coefficients=coefficients, leading=3, init_weights=False)
    model = get_peft_model(nn.Sequential(layer), config).eval().double()
    return model, model.base_model.model[0], torch.randn(shape, dtype=torch.float64, requires_grad=True)


def dense(layer, x):
    """The base layer's output with the weight that `U C Vᵀ` is added to, differentiable in C."""
    C, U, V, form = layer.terms("default")
    update = (U @ (torch.diag(C) if form == "diagonal" else C) @ V.T).reshape(layer.weight.shape)
    return functional_call(layer.base_layer, {"weight": layer.weight + update}, (x,))


@pytest.fixture(params=LAYERS)
def name(request):
    return request.param


@pytest.mark.parametrize("coefficients", ["diagonal", "core"])
def test_output_and_gradients_are_those_of_the_dense_update(name, coefficients):
    model, layer, x = adapted(name, coefficients)
    assert type(layer) is Convolution
    C = layer.stored("default")
    expected = dense(layer, x)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(model(x), expected)
    found = torch.autograd.grad((model(x) * weights).sum(), (x, C))
    wanted = torch.autograd.grad((expected * weights).sum(), (x, C))
    torch.testing.assert_close(found, wanted)


def test_an_input_without_a_batch(name):
    model, _, x = adapted(name)
    torch.testing.assert_close(model(x[0]), model(x)[0])


def test_rows_of_several_adapters(name):
    model, _, x = adapted(name)
    model.add_adapter("other", SpectralConfig(target_modules=["0"], leading=2, init_weights=False))
    model.double()
    names = ["default", "__base__", "other", "other", "default"]
    mixed = model(x, adapter_names=names)
    for row, adapter in enumerate(names):
        if adapter == "__base__":
            expected = model.base_model.model[0].base_layer(x)
        else:
            model.set_adapter(adapter)
            expected = model(x)
        torch.testing.assert_close(mixed[row], expected[row])


def test_the_hash_is_that_of_the_matrix_in_a_checkpoint(tmp_path):
    """A basis file, which knows a convolution as (out, in·kernel), serves the layer."""
    base = nn.Sequential(nn.Conv2d(3, 8, 3))
    SpectralBasis.compute(base, leading=4).save(tmp_path / "basis.safetensors")
    config = SpectralConfig(target_modules=["0"], basis=str(tmp_path / "basis.safetensors"), leading=4)
    config = get_peft_model(base, config).peft_config["default"]
    assert SpectralBasis.load(tmp_path / "basis.safetensors")["0"].base_hash == config.base_hashes["0"]
