"""Quantized bases: training on them, merging into them, and which weights their basis is of."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from spectralbasis.basis import SpectralBasis
from spectralbasis.checkpoints import open_checkpoint
from spectralbasis.errors import BaseMismatchError, InputError
from spectralbasis.triplets import matrix_hash
from spectralbasis.tuner import SpectralConfig, SpectralLayer, layer
from spectralbasis.tuner.layer import dequantized
from tests.models import tiny

X = torch.linspace(-3, 3, 5 * 64).reshape(5, 64).sin()


class EightBits(nn.Module):
    """A linear layer that keeps a scaled int8 weight."""

    def __init__(self, dense):
        super().__init__()
        self.quantize(dense.weight.detach())

    def quantize(self, weight):
        self.scale = weight.abs().max() / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight * self.scale).T


class EightBitsBackend(QuantizationBackend):
    supports_merge = True
    backend_name = "eight bits"

    def get_base_weight(self, base_layer):
        return base_layer.weight * base_layer.scale

    def set_base_weight(self, peft_layer, weight_data):
        peft_layer.get_base_layer().quantize(weight_data)


class SealedBits(EightBits):
    """As GPTQ's layers: it runs, and keeps no way back to a dense weight."""


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)

    def forward(self, x):
        return self.lin1(torch.tanh(self.lin0(x)))


def dense():
    torch.manual_seed(0)
    return Pair().requires_grad_(False).eval()


def replaced(make):
    model = dense()
    model.lin0, model.lin1 = make(model.lin0), make(model.lin1)
    return model.eval()


def bitsandbytes(kind, **options):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def make(layer):
        quantized = getattr(bnb.nn, kind)(layer.in_features, layer.out_features, bias=False, **options)
        quantized.load_state_dict(layer.state_dict())
        return quantized.to("cpu")

    return replaced(make)


def torchao():
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = dense()
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    config = SimpleNamespace(get_apply_tensor_subclass=ao.Int8WeightOnlyConfig)
    model.hf_quantizer = SimpleNamespace(quantization_config=config)
    return model


QUANTIZED = {
    "eight bits": lambda: replaced(EightBits),
    "bitsandbytes, 4 bits": lambda: bitsandbytes("Linear4bit", quant_type="nf4"),
    "bitsandbytes, 8 bits": lambda: bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "torchao": torchao,
}


@pytest.fixture(autouse=True)
def known_to_peft(monkeypatch):
    """Two layers that no package brings, beside those that PEFT knows."""
    resolve = layer.resolve_quantization_backend

    def extended(layer, **options):
        if isinstance(layer, SealedBits):
            return ForwardOnlyQuantizationBackend("gptq")
        return EightBitsBackend() if isinstance(layer, EightBits) else resolve(layer, **options)

    monkeypatch.setattr(layer, "resolve_quantization_backend", extended)


@pytest.fixture(params=QUANTIZED)
def quantize(request):
    return QUANTIZED[request.param]


@pytest.fixture
def basis_file(tmp_path):
    """The basis of the checkpoint that was quantized."""
    return str(SpectralBasis.compute(dense(), leading=8).save(tmp_path / "basis.safetensors"))


def settings(**changes):
    return SpectralConfig(
        **{
            "target_modules": ["lin0", "lin1"],
            "leading": 8,
            "coefficients": "core",
            "scaling": "absolute",
            "init_weights": False,
            **changes,
        }
    )


def adapted(base, **changes):
    torch.manual_seed(1)
    return get_peft_model(base, settings(**changes)).eval()


@torch.no_grad()
def test_the_start_is_the_quantized_base(quantize):
    assert torch.equal(adapted(quantize(), init_weights=True)(X), quantize()(X))


@pytest.mark.parametrize("coefficients", ["core", "rotation"])
def test_gradients_reach_the_coefficients_and_the_input(quantize, coefficients):
    model = adapted(quantize(), coefficients=coefficients)
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2
    assert all(p.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in trained.values())
    assert x.grad.abs().sum() > 0


@torch.no_grad()
def test_a_merged_weight_is_quantized_again_and_comes_back_bit_by_bit(quantize):
    model = adapted(quantize())
    layer = model.base_model.model.lin0
    before, original = model(X), layer.original_weight.clone()
    wanted = original + layer.get_delta_weight("default")
    model.merge_adapter()
    merged = dequantized(layer.base_layer, layer.quantization_backend)
    assert torch.linalg.norm(merged - wanted) < 0.15 * torch.linalg.norm(wanted)
    assert torch.linalg.norm(model(X) - before) < 0.3 * torch.linalg.norm(before - quantize()(X))
    assert torch.equal(layer.original_weight, original)
    model.unmerge_adapter()
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("coefficients", ["core", "rotation"])
@torch.no_grad()
def test_merged_and_unloaded(quantize, coefficients):
    model = adapted(quantize(), coefficients=coefficients)
    kind = type(model.base_model.model.lin0.base_layer)
    before = model(X)
    unloaded = model.merge_and_unload()
    assert type(unloaded.lin0) is kind
    assert torch.linalg.norm(unloaded(X) - before) < 0.3 * torch.linalg.norm(before - quantize()(X))


