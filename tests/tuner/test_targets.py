"""Which modules are adapted, and which are refused with a reason."""

import pytest
import torch
from torch import nn

from spectralbasis.errors import InputError
from spectralbasis.tuner import SpectralConfig, SpectralModel
from tests.models import tiny
from tests.tuner.cases import CASES, MLP


def adapt(model, **settings):
    return SpectralModel(model, SpectralConfig(**settings), "default")


def emptied(model):
    """As DeepSpeed leaves a parameter that other processes hold parts of."""
    model.lin0.weight.data = torch.empty(0)
    return model


def test_known_architectures_have_default_targets():
    assert {name.split(".")[-1] for name in adapt(tiny("bert")).targeted_module_names} == {"query", "value"}


def test_unknown_architectures_adapt_all_linear_layers():
    assert set(adapt(MLP()).targeted_module_names) == {"lin0", "lin1"}


def test_all_linear_leaves_the_head_of_a_language_model():
    names = adapt(tiny("gpt2", "causal"), target_modules="all-linear").targeted_module_names
    assert {name.split(".")[-1] for name in names} == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize(
    ("model", "target", "message"),
    [
        (lambda: nn.Sequential(nn.LayerNorm(8)), "0", "0 is not supported: it is LayerNorm"),
        (lambda: nn.Sequential(nn.ConvTranspose1d(4, 4, 3)), "0", "not supported: it is ConvTranspose1d"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "0", "0 is a convolution of 2 groups"),
        (lambda: nn.Sequential(nn.Embedding(9, 4, max_norm=1.0)), "0", "0 has max_norm=1, with which looking up"),
        (lambda: nn.TransformerEncoderLayer(8, 2), "out_proj", "belongs to torch.nn.MultiheadAttention"),
        (lambda: emptied(MLP()), "lin0", r"lin0 is sharded over processes, .* before the model is sharded"),
        (lambda: MLP().to("meta"), "lin0", "lin0 has no dense weight here .* meta device"),
        (lambda: MLP().to(torch.float8_e4m3fn), "lin0", "unquantized"),
    ],
)
def test_modules_without_a_weight_to_decompose(model, target, message):
    with pytest.raises(InputError, match=message):
        adapt(model(), target_modules=[target])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    model = MLP()
    model.lin1.weight.data[0, 0] = value
    with pytest.raises(InputError, match=r"lin1: the matrix holds NaN or infinite values.*leave it out"):
        adapt(model, target_modules=["lin0", "lin1"])
    assert type(model.lin0) is nn.Linear


def test_modules_that_would_share_a_matrix_name_keep_their_own():
    model = nn.ModuleDict({"model": MLP(), "transformer": MLP()})
    config = SpectralConfig(target_modules=["lin0"])
    SpectralModel(model, config, "default")
    assert set(config.ranks) == {"model.lin0", "transformer.lin0"}


@pytest.mark.parametrize(("case", "value"), [("mlp", True), ("conv1d", False)])
def test_fan_in_fan_out_is_overruled_by_the_layer(case, value):
    case = CASES[case]
    expected = case.output(case.adapted())
    with pytest.warns(UserWarning, match=f"fan_in_fan_out={value} does not hold for"):
        model = case.adapted(fan_in_fan_out=value)
    assert torch.equal(case.output(model), expected)
    assert torch.equal(case.output(case.adapted(fan_in_fan_out=not value)), expected)
