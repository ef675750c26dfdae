"""Stacks of experts: `target_parameters`, checked against running with the changed parameter."""

import warnings

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model
from torch import nn
from torch.func import functional_call

from spectralbasis import CoefficientBank, export_lora, open_checkpoint, similarity
from spectralbasis.errors import BaseMismatchError, InputError
from spectralbasis.tuner import ParamWrapper, SpectralConfig
from tests.models import tiny

IDS = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
MODELS = {
    "gpt_oss": ["experts.gate_up_proj", "experts.down_proj"],
    "llama4_text": ["experts.gate_up_proj", "experts.down_proj"],
    "granitemoe": ["input_linear.weight"],
}


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def base(kind):
    torch.manual_seed(0)
    return tiny(kind, "causal", initializer_range=0.2, num_experts_per_tok=2)


def settings(kind, **changes):
    return SpectralConfig(**{"target_parameters": MODELS[kind], "leading": 4, "init_weights": False, **changes})


def adapted(kind, **changes):
    model = base(kind)
    torch.manual_seed(1)
    return get_peft_model(model, settings(kind, **changes)).eval()


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


def test_only_the_named_parameters_are_adapted(kind):
    model = adapted(kind)
    assert {w.parameter_name for w in wrappers(model)} <= {"gate_up_proj", "down_proj", "weight"}
    assert len(wrappers(model)) == 2 * len(MODELS[kind])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".spectral_coefficients." in name for name in trained)
    sizes = [w.stored("default").numel() for w in wrappers(model)]
    assert sorted(sizes) == sorted(2 * [3 * 4] * (len(MODELS[kind]) - 1) + 2 * [3 * 2 * 4])  # gate and up are two


def test_the_start_is_the_base(kind):
    assert torch.equal(adapted(kind, init_weights=True)(IDS).logits, base(kind)(IDS).logits)


@pytest.mark.parametrize("coefficients", ["diagonal", "core"])
def test_output_and_gradients_are_those_of_the_changed_parameters(kind, coefficients):
    model = adapted(kind, coefficients=coefficients)
    plain, changed, leaves = base(kind), {}, []
    for wrapper in wrappers(model):
        leaves.append(wrapper.stored("default"))
        name = next(n for n, p in plain.named_parameters() if torch.equal(p, wrapper.parameter) and n not in changed)
        changed[name] = wrapper.parameter + wrapper._update("default")
    loss = model(IDS, labels=IDS).loss
    expected = functional_call(plain, changed, (IDS,), {"labels": IDS}).loss
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaves), atol=1e-5, rtol=1e-4)


def test_each_expert_has_its_own_matrix():
    model = adapted("gpt_oss", coefficients="core")
    config = model.peft_config["default"]
    assert {"layers.0.mlp.experts.2.down_proj", "layers.1.mlp.experts.0.gate_up_proj.up"} <= set(config.ranks)
    for wrapper in wrappers(model):
        update = wrapper.get_delta_weight("default")
        halves = [update[..., ::2], update[..., 1::2]] if wrapper.parameter_name == "gate_up_proj" else [update]
        assert all(torch.linalg.matrix_rank(one) == 4 for half in halves for one in half)
        assert not torch.allclose(update[0], update[1])