@torch.no_grad()
def test_an_adapter_finds_the_basis_of_the_dequantized_weights_again(quantize, tmp_path):
    model = adapted(quantize())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantize(), tmp_path)
    assert torch.equal(loaded(X), model(X))
    loaded.merge_adapter()
    loaded.add_adapter("other", settings(leading=4))
    assert loaded.base_model.model.lin0.factors("other") is loaded.base_model.model.lin0.factors("default")
    with pytest.raises(BaseMismatchError, match="lin0 has hash"):
        PeftModel.from_pretrained(dense(), tmp_path)


@torch.no_grad()
def test_inference_before_loading_leads_to_no_other_basis(quantize, tmp_path):
    """bitsandbytes packs 4 bits for some CPUs at the first use, which rounds their scales: another base, then."""
    model = adapted(quantize())
    model.save_pretrained(tmp_path)
    used = quantize()
    used(X)
    try:
        loaded = PeftModel.from_pretrained(used, tmp_path)
    except BaseMismatchError:
        assert quantize is QUANTIZED["bitsandbytes, 4 bits"]
    else:
        assert torch.equal(loaded(X), model(X))


@pytest.mark.parametrize("make", [*QUANTIZED.values(), lambda: replaced(SealedBits)], ids=[*QUANTIZED, "sealed"])
@pytest.mark.parametrize("coefficients", ["core", "rotation"])
@torch.no_grad()
def test_with_the_original_s_basis_file_an_adapter_moves_between_quantized_and_dense(
    make, coefficients, basis_file, tmp_path
):
    model = adapted(make(), basis=basis_file, coefficients=coefficients)
    config = model.peft_config["default"]
    assert config.base_hashes == {name: matrix_hash(getattr(dense(), name).weight) for name in ("lin0", "lin1")}
    update = model.base_model.model.lin0.get_delta_weight("default")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(again(X), model(X))
    on_dense = PeftModel.from_pretrained(dense(), tmp_path)
    torch.testing.assert_close(on_dense.base_model.model.lin0.get_delta_weight("default"), update)
    read = open_checkpoint(tmp_path, base=dense()).read("lin0.weight")
    torch.testing.assert_close(read, dense().lin0.weight + update)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"basis": "pretrained"}))
    torch.testing.assert_close(PeftModel.from_pretrained(dense(), tmp_path)(X), on_dense(X))


def test_a_layer_without_a_dense_weight_needs_a_basis_file():
    with pytest.raises(InputError, match=r"lin0: a SealedBits quantized by gptq .* spectralbasis basis MODEL -o FILE"):
        adapted(replaced(SealedBits))


def test_a_layer_without_a_dense_weight_cannot_be_merged(basis_file):
    model = adapted(replaced(SealedBits), basis=basis_file)
    before = model(X)
    with pytest.raises(InputError, match="nothing can be merged"):
        model.merge_adapter()
    assert torch.equal(model(X), before)


def test_a_basis_file_of_another_model_is_refused(tmp_path):
    torch.manual_seed(7)
    other = SpectralBasis.compute(Pair(), leading=8).save(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="file is of Pair, whose weights are not those that lin0 was quantized"):
        adapted(replaced(EightBits), basis=str(other))


def test_a_torchao_model_that_does_not_say_how_it_was_quantized_cannot_be_merged():
    base = torchao()
    del base.hf_quantizer
    model = adapted(base)
    before = model(X)
    with pytest.raises(InputError, match="has to be quantized again"):
        model.merge_adapter()
    assert torch.equal(model(X), before)


def test_a_budget_counts_packed_weights_in_full():
    assert adapted(bitsandbytes("Linear4bit")).base_model.allocation().total == 2 * 64 * 128


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_a_model_that_transformers_loads_in_few_bits(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = tiny("llama", "causal", hidden_size=64, intermediate_size=64, initializer_range=0.2)
    base.save_pretrained(tmp_path / "base")
    basis = SpectralBasis.compute(tmp_path / "base", leading=4).save(tmp_path / "basis.safetensors")
    options = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=options)
    config = settings(target_modules="all-linear", basis=str(basis), leading=4, task_type="CAUSAL_LM")
    model = get_peft_model(prepare_model_for_kbit_training(quantized), config).eval()
    assert len(model.base_model.allocation().ranks) == 2 * 7
    ids = torch.tensor([[5, 9, 3]])
    before = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    on_dense = dict(PeftModel.from_pretrained(base, tmp_path / "adapter").named_modules())
    for name, module in model.named_modules():
        if isinstance(module, SpectralLayer):
            torch.testing.assert_close(on_dense[name].get_delta_weight("default"), module.get_delta_weight("default"))
    model.merge_adapter()
    assert torch.linalg.norm(model(ids).logits - before) < 0.5 * torch.linalg.norm(before)
