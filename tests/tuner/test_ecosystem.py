"""Other tools of PEFT, torch and transformers on a model with spectral coefficients."""

import copy

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter

from tests.tuner.cases import CASES


@pytest.mark.parametrize("name", ["mlp, both layers", "conv1d", "bert"])
def test_conversion_to_lora_is_exact_at_rank_k(name):
    case = CASES[name]
    model = case.adapted(leading=3, modules_to_save=None, task_type=None)
    assert model.supports_lora_conversion()
    config, weights = convert_to_lora(model, rank=3)
    converted = get_peft_model(case.base(), config).eval()
    assert isinstance(config, LoraConfig)
    set_peft_model_state_dict(converted, weights)
    torch.testing.assert_close(case.output(converted), case.output(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["convolutions", "embedding"])
def test_conversion_to_lora_takes_linear_layers_alone(name):
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(CASES[name].adapted(), rank=3)


def test_hot_swap_is_refused_and_leaves_the_adapter_as_it_was(tmp_path):
    """PEFT swaps LoRA alone; `load_adapter` and `set_adapter` do the same, and need no decomposition."""
    case = CASES["mlp"]
    model = case.adapted()
    before = case.output(model)
    case.adapted(seed=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Hotswapping only supports .*LORA but SPECTRAL was passed"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert torch.equal(case.output(model), before)
    model.load_adapter(tmp_path, "swapped")
    model.set_adapter("swapped")
    model.delete_adapter("default")
    assert torch.equal(case.output(model), case.output(case.adapted(seed=2)))


def test_preparation_for_training_with_frozen_embeddings():
    case = CASES["bert"]
    model = get_peft_model(prepare_model_for_kbit_training(case.base()), case.settings())
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(case.inputs["input_ids"]).requires_grad


def test_deep_copies_share_nothing_with_the_original():
    case = CASES["mlp, both layers"]
    model = case.adapted()
    expected = case.output(model)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.add_(1)
    assert torch.equal(case.output(model), expected)


@pytest.mark.parametrize("name", ["mlp", "mlp, both layers"])
@pytest.mark.parametrize("rows", [3, 60])
def test_dynamo_traces_forward_and_backward_without_a_break(name, rows):
    model = CASES[name].adapted()
    compiled = torch.compile(model.base_model.model, backend="eager", fullgraph=True)
    x = torch.randn(rows, 10)
    expected = torch.autograd.grad(model(x).square().sum(), [p for p in model.parameters() if p.requires_grad])
    found = torch.autograd.grad(compiled(x).square().sum(), [p for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(found, expected)


def test_parallel_copies_of_the_model_load_the_same_adapter(tmp_path):
    case = CASES["gpt2"]
    model = case.adapted()
    model.save_pretrained(tmp_path)
    first, second = (PeftModel.from_pretrained(case.base(), tmp_path) for _ in range(2))
    assert torch.equal(case.output(first), case.output(second))
