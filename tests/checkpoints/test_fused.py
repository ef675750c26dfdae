"""Parts of fused weights against what the models' own code makes of them.

The model runs on one token (rotary embeddings are the identity there) while the queries, keys and values that reach its
attention are recorded; they must be the fused layer's input times our matrices.
"""

import pytest
import torch
from torch import nn
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.codegen.modeling_codegen import CodeGenAttention

from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from tests.models import tiny

CASES = [
    ("gpt2", "attn.c_attn", {}),
    ("gpt_bigcode", "attn.c_attn", {"multi_query": True}),
    ("gpt_bigcode", "attn.c_attn", {"multi_query": False}),
    ("gpt_neox", "attention.query_key_value", {}),
    ("bloom", "self_attention.query_key_value", {}),
    ("falcon", "self_attention.query_key_value", {"multi_query": True}),
    ("falcon", "self_attention.query_key_value", {"multi_query": False}),
    ("falcon", "self_attention.query_key_value", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("codegen", "attn.qkv_proj", {}),
    ("modernbert", "attn.Wqkv", {}),
    ("phi3", "self_attn.qkv_proj", {}),
    ("phi3", "self_attn.qkv_proj", {"num_key_value_heads": 4}),
]


@pytest.fixture
def recorded(monkeypatch):
    """Queries, keys and values, each (heads, size), in the order in which the layers compute them."""
    calls: list[tuple[torch.Tensor, ...]] = []

    def record(*heads):
        calls.append(tuple(part[0, :, 0] for part in heads))

    def attention(query, key, value, *args, **options):
        record(query, key, value)
        groups = query.shape[1] // value.shape[1]
        return value.repeat_interleave(groups, dim=1)

    def reshape(self, fused):
        parts = original_reshape(self, fused)
        record(*parts)
        return parts

    def attend(self, query, key, value, *args, **options):
        record(query, key, value)
        return original_attend(self, query, key, value, *args, **options)

    original_reshape = BloomAttention._reshape
    original_attend = getattr(CodeGenAttention, "_attn", None)  # in release 5, it too calls the attention below
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(BloomAttention, "_reshape", reshape)
    if original_attend is not None:
        monkeypatch.setattr(CodeGenAttention, "_attn", attend)
    return calls


def without_biases(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


def recorded_inputs(model: nn.Module, layer: str) -> dict[str, torch.Tensor]:
    """Filled by the next forward pass: the input of each module whose name ends with `layer`."""
    inputs: dict[str, torch.Tensor] = {}

    def hook_of(name):
        def hook(module, args):
            inputs[name] = args[0].flatten()

        return hook

    for name, module in model.named_modules():
        if name.endswith(layer):
            module.register_forward_pre_hook(hook_of(name))
    return inputs


@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize(("model_type", "layer", "options"), CASES)
@torch.no_grad()
def test_query_key_value(model_type, layer, options, as_module, recorded, tmp_path):
    model = without_biases(tiny(model_type, **options))
    inputs = recorded_inputs(model, layer)
    model(input_ids=torch.tensor([[3]]))
    model.save_pretrained(tmp_path)

    matrices, _ = logical_matrices(open_checkpoint(model if as_module else tmp_path))

    assert len(inputs) == len(recorded) == 2
    for (name, x), heads in zip(inputs.items(), recorded, strict=True):
        for part, expected in zip(("query", "key", "value"), heads, strict=True):
            found = matrices[f"{name}.{part}"].read() @ x
            distinct = found.reshape(-1, expected.shape[1])
            repeated = distinct.repeat_interleave(len(expected) // len(distinct), dim=0)
            torch.testing.assert_close(repeated, expected, rtol=1e-5, atol=1e-6, msg=f"{name}.{part}")


@torch.no_grad()
def test_gate_and_up_of_phi3():
    model = tiny("phi3")
    matrices, _ = logical_matrices(open_checkpoint(model))
    x = torch.randn(5, 32)
    parts = ("gate_up_proj.gate", "gate_up_proj.up", "down_proj")
    gate, up, down = (matrices[f"layers.1.mlp.{part}"].read() for part in parts)
    expected = (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(model.layers[1].mlp(x), expected)


@torch.no_grad()
def test_input_and_gate_of_modernbert():
    model = tiny("modernbert")
    matrices, _ = logical_matrices(open_checkpoint(model))
    x = torch.randn(5, 32)
    value, gate, out = (matrices[f"layers.1.mlp.{name}"].read() for name in ("Wi.input", "Wi.gate", "Wo"))
    expected = (nn.functional.gelu(x @ value.T) * (x @ gate.T)) @ out.T
    torch.testing.assert_close(model.layers[1].mlp(x), expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_multihead_attention_of_torch():
    module = nn.ModuleDict({"attn": nn.MultiheadAttention(12, 3)})
    matrices, _ = logical_matrices(open_checkpoint(module))
    assert list(matrices) == ["attn.in_proj.query", "attn.in_proj.key", "attn.in_proj.value", "attn.out_proj"]
    query, key, value, out = (matrix.read() for matrix in matrices.values())
    x = torch.randn(4, 12)
    q, k, v = ((x @ part.T).unflatten(1, (3, 4)).transpose(0, 1) for part in (query, key, value))
    expected = (torch.softmax(q @ k.mT / 2, -1) @ v).transpose(0, 1).flatten(1) @ out.T
    torch.testing.assert_close(module["attn"](x, x, x)[0], expected, rtol=1e-5, atol=1e-6)


def test_thirds_of_vision_transformers():
    state = {"blocks.0.attn.qkv.weight": torch.randn(24, 8), "layers.0.fn.to_qkv.weight": torch.randn(48, 8)}
    matrices, _ = logical_matrices(open_checkpoint(state))
    timm, lucidrains = (torch.cat([m.read() for m in matrices.values() if m.name.startswith(x)]) for x in ("b", "l"))
    assert torch.equal(timm, state["blocks.0.attn.qkv.weight"])
    assert torch.equal(lucidrains, state["layers.0.fn.to_qkv.weight"])
    assert matrices["layers.0.fn.to_qkv.key"].shape == (16, 8)


@pytest.mark.parametrize("name", ["query_key_value", "qkv_proj"])
def test_without_a_config_an_ambiguous_layout_stays_whole(name):
    state = {f"layers.0.attention.{name}.weight": torch.randn(24, 8)}
    matrices, _ = logical_matrices(open_checkpoint(state))
    assert list(matrices) == [f"layers.0.attention.{name}"]


def test_qkv_with_shared_keys_stays_whole():
    state = {"transformer.h.0.attn.qkv.weight": torch.randn(48, 32)}  # 4 heads of 8, 1 key and 1 value head
    matrices, _ = logical_matrices(open_checkpoint(state))
    assert list(matrices) == ["h.0.attn.qkv"]


def test_chatglm_without_shared_keys_is_fused_head_by_head():
    # As its code has it: view(heads, 3 * size), then thirds of the last dimension.
    W = torch.randn(48, 16)
    config = {"model_type": "chatglm", "num_attention_heads": 4, "hidden_size": 16}
    matrices, _ = logical_matrices(open_checkpoint({"layers.0.attention.query_key_value.weight": W}), config=config)
    heads = W.view(4, 12, 16)
    for number, part in enumerate(("query", "key", "value")):
        expected = heads[:, 4 * number : 4 * number + 4].reshape(16, 16)
        assert torch.equal(matrices[f"layers.0.attention.query_key_value.{part}"].read(), expected)


def test_mamba_in_proj_is_one_matrix():
    matrices, _ = logical_matrices(open_checkpoint({"layers.0.mixer.in_proj.weight": torch.randn(24, 8)}))
    assert list(matrices) == ["layers.0.mixer.in_proj"]


def test_parts_keep_the_dtype_and_cover_the_fused_weight():
    model = tiny("gpt_neox").bfloat16()
    matrices, _ = logical_matrices(open_checkpoint(model))
    parts = [matrices[f"layers.0.attention.query_key_value.{part}"].read() for part in ("query", "key", "value")]
    assert {part.dtype for part in parts} == {torch.bfloat16}
    whole = model.layers[0].attention.query_key_value.weight
    assert torch.equal(torch.cat(parts).float().sort(0).values, whole.float().sort(0).values)
