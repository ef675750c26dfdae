"""Stacks of experts: `target_parameters`, checked against running with the changed parameter."""

import re
import warnings
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

from spectralbasis import CoefficientBank, export_lora, export_merged, open_checkpoint, similarity
from spectralbasis.checkpoints import logical_matrices
from spectralbasis.errors import BaseMismatchError, InputError
from spectralbasis.triplets import matrix_hash
from spectralbasis.tuner import ParamWrapper, SpectralConfig, gradient_coverage
from tests.models import tiny
from tests.tuner.cases import CASES

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
    fixed = {"coefficients": "diagonal", "leading": 4, "init_weights": False}
    return SpectralConfig(**{"target_parameters": MODELS[kind], **fixed, **changes})


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


@pytest.mark.parametrize("coefficients", ["diagonal", "core", "rotation"])
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


def test_other_readers_say_what_reads_stacks(tmp_path):
    model = adapted("gpt_oss", init_weights=False)
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload().state_dict()
    opened = open_checkpoint(tmp_path, base=base("gpt_oss"))
    assert not torch.equal(opened.read(STACK), base("gpt_oss").state_dict()[STACK])
    for name in opened.names():
        torch.testing.assert_close(opened.read(name), merged[name])
    with pytest.raises(InputError, match=r"adapted as a parameter that belongs to no layer.*--to merged"):
        export_lora(tmp_path, tmp_path / "lora", base=base("gpt_oss"))
    readers = [
        lambda: similarity([tmp_path, tmp_path], base=base("gpt_oss")),
        lambda: CoefficientBank.from_adapters(base("gpt_oss"), {"task": tmp_path}),
    ]
    for read in readers:
        with pytest.raises(InputError, match=r"adapts stacks of experts, target_parameters=\['experts.down_proj', "):
            read()


def test_a_merged_model_of_stacks_is_what_peft_merges(tmp_path):
    folder, model = tmp_path / "base", tiny("gpt_oss", "causal")
    model.save_pretrained(folder)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = SpectralConfig(target_parameters=parameters, leading=2, coefficients="core", init_weights=False)
    model = get_peft_model(type(model).from_pretrained(folder), config)
    model.save_pretrained(tmp_path / "adapter")
    export_merged(tmp_path / "adapter", tmp_path / "merged", base=folder)
    merged, expected = type(model.get_base_model()).from_pretrained(tmp_path / "merged"), model.merge_and_unload()
    for (name, found), truth in zip(merged.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, truth, msg=name)


