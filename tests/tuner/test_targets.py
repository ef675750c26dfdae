"""Which modules are adapted, and which are refused with a reason."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from spectralbasis.errors import InputError
from spectralbasis.tuner import SpectralConfig, SpectralLayer, SpectralModel
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
        (lambda: nn.Sequential(nn.Embedding(9, 4, max_norm=1.0)), "0", "0 has max_norm=1, so each lookup"),
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
    found = SpectralModel(model, config, "default").peft_config["default"]
    assert set(found.ranks) == {"model.lin0", "transformer.lin0"}


@pytest.mark.parametrize(("case", "value"), [("mlp", True), ("conv1d", False)])
def test_fan_in_fan_out_is_overruled_by_the_layer(case, value):
    case = CASES[case]
    expected = case.output(case.adapted())
    with pytest.warns(UserWarning, match=f"fan_in_fan_out={value} does not hold for"):
        model = case.adapted(fan_in_fan_out=value)
    assert torch.equal(case.output(model), expected)
    assert torch.equal(case.output(case.adapted(fan_in_fan_out=not value)), expected)


def test_what_fused_kernels_read_is_refused_as_for_lora():
    targets = ["in_proj", "out_proj"]
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        get_peft_model(tiny("mamba", "causal"), LoraConfig(target_modules=targets))
    model = tiny("mamba", "causal")
    with pytest.raises(
        InputError, match=r"layers.0.mixer.out_proj is not supported: .* exclude_modules=\['out_proj'\]"
    ):
        get_peft_model(model, SpectralConfig(target_modules=targets))
    assert not any(isinstance(module, SpectralLayer) for module in model.modules())


def test_all_linear_leaves_out_what_fused_kernels_read_and_says_so():
    with pytest.warns(UserWarning, match=r"leaves .*out_proj.* frozen: fused kernels of Mamba2ForCausalLM"):
        model = get_peft_model(tiny("mamba2", "causal"), SpectralConfig(target_modules="all-linear", leading=2))
    trained = {
        name.partition(".spectral_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad
    }
    assert trained == {"in_proj"}


def test_a_weight_that_its_owner_reads_is_named():
    model = tiny("mamba", "causal")
    with pytest.warns(UserWarning, match=r"MambaMixer has code that reads the weight of dt_proj.* exclude_modules=\['"):
        get_peft_model(model, SpectralConfig(target_modules=["in_proj", "dt_proj"]))
    for quiet in (lambda: tiny("t5"), lambda: tiny("llama"), MLP):  # T5 reads the dtype of `wo.weight`
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            adapt(quiet(), target_modules="all-linear", leading=1)


@pytest.mark.parametrize(
    ("case", "layer", "features"),
    [
        ("mlp", "lin0", (10, 20)),
        ("conv1d", "conv1d", None),
        ("embedding", "emb", None),
        ("convolutions", "conv2d", (6, 4)),
    ],
)
def test_layers_say_how_many_features_they_have_as_loras_do(case, layer, features):
    case = CASES[case]
    lora = get_peft_model(case.base(), LoraConfig(target_modules=[layer], fan_in_fan_out=layer == "conv1d"))
    expected = lora.base_model.model.get_submodule(layer)
    found = case.adapted().base_model.model.get_submodule(layer)
    assert (found.in_features, found.out_features) == (expected.in_features, expected.out_features)
    assert features in (None, (found.in_features, found.out_features))


def test_an_output_may_be_changed_in_place():
    """Llama 4 adds the routed experts to the output of the shared one."""
    for tokens in (2, 500):
        model = CASES["mlp"].adapted()
        layer = model.base_model.model.lin0
        x = torch.randn(tokens, 3, 10)
        expected = torch.autograd.grad((layer(x) + 1).square().sum(), layer.stored("default"))
        found = torch.autograd.grad(layer(x).add_(1).square().sum(), layer.stored("default"))
        torch.testing.assert_close(found, expected)
