"""Having several adapters: names, activity, deletion, disabling, unloading, combination."""

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from spectralbasis.errors import InputError
from spectralbasis.tuner import SpectralLayer
from tests.tuner.cases import CASES


def layers(model):
    return [module for module in model.modules() if isinstance(module, SpectralLayer)]


def test_attributes(case):
    model = case.adapted()
    assert isinstance(model, PeftModel)
    assert all(hasattr(model, name) for name in ("save_pretrained", "from_pretrained", "push_to_hub"))


def test_the_adapter_name_is_in_the_parameter_names(case):
    names = [name for name, _ in case.adapted(adapter_name="test-adapter").named_parameters()]
    assert any(name.endswith("spectral_coefficients.test-adapter.weight") for name in names)


def test_active_adapters():
    case = CASES["mlp, both layers"]
    model = case.adapted()
    first = case.output(model)
    model.add_adapter("other", case.settings())
    assert model.active_adapters == ["default"]
    assert torch.equal(case.output(model), first)
    model.set_adapter("other")
    second = case.output(model)
    assert model.active_adapters == ["other"]
    assert not torch.allclose(first, second, atol=1e-3)
    assert all(layer.stored("other").requires_grad for layer in layers(model))
    assert not any(layer.stored("default").requires_grad for layer in layers(model))
    model.set_adapter("default")
    assert torch.equal(case.output(model), first)
    model.base_model.set_adapter(["default", "other"])
    both = case.output(model)
    model.base_model.set_adapter(["other", "default"])
    torch.testing.assert_close(case.output(model), both)


def test_adapters_on_different_layers():
    case = CASES["mlp"]
    model = case.adapted(target_modules=["lin0"])
    first = case.output(model)
    model.add_adapter("other", case.settings(target_modules=["lin1"]))
    assert torch.equal(case.output(model), first)
    model.set_adapter("other")
    torch.testing.assert_close(case.output(model), case.output(only(case, model)))


def only(case, model):
    """The base with the weights that adapter `other` gives lin1."""
    base = case.base()
    base.lin1.weight.data += model.base_model.model.lin1.get_delta_weight("other").detach()
    return base


@pytest.mark.parametrize("active", [True, False])
def test_delete(case, active):
    model = case.adapted()
    model.add_adapter("delete_me", case.settings())
    if active:
        model.set_adapter("delete_me")
        with pytest.warns(UserWarning, match="delete_me was active"):
            model.delete_adapter("delete_me")
    else:
        model.delete_adapter("delete_me")
    assert "delete_me" not in model.peft_config
    assert model.active_adapters == ["default"]
    for layer in layers(model):
        for name in layer.adapter_layer_names + layer.other_param_names:
            assert "delete_me" not in getattr(layer, name)
    case.output(model)
    model.delete_adapter("default")
    assert model.active_adapters == []
    assert not any(len(layer.spectral_factors) for layer in layers(model))
    case.output(model.base_model.model)


def test_delete_unknown():
    with pytest.raises(ValueError, match="Adapter unknown-adapter does not exist"):
        CASES["mlp"].adapted().delete_adapter("unknown-adapter")


def test_a_merged_adapter_cannot_be_deleted():
    model = CASES["mlp"].adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")


def test_unload_gives_the_base_back(case):
    base = case.base()
    unloaded = case.adapted().unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())
    assert not hasattr(unloaded, "peft_config")
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(case.output(unloaded), case.base_output())


def test_disabling_within_a_context(case):
    model = case.adapted(modules_to_save=None, task_type=None)
    expected = case.output(model)
    with model.disable_adapter():
        assert torch.equal(case.output(model), case.base_output())
        with model.disable_adapter():
            pass
        assert torch.equal(case.output(model), case.base_output())
    assert torch.equal(case.output(model), expected)


def test_disabling_with_trained_biases_warns():
    model = CASES["mlp"].adapted(bias="all")
    with pytest.warns(UserWarning, match="disabling adapter layers with bias"), model.disable_adapter():
        pass


@pytest.mark.parametrize("biases", [("none", "all"), ("all", "none")])
def test_one_adapter_with_biases_is_allowed(biases):
    model = CASES["mlp"].adapted(bias=biases[0])
    model.add_adapter("other", CASES["mlp"].settings(bias=biases[1]))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("third", CASES["mlp"].settings(bias="spectral_only"))


def test_an_adapter_that_cannot_be_made_leaves_the_model_as_it_was():
    case = CASES["mlp, both layers"]
    model = case.adapted()
    expected = case.output(model)
    with pytest.raises(InputError, match=r"budget=1e-09 of .* parameters is 0 coefficients"):
        model.add_adapter("other", case.settings(budget=1e-9))
    assert set(model.peft_config) == {"default"}
    assert all(set(layer.spectral_coefficients) == {"default"} for layer in layers(model))
    assert torch.equal(case.output(model), expected)


@pytest.mark.parametrize("weights", [[0.5, 1.5], [-0.5, -1.2], [1.0, 0.0]])
def test_weighted_combination_is_exact(case, weights):
    model = case.adapted(modules_to_save=None, task_type=None)
    model.add_adapter("other", case.settings(modules_to_save=None, task_type=None))
    model.add_weighted_adapter(["default", "other"], weights, "sum")
    for layer in layers(model):
        expected = sum(w * layer.get_delta_weight(name) for w, name in zip(weights, ("default", "other"), strict=True))
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, atol=1e-5, rtol=1e-5)
    assert model.active_adapters == ["default"]
    model.set_adapter("sum")
    case.output(model)


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "message"),
    [
        (["default", "nobody"], [1, 1], "sum", "'nobody' is unknown; the model has default, wider"),
        (["default"], [1, 1], "sum", "1 adapters and 2 weights"),
        (["default"], [1], "wider", "'wider' exists already"),
        (["default", "wider"], [1, 1], "sum", "differ in ranks"),
    ],
)
def test_weighted_combination_refuses(adapters, weights, name, message):
    model = CASES["mlp"].adapted(leading=3)
    model.add_adapter("wider", CASES["mlp"].settings(leading=4))
    with pytest.raises(InputError, match=message):
        model.add_weighted_adapter(adapters, weights, name)


def test_weighted_combination_refuses_retrained_modules():
    with pytest.raises(InputError, match="modules_to_save"):
        CASES["mlp, head"].adapted().add_weighted_adapter(["default"], [1.0], "sum")