def test_merge_unmerge_and_unload(kind):
    model = adapted(kind)
    expected = model(IDS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base(kind)(IDS).logits)
    unloaded = model.merge_and_unload()
    assert not wrappers(unloaded)
    torch.testing.assert_close(unloaded(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(adapted(kind).unload()(IDS).logits, base(kind)(IDS).logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_beside_another_adapter(kind, low_cpu_mem_usage, tmp_path):
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    expected = model(IDS).logits
    loaded = PeftModel.from_pretrained(base(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(IDS).logits, expected)
    loaded.add_adapter("other", settings(kind, leading=2))
    loaded.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert torch.equal(loaded(IDS).logits, expected)
    loaded.set_adapter("other")
    assert not torch.allclose(loaded(IDS).logits, expected)


def test_weighted_combination(kind):
    model = adapted(kind)
    model.add_adapter("other", settings(kind))
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    for wrapper in wrappers(model):
        expected = 0.5 * wrapper.get_delta_weight("default") - 2 * wrapper.get_delta_weight("other")
        torch.testing.assert_close(wrapper.get_delta_weight("sum"), expected, atol=1e-5, rtol=1e-5)


def test_budgets_and_patterns_count_every_expert():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        model = adapted("gpt_oss", leading=None, rank_pattern={"down_proj": 2, "gate_up_proj": 1}, budget=0.02)
    allocation = model.base_model.allocation()
    assert allocation.share <= 0.02
    assert {k for name, k in allocation.ranks.items() if name.endswith("down_proj")} == {2}
    assert {k for name, k in allocation.ranks.items() if "gate_up_proj" in name} == {1}
    assert len(allocation.ranks) == 2 * 3 * 3
    with pytest.warns(UserWarning, match="rank_pattern 'nothing' matches no matrix that is adapted"):
        adapted("gpt_oss", rank_pattern={"nothing": 2})


def test_another_base_is_refused(tmp_path):
    adapted("gpt_oss").save_pretrained(tmp_path)
    other = base("gpt_oss")
    other.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] += 1e-3
    with pytest.raises(BaseMismatchError, match=r"layers.1.mlp.experts.2.down_proj has hash"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text"])
def test_transposed_stacks_are_read_as_outputs_by_inputs(kind):
    model = adapted(kind)
    for wrapper in wrappers(model):
        assert wrapper.get_delta_weight("default").shape == wrapper.parameter.shape
        experts, inputs, outputs = wrapper.parameter.shape
        assert (wrapper.in_features, wrapper.out_features) == (inputs, outputs)
        held = wrapper.spectral_factors["default"]
        parts = 2 if wrapper.parameter_name == "gate_up_proj" else 1
        assert len(held) == experts * parts
        assert all([len(part) for part in one.first(1)] == [outputs // parts, inputs] for one in held)


def test_rows_cannot_have_adapters_of_their_own():
    with pytest.raises(ValueError, match="experts see the rows mixed; call set_adapter"):
        adapted("gpt_oss")(IDS, adapter_names=["default", "__base__"])


def test_adapters_of_one_model_have_the_same_parameters():
    model = adapted("gpt_oss")
    with pytest.raises(InputError, match=r"target_parameters are \['experts.down_proj'\], but"):
        model.add_adapter("other", settings("gpt_oss", target_parameters=["experts.down_proj"]))
    assert set(model.peft_config) == {"default"}


def test_a_vector_is_no_stack():
    with pytest.raises(InputError, match=r"norm.weight is \(32,\), neither a matrix nor a stack"):
        adapted("gpt_oss", target_parameters=["model.norm.weight"])


def test_a_single_matrix():
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5)),
        SpectralConfig(target_modules=[], target_parameters=["0.weight"], init_weights=False),
    )
    x = torch.randn(3, 6)
    expected = model(x)
    assert torch.linalg.matrix_rank(wrappers(model)[0].get_delta_weight("default")) == 5
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_conversion_to_lora_is_refused():
    with pytest.raises(TypeError, match=r"do not support LoRA conversion.*ParamWrapper"):
        convert_to_lora(adapted("gpt_oss"), rank=4)


def test_other_readers_say_that_peft_alone_reads_stacks(tmp_path):
    adapted("gpt_oss").save_pretrained(tmp_path)
    readers = [
        lambda: open_checkpoint(tmp_path, base=base("gpt_oss")),
        lambda: export_lora(tmp_path, tmp_path / "lora", base=base("gpt_oss")),
        lambda: similarity([tmp_path, tmp_path], base=base("gpt_oss")),
        lambda: CoefficientBank.from_adapters(base("gpt_oss"), {"task": tmp_path}),
    ]
    for read in readers:
        with pytest.raises(InputError, match=r"adapts stacks of experts, target_parameters=\['experts.down_proj', "):
            read()