def test_the_weight_of_a_linear_layer_may_be_named_as_a_parameter(tmp_path):
    case = CASES["mlp"]
    model = case.adapted(target_parameters=["lin1.weight"])
    assert [wrapper.parameter_name for wrapper in wrappers(model)] == ["weight"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert len(wrappers(loaded)) == 1
    assert torch.equal(case.output(loaded.eval()), case.output(model))
    model.load_adapter(tmp_path, adapter_name="again")
    model.set_adapter("again")
    assert torch.equal(case.output(model), case.output(loaded))


def test_a_weight_is_named_once():
    with pytest.raises(InputError, match=r"means lin0, and target_parameters=.* its weight; name it in one of them"):
        CASES["mlp"].adapted(target_parameters=["lin0.weight"])


def test_a_parameter_that_is_computed_is_refused():
    base = CASES["mlp"].base()
    nn.utils.parametrizations.weight_norm(base.lin0)
    with pytest.raises(InputError, match=r"lin0.weight is not a parameter: .*parametrize.remove_parametrizations"):
        get_peft_model(base, SpectralConfig(target_parameters=["lin0.weight"]))


STACK = "model.layers.0.mlp.experts.down_proj"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
V5 = find_spec("transformers.conversion_mapping") is not None
MIXTURES = {
    "mixtral": ["q_proj", "w1", "w2", "w3", "gate"],
    "qwen3_moe": ["q_proj", "gate_proj", "up_proj", "down_proj"],
}
stacked = pytest.mark.skipif(not V5, reason="experts are linear layers in transformers 4")


def layers_of(model):
    """Trained modules of the first layer, with the wrappers of stacks."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "layers.0." in name]
    return {re.split(r"\.lora_|\.spectral_", name.split("layers.0.")[1])[0] for name in names}


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("targets", ["all-linear", "list"])
def test_target_modules_reach_what_they_reach_for_lora(kind, targets):
    targets = MIXTURES[kind] if targets == "list" else targets
    lora = get_peft_model(base(kind), LoraConfig(target_modules=targets, r=2))
    model = get_peft_model(base(kind), SpectralConfig(target_modules=targets, leading=2))
    assert layers_of(model) == layers_of(lora)
    assert {"mlp.experts", "mlp.experts.base_layer"} <= layers_of(model) or not V5
    assert torch.equal(model.eval()(IDS).logits, base(kind)(IDS).logits)


@stacked
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": r".*layers\.1\..*experts\.\d+\.down_proj"}, {"layers.1": {"down_proj"}}),
        ({"target_modules": r".*experts\.[02]\.up_proj"}, {"layers.0": {"up"}, "layers.1": {"up"}}),
        ({"target_modules": ["up_proj", "down_proj"], "layers_to_transform": [1]}, {"layers.1": {"up", "down_proj"}}),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj", "gate", *ATTENTION]},
         {"layers.0": {"gate", "up"}, "layers.1": {"gate", "up"}}),
        ({"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["experts"]},
         {"layers.0": {"q_proj"}, "layers.1": {"q_proj"}}),
    ],
)  # fmt: skip
def test_patterns_of_former_names(settings, expected, tmp_path):
    model = get_peft_model(base("qwen3_moe"), SpectralConfig(leading=2, init_weights=False, **settings)).eval()
    ranks = model.peft_config["default"].ranks
    found = {
        layer: {name.split(".")[-1] for name in ranks if name.startswith(layer)} for layer in ("layers.0", "layers.1")
    }
    assert {layer: kinds for layer, kinds in found.items() if kinds} == expected
    experts = {int(name.split("experts.")[1].split(".")[0]) for name in ranks if "experts." in name}
    if "[02]" in settings["target_modules"]:
        assert experts == {0, 2}
        update = wrappers(model)[0].get_delta_weight("default")
        assert not update[1].any()
        gate, up = update.chunk(2, dim=1)
        assert not gate.any()
        assert torch.linalg.matrix_rank(up[0]) == 2
    logits = model(IDS).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base("qwen3_moe"), tmp_path)
    assert torch.equal(loaded(IDS).logits, logits)
    torch.testing.assert_close(loaded.merge_and_unload()(IDS).logits, logits, atol=1e-4, rtol=1e-4)


@stacked
def test_a_half_of_a_stack_is_the_linear_layer_that_it_was():
    """The update of gate and up of each expert is that of a linear layer with the same weight and numbers."""
    model = get_peft_model(
        base("mixtral"),
        SpectralConfig(target_modules=["w1", "w3"], coefficients="diagonal", leading=3, init_weights=False),
    )
    config = model.peft_config["default"]
    wrapper = wrappers(model)[0]
    stored = wrapper.stored("default").detach().split(3)
    halves = [half for weight in wrapper.parameter for half in weight.chunk(2)]
    updates = [half for weight in wrapper.get_delta_weight("default") for half in weight.chunk(2)]
    names = [f"layers.0.mlp.experts.{expert}.gate_up_proj.{part}" for expert in range(3) for part in ("gate", "up")]
    for name, W, numbers, update in zip(names, halves, stored, updates, strict=True):
        linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
        linear.weight.data = W.detach().clone()
        alone = get_peft_model(
            nn.Sequential(linear), SpectralConfig(target_modules=["0"], coefficients="diagonal", leading=3)
        )
        layer = alone.base_model.model[0]
        layer.stored("default").data = numbers.clone()
        torch.testing.assert_close(update, layer.get_delta_weight("default"), atol=1e-6, rtol=1e-5)
        own = alone.peft_config["default"]
        assert (config.base_hashes[name], config.ranks[name]) == (own.base_hashes["0"], own.ranks["0"])
        assert config.probes[name] == pytest.approx(own.probes["0"], abs=1e-5)
        assert config.scales[name] == own.scales["0"]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "llama4_text"])
def test_matrices_are_named_as_everywhere_else(kind):
    wanted = {"target_parameters": MODELS[kind]} if kind in MODELS else {"target_modules": "all-linear"}
    config = get_peft_model(base(kind), SpectralConfig(leading=1, **wanted)).peft_config["default"]
    matrices = logical_matrices(open_checkpoint(base(kind)))[0]
    assert set(config.ranks) <= set(matrices)
    assert any("experts.2." in name or "input_linear.2" in name for name in config.ranks)
    for name, expected in config.base_hashes.items():
        assert matrix_hash(matrices[name].read()) == expected


@pytest.mark.parametrize(("kind", "names"), [("gpt_oss", "mlp.experts.down_proj, mlp.experts.gate_up_proj"),
                                             ("llama4_text", "feed_forward.experts.down_proj")])  # fmt: skip
def test_experts_that_stay_frozen_are_named_with_their_share(kind, names):
    model = base(kind)
    share = sum(p.numel() for n, p in model.named_parameters() if "experts." in n and "bias" not in n)
    share += sum(p.numel() for n, p in model.named_parameters() if n.endswith("router.weight") and kind == "gpt_oss")
    share /= sum(p.numel() for p in model.parameters())
    with pytest.warns(
        UserWarning, match=rf"leaves {names}.* frozen, {share:.1%} of the parameters.*target_parameters=\["
    ):
        get_peft_model(model, SpectralConfig(target_modules="all-linear", leading=1))


@pytest.mark.parametrize("kind", ["llama4_text", "mixtral"])
def test_routers_are_trained(kind):
    """Llama 4's is a linear layer that returns two tensors, Mixtral's a module of its own."""
    model = get_peft_model(base(kind), SpectralConfig(target_modules=["gate", "router"], leading=2, init_weights=False))
    loss = model(IDS, labels=IDS).loss
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    assert len(gradients) == 2
    assert all(gradient.any() for gradient in gradients)
    expected = model.eval()(IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_parameter_that_its_owner_reads_is_refused():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(6, 5))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Inner()

        def forward(self, x):
            return x @ self.mlp.w1.T

    with pytest.raises(InputError, match=r"mlp.w1 is not supported: Outer reads it"):
        get_peft_model(Outer(), SpectralConfig(target_modules=[], target_parameters=["mlp.w1"]))


@stacked
def test_an_adapter_fits_the_model_without_its_head(tmp_path):
    get_peft_model(
        base("mixtral"), SpectralConfig(target_modules="all-linear", leading=2, init_weights=False)
    ).save_pretrained(tmp_path)
    whole = PeftModel.from_pretrained(base("mixtral"), tmp_path)
    bare = PeftModel.from_pretrained(base("mixtral").model, tmp_path)
    assert torch.equal(bare(IDS).last_hidden_state, whole.base_model.model.model(IDS).last_hidden_state)


@stacked
def test_what_observes_layers_says_that_it_leaves_experts_out():
    batch = [{"input_ids": IDS, "labels": IDS}]
    with pytest.warns(
        UserWarning, match=r"mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.gate.weight of Mixtral"
    ):
        table = gradient_coverage(base("mixtral"), batch, k=1)
    assert {name.split(".")[-1] for name in table.matrix} == set(ATTENTION)


@stacked
def test_a_config_that_is_used_again_means_the_same():
    for targets in (["w1", "q_proj"], "all-linear"):
        config = SpectralConfig(target_modules=targets, leading=1)
        ranks = [set(get_peft_model(base("mixtral"), config).peft_config["default"].ranks) for _ in range(2)]
        assert ranks[0] == ranks[1]
        assert any("experts.1.gate_up_proj.gate" in name for name in ranks[0])


@stacked
def test_a_router_that_was_a_layer_loads_as_a_parameter(tmp_path):
    model = get_peft_model(
        base("mixtral"),
        SpectralConfig(target_modules=["q_proj", "gate"], leading=2, coefficients="core", init_weights=False),
    ).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: one.reshape(2, 2) for name, one in load_file(file).items()}  # as transformers 4 stores a layer's
    assert any(".gate." in name for name in tensors)
    save_file(tensors, file)
    assert torch.equal(PeftModel.from_pretrained(base("mixtral"), tmp_path).eval()(IDS).logits, model(IDS).logits)
