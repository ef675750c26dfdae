"""Quantized weights read as the matrices that they encode, or are skipped with a reason."""

import json
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from spectralbasis.errors import InputError
from tests.models import tiny

# The levels of NF4, arXiv 2305.14314, appendix E.
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
FP8 = torch.float8_e4m3fn


def nearest(values, levels):
    return (values[:, None] - levels).abs().argmin(1)


def four_bits(W, name, block=64, nested_block=None, storage=torch.uint8):
    """The tensors that bitsandbytes saves for one weight, and the weight that they stand for."""
    count = W.numel()
    padded = torch.nn.functional.pad(W.flatten(), (0, -count % block)).reshape(-1, block)
    scales = padded.abs().amax(1)
    facts = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(W.shape)}
    parts = {"absmax": scales, "quant_map": NF4}
    if nested_block:
        offset, grid = scales.mean().item(), torch.linspace(-1, 1, 256)
        outer = torch.stack([part.abs().amax() for part in (scales - offset).split(nested_block)])
        spread = outer.repeat_interleave(nested_block)[: len(scales)]
        indices = nearest((scales - offset) / spread, grid)
        parts |= {"absmax": indices.byte(), "nested_absmax": outer, "nested_quant_map": grid}
        facts |= {"nested_blocksize": nested_block, "nested_dtype": "float32", "nested_offset": offset}
        scales = grid[indices] * spread + offset
    levels = nearest((padded / padded.abs().amax(1, keepdim=True)).flatten()[:count], NF4)
    meant = (NF4[levels] * scales.repeat_interleave(block)[:count]).reshape(W.shape)
    even = torch.nn.functional.pad(levels, (0, count % 2)).byte().reshape(-1, 2)
    packed = (even[:, 0] << 4 | even[:, 1]).view(storage)[:, None]
    description = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    described = {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return {name: packed, f"{name}.quant_state.bitsandbytes__nf4": description, **described}, meant


def eight_bits(W, name, block, suffix="_scale_inv"):
    """Blockwise fp8 and its factors, and the weight that they stand for."""
    rows, columns = block
    meant, grid = torch.zeros_like(W), torch.zeros(-(-W.shape[0] // rows), -(-W.shape[1] // columns))
    stored = torch.zeros_like(W).to(FP8)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            where = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            grid[i, j] = W[where].abs().max() / 448
            stored[where] = (W[where] / grid[i, j]).to(FP8)
            meant[where] = stored[where].float() * grid[i, j]
    return {name: stored, name + suffix: grid}, meant


def write(folder, state, **config):
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return open_checkpoint(folder)


@pytest.mark.parametrize("shape", [(32, 64), (33, 35)])
@pytest.mark.parametrize("nested", [None, 4])
def test_four_bits(shape, nested, tmp_path):
    W = torch.randn(shape)
    state, meant = four_bits(W, "layers.0.mlp.down_proj.weight", nested_block=nested)
    checkpoint = write(tmp_path, state | {"layers.0.mlp.down_proj.bias": torch.ones(3)})
    assert set(checkpoint.names()) == {"layers.0.mlp.down_proj.weight", "layers.0.mlp.down_proj.bias"}
    assert checkpoint.dtype("layers.0.mlp.down_proj.weight") == torch.float32
    matrices, skipped = logical_matrices(pickle.loads(pickle.dumps(checkpoint)))
    assert skipped == {}
    torch.testing.assert_close(matrices["layers.0.mlp.down_proj"].read(), meant)
    assert (meant - W).norm() < 0.15 * W.norm()


def test_four_bits_stored_as_another_type(tmp_path):
    state, meant = four_bits(torch.randn(16, 64), "a.weight", storage=torch.bfloat16)
    torch.testing.assert_close(write(tmp_path, state).read("a.weight"), meant)


@pytest.mark.parametrize(
    "damage",
    [{"shape": [16, 65]}, {"shape": []}, {"blocksize": 0}, {"blocksize": 32}, {"blocksize": "x"}, {"shape": None},
     {"nested_blocksize": 4}],
)  # fmt: skip
def test_four_bits_with_a_damaged_description(damage, tmp_path):
    state, _ = four_bits(torch.randn(16, 64), "a.weight")
    name = "a.weight.quant_state.bitsandbytes__nf4"
    facts = json.loads(bytes(state[name].tolist())) | damage
    state[name] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    with pytest.raises(InputError, match=r"a\.weight .*damaged"):
        write(tmp_path, state)


def test_eight_bits_of_bitsandbytes(tmp_path):
    W = torch.randn(6, 8)
    largest = W.abs().amax(1)
    stored = (W * 127 / largest[:, None]).round().to(torch.int8)
    state = {"a.weight": stored, "a.SCB": largest, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    matrices, skipped = logical_matrices(write(tmp_path, state))
    assert (list(matrices), skipped) == (["a"], {})
    torch.testing.assert_close(matrices["a"].read(), stored.float() * largest[:, None] / 127)
    torch.testing.assert_close(matrices["a"].read(), W, atol=0.02, rtol=0)


@pytest.mark.parametrize("shape", [(8, 12), (9, 10)])
def test_blockwise_float8(shape, tmp_path):
    state, meant = eight_bits(torch.randn(shape), "layers.0.self_attn.o_proj.weight", (4, 6))
    quantization = {"quant_method": "fp8", "weight_block_size": [4, 6]}
    matrices, skipped = logical_matrices(write(tmp_path, state, quantization_config=quantization))
    assert (list(matrices), skipped) == (["layers.0.self_attn.o_proj"], {})
    torch.testing.assert_close(matrices["layers.0.self_attn.o_proj"].read(), meant)


@pytest.mark.parametrize("method", ["compressed-tensors", "fbgemm_fp8", "modelopt"])
@pytest.mark.parametrize("block", [(8, 12), (1, 12), (4, 4)])
def test_float8_with_a_factor_per_matrix_row_or_block(method, block, tmp_path):
    state, meant = eight_bits(torch.randn(8, 12), "a.weight", block, "_scale")
    if block == (8, 12):
        state["a.weight_scale"] = state["a.weight_scale"].reshape(1)
    checkpoint = write(tmp_path, state | {"a.input_scale": torch.ones(1)}, quantization_config={"quant_method": method})
    torch.testing.assert_close(checkpoint.read("a.weight"), meant)
    torch.testing.assert_close(checkpoint.read_rows("a.weight", 2, 3), meant[2:3])


def test_int8_of_compressed_tensors(tmp_path):
    stored, factors = torch.arange(-12, 12, dtype=torch.int8).reshape(4, 6), torch.tensor([[0.5], [1.0], [2.0], [4.0]])
    state = {"a.weight": stored, "a.weight_scale": factors}
    checkpoint = write(tmp_path, state, quantization_config={"quant_method": "compressed-tensors"})
    torch.testing.assert_close(checkpoint.read("a.weight"), stored * factors)


UNCERTAIN = [
    ({}, {}),
    ({"quant_method": "of my own"}, {}),
    ({"quant_method": ["fp8"]}, {}),
    ({"quant_method": "compressed-tensors"}, {}),
    ({"quant_method": "fp8", "weight_block_size": [3, 6]}, {}),
    ({"quant_method": "fp8", "weight_block_size": [4, 6]}, {"a.weight_zero_point": torch.ones(1)}),
]


@pytest.mark.parametrize(("quantization", "extra"), UNCERTAIN)
def test_factors_of_uncertain_meaning_are_skipped(quantization, extra, tmp_path):
    state, _ = eight_bits(torch.randn(8, 12), "a.weight", (4, 6))
    dense = {"b.weight": torch.ones(2, 2)}
    matrices, skipped = logical_matrices(write(tmp_path, state | dense | extra, quantization_config=quantization))
    assert list(matrices) == ["b"]
    assert list(skipped) == ["a"]
    assert skipped["a"].startswith("quantized (")
    assert skipped["a"].endswith(": compare the checkpoint that it was made from")


def packed(numbers, bits):
    """Rows of numbers as words of 32 bits, the first number in the lowest bits, without gaps."""
    rows = []
    for row in numbers.tolist():
        whole = sum(number << (bits * place) for place, number in enumerate(row))
        rows.append(list(whole.to_bytes(-(-len(row) * bits // 32) * 4, "little")))
    return torch.tensor(rows, dtype=torch.uint8).view(torch.int32)


def drawn(bits, *shape):
    return torch.randint(0, 2**bits, shape)


def computed(folder, state, quantization, name="a.weight"):
    """The weight as it is measured; nothing else of the checkpoint is listed."""
    key = "quantization" if "quant_method" not in quantization else "quantization_config"
    checkpoint = write(folder, {part: tensor.contiguous() for part, tensor in state.items()}, **{key: quantization})
    matrices, skipped = logical_matrices(checkpoint)
    assert skipped == {}
    assert len(matrices) >= 1
    W = pickle.loads(pickle.dumps(checkpoint)).read(name)
    assert checkpoint.shape(name) == W.shape
    assert checkpoint.dtype(name) == W.dtype == torch.float32
    return W


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("order", [True, False])
def test_packed_words_of_compressed_tensors(bits, zeros, order, tmp_path):
    Q, scale, zero = drawn(bits, 12, 96), torch.rand(12, 3), drawn(bits, 12, 3)
    group = torch.arange(96) // 32
    state = {"weight_packed": packed(Q, bits), "weight_scale": scale, "weight_shape": torch.tensor([12, 96])}
    middle = torch.full_like(zero, 2 ** (bits - 1))
    if zeros:
        state["weight_zero_point"], middle = packed(zero.T, bits).T, zero
    if order:
        group = group[torch.randperm(96)]
        state["weight_g_idx"] = group.int()
    W = computed(tmp_path, {f"a.{k}": v for k, v in state.items()}, {"quant_method": "compressed-tensors"})
    torch.testing.assert_close(W, (Q - middle[:, group]) * scale[:, group])


def test_int8_with_zeros_of_compressed_tensors(tmp_path):
    Q, zero, scale = (drawn(8, 6, 8) - 128).to(torch.int8), (drawn(4, 6, 1) - 8).to(torch.int8), torch.rand(6, 1)
    state = {"a.weight": Q, "a.weight_scale": scale, "a.weight_zero_point": zero}
    W = computed(tmp_path, state, {"quant_method": "compressed-tensors"})
    torch.testing.assert_close(W, (Q.float() - zero) * scale)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def two_a_byte(numbers):
    return (numbers[..., 0::2] | numbers[..., 1::2] << 4).to(torch.uint8)


@pytest.mark.parametrize("format_name", ["nvfp4-pack-quantized", "modelopt"])
def test_nvfp4(format_name, tmp_path):
    Q, scale, outer = drawn(4, 6, 64), torch.rand(6, 4).to(FP8), torch.tensor([37.0])
    spread = scale.float().repeat_interleave(16, 1)
    if format_name == "modelopt":
        state = {"weight": two_a_byte(Q), "weight_scale": scale, "weight_scale_2": outer}
        expected, method = E2M1[Q] * spread * 37, "modelopt"
    else:
        state = {"weight_packed": two_a_byte(Q), "weight_scale": scale, "weight_global_scale": outer}
        expected, method = E2M1[Q] * spread / 37, "compressed-tensors"
    W = computed(tmp_path, {f"a.{name}": tensor for name, tensor in state.items()}, {"quant_method": method})
    torch.testing.assert_close(W, expected)


def test_mxfp4_and_mxfp6_of_compressed_tensors(tmp_path):
    exponents = drawn(4, 5, 2) + 120
    spread = (2.0 ** (exponents - 127)).repeat_interleave(32, 1)
    Q = drawn(4, 5, 64)
    state = {"a.weight_packed": two_a_byte(Q), "a.weight_scale": exponents.to(torch.uint8)}
    W = computed(tmp_path, state, {"quant_method": "compressed-tensors"})
    torch.testing.assert_close(W, E2M1[Q] * spread)
    Q = drawn(6, 5, 64)
    exponent, mantissa = (Q >> 3) & 3, (Q & 7) / 8
    values = torch.where(exponent > 0, (1 + mantissa) * 2.0 ** (exponent - 1), mantissa) * torch.where(Q > 31, -1, 1)
    state = {"a.weight_packed": packed(Q, 6).view(torch.uint8), "a.weight_scale": exponents.to(torch.uint8)}
    torch.testing.assert_close(computed(tmp_path, state, {"quant_method": "compressed-tensors"}), values * spread)


def test_experts_of_gpt_oss(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = drawn(8, 3, 32, 2, 16).to(torch.uint8), (drawn(4, 3, 32, 2) + 120).to(torch.uint8)
    name = "layers.0.mlp.experts.gate_up_proj"
    state = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.ones(3, 32)}
    checkpoint = write(tmp_path, state, quantization_config={"quant_method": "mxfp4"})
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    torch.testing.assert_close(checkpoint.read(name), expected)
    torch.testing.assert_close(checkpoint.read_rows(name, 1, 3), expected[1:3])
    matrices, skipped = logical_matrices(checkpoint)
    assert skipped == {}
    assert {matrix.checkpoint.shape(name) for matrix in matrices.values()} == {(3, 64, 32)}


def test_fp8_as_transformers_reads_it(tmp_path):
    pytest.importorskip("transformers.core_model_loading", reason="transformers 4 needs a GPU's compiler for this")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    real = Fp8Dequantize(None)._dequantize_one
    fp8 = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    Q, scale, exponents = torch.randn(16, 24).to(FP8), torch.rand(2, 3), (drawn(3, 2, 3) + 124).to(torch.uint8)
    for scales, ending in ((scale, "weight_scale_inv"), (exponents.view(torch.float8_e8m0fnu), "scale")):
        W = computed(tmp_path, {"a.weight": Q, f"a.{ending}": scales}, fp8)
        torch.testing.assert_close(W, real(Q, scales, torch.float32))
    stack, scales = torch.randn(3, 16, 24).to(FP8), torch.rand(3, 2, 3)
    name = "layers.0.mlp.experts.down_proj"
    W = computed(tmp_path, {name: stack, f"{name}_scale_inv": scales}, fp8, name)
    torch.testing.assert_close(W, real(stack, scales, torch.float32))
    torch.testing.assert_close(open_checkpoint(tmp_path).read_rows(name, 1, 2), W[1:2])
    fp4, scales = (drawn(8, 16, 32) - 128).to(torch.int8), (drawn(3, 16, 2) + 124).to(torch.uint8)
    W = computed(tmp_path, {"a.weight": fp4, "a.scale": scales.view(torch.float8_e8m0fnu)}, fp8)
    torch.testing.assert_close(W, real(fp4, scales, torch.float32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("order", [True, False])
def test_gptq(bits, first, order, tmp_path):
    Q, zero, scale = drawn(bits, 96, 64), drawn(bits, 3, 64), torch.rand(3, 64)
    group = torch.arange(96) // 32
    state = {"a.qweight": packed(Q.T, bits).T, "a.qzeros": packed((zero - first) % 2**bits, bits), "a.scales": scale}
    if order:
        group = group[torch.randperm(96)]
        state["a.g_idx"] = group.int()
    method = {"quant_method": "gptq", "bits": bits, "checkpoint_format": "gptq" if first else "gptq_v2"}
    torch.testing.assert_close(computed(tmp_path, state, method), ((Q - zero[group]) * scale[group]).T)


def test_awq(tmp_path):
    Q, zero, scale = drawn(4, 64, 16), drawn(4, 2, 16), torch.rand(2, 16)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # AutoAWQ's order_map
    qweight, qzeros = (packed(part.unflatten(1, (-1, 8))[..., order].flatten(1), 4) for part in (Q, zero))
    state = {"a.qweight": qweight, "a.qzeros": qzeros, "a.scales": scale, "a.bias": torch.ones(16)}
    W = computed(tmp_path, state, {"quant_method": "awq", "bits": 4, "version": "gemm"})
    group = torch.arange(64) // 32
    torch.testing.assert_close(W, ((Q - zero[group]) * scale[group]).T)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_mlx(bits, stack, tmp_path):
    Q, scale, offset = drawn(bits, *stack, 4, 64), torch.rand(*stack, 4, 2), torch.randn(*stack, 4, 2)
    words = packed(Q.flatten(0, -2), bits).view(torch.uint32).unflatten(0, (*stack, 4))
    state = {"layers.0.a.weight": words, "layers.0.a.scales": scale, "layers.0.a.biases": offset}
    own = {"group_size": 64, "bits": 4, "layers.0.a": {"group_size": 32, "bits": bits}}
    spread = [part.repeat_interleave(32, -1) for part in (scale, offset)]
    W = computed(tmp_path, state, own, "layers.0.a.weight")
    torch.testing.assert_close(W, Q * spread[0] + spread[1])
    torch.testing.assert_close(open_checkpoint(tmp_path).read_rows("layers.0.a.weight", 1, 2), W[1:2])


# One row that mlx.core.quantize(…, group_size=32, bits) made, and the numbers that mlx.core.dequantize reads there.
MLX_ROWS = {
    3: ([3886982193, 2332940649, 839226157],
        [1, 6, 0, 2, 2, 5, 3, 5, 7, 4, 7, 4, 6, 2, 6, 6,
         5, 1, 4, 5, 0, 3, 3, 1, 3, 2, 6, 2, 0, 4, 4, 1]),
    6: ([1313877322, 3657416108, 4017371535, 2226000429, 899422599, 844775499],
        [10, 53, 2, 20, 14, 49, 26, 47, 63, 39, 61, 35, 57, 16, 55, 59,
         45, 8, 33, 43, 4, 30, 24, 6, 28, 22, 51, 18, 0, 41, 37, 12]),
}  # fmt: skip


@pytest.mark.parametrize("bits", MLX_ROWS)
def test_mlx_packs_across_words(bits, tmp_path):
    words, numbers = MLX_ROWS[bits]
    state = {
        "a.weight": torch.tensor([words]).to(torch.uint32),
        "a.scales": torch.ones(1, 1),
        "a.biases": torch.zeros(1, 1),
    }
    assert computed(tmp_path, state, {"group_size": 32, "bits": bits}).tolist() == [numbers]


def hqq_state(bits, axis, shape, size):
    """What HQQ saves, with numbers in runs of rows from the highest bits down, and the weight."""
    rows, columns = (96 * 128 // size, size) if axis == 1 else (size, 96 * 128 // size)
    Q = drawn(bits, rows, columns)
    held = 10 if bits == 3 else 8 // bits
    runs = torch.nn.functional.pad(Q, (0, 0, 0, -rows % held)).chunk(held)
    W_q = sum(run << (bits * (held - 1 - place)) for place, run in enumerate(runs))
    factors = (rows, 1) if axis == 1 else (1, columns)
    scale, zero = torch.rand(factors), torch.rand(factors)
    packing = "3bit_32" if bits == 3 else f"{bits}bit_u8"
    state = {
        "W_q": W_q.to(torch.int32 if bits == 3 else torch.uint8), "scale": scale, "zero": zero,
        "nbits": torch.tensor(bits, dtype=torch.int32), "group_size": torch.tensor(size, dtype=torch.int32),
        "axis": torch.tensor(axis, dtype=torch.int32), "shape": torch.tensor(shape),
        "packing": torch.tensor(list(packing.encode()), dtype=torch.uint8),
        "quant_scale": torch.tensor(0, dtype=torch.uint8), "view_as_float": torch.tensor(0, dtype=torch.uint8),
    }  # fmt: skip
    return {f"a.{name}": tensor for name, tensor in state.items()}, ((Q - zero) * scale).reshape(shape)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_hqq(bits, axis, tmp_path):
    state, expected = hqq_state(bits, axis, (96, 128), 64)
    torch.testing.assert_close(computed(tmp_path, state, {"quant_method": "hqq"}), expected)
    state["a.W_q"] = state["a.W_q"].view(torch.float16)  # `view_as_float`
    torch.testing.assert_close(computed(tmp_path, state, {"quant_method": "hqq"}), expected)


@pytest.mark.parametrize(
    "damage",
    [{"a.nbits": torch.tensor(5)}, {"a.axis": torch.tensor([0, 1])}, {"a.group_size": torch.tensor(0)},
     {"a.quant_zero": torch.tensor(1)}, {"a.shape": torch.tensor([96, 127])}, {"a.scale": torch.ones(3, 1)}],
)  # fmt: skip
def test_hqq_with_another_description_is_listed(damage):
    matrices, skipped = logical_matrices(open_checkpoint(hqq_state(4, 1, (96, 128), 64)[0] | damage))
    assert matrices == {}
    assert "HQQ" in skipped["a"]


@pytest.mark.parametrize("kind", [torch.int8, FP8, torch.float8_e5m2])
@pytest.mark.parametrize("factors", [(6, 1), (1, 8), ()])
def test_quanto(kind, factors, tmp_path):
    Q, scale = (torch.randn(6, 8) * 20).to(kind), torch.rand(factors)
    state = {"a.weight._data": Q, "a.weight._scale": scale, "a.input_scale": torch.ones(())}
    torch.testing.assert_close(computed(tmp_path, state, {"quant_method": "quanto"}), Q.float() * scale)


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_bitnet(linear_class, tmp_path):
    from transformers.integrations.bitnet import pack_weights

    W = torch.randint(-1, 2, (16, 6)).float()
    state = {"a.weight": pack_weights(W.clone()), "a.weight_scale": torch.tensor([0.4])}
    found = computed(tmp_path, state, {"quant_method": "bitnet", "linear_class": linear_class})
    torch.testing.assert_close(found, W / 0.4 if linear_class == "bitlinear" else W * 0.4)


def torchao_models():
    torchao = pytest.importorskip("torchao.quantization")
    groups = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32))
    for config in (torchao.Float8WeightOnlyConfig(), torchao.Int8WeightOnlyConfig(version=2), groups):
        model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(64, 32))
        torchao.quantize_(model, config)
        yield model


def test_torchao(tmp_path):
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    for model in torchao_models():
        flat, _ = flatten_tensor_state_dict(model.state_dict())
        torch.save(model.state_dict(), tmp_path / "model.pt")
        written = write(tmp_path, flat, quantization_config={"quant_method": "torchao"})
        for checkpoint in (written, open_checkpoint(model), open_checkpoint(tmp_path / "model.pt")):
            matrices, skipped = logical_matrices(checkpoint)
            assert (set(matrices), skipped) == ({"0", "1"}, {})
            for number in (0, 1):
                expected = model[number].weight.dequantize().detach()
                torch.testing.assert_close(matrices[str(number)].read().float(), expected, rtol=1e-5, atol=1e-6)


def test_quantized_tensors_of_torch():
    stored = torch.quantize_per_channel(torch.randn(4, 6), torch.rand(4), torch.arange(4), 0, torch.qint8)
    checkpoint = open_checkpoint({"a.weight": stored})
    assert torch.equal(logical_matrices(checkpoint)[0]["a"].read(), stored.dequantize())


def test_a_live_model_in_4_bits():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    matrices, skipped = logical_matrices(open_checkpoint(torch.nn.ModuleDict({"a": layer})))
    assert (list(matrices), skipped) == (["a"], {})
    torch.testing.assert_close(matrices["a"].read(), expected.float(), rtol=1e-5, atol=1e-6)


def test_tied_quantized_weights_count_once():
    Q, scale = (torch.randn(6, 8) * 20).to(torch.int8), torch.rand(6)
    state = {f"{name}.{part}": tensor for name in "ab" for part, tensor in (("weight", Q), ("SCB", scale))}
    matrices, skipped = logical_matrices(open_checkpoint(state))
    assert (list(matrices), skipped) == (["a"], {"b": "tied to a.weight"})
    matrices, _ = logical_matrices(open_checkpoint(state | {"b.SCB": torch.rand(6)}))
    assert list(matrices) == ["a", "b"]


def test_adapter_over_a_quantized_base(tmp_path):
    base = tiny("bert")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    update = open_checkpoint(tmp_path / "adapter", tmp_path / "base")
    path, name = tmp_path / "base" / "model.safetensors", "encoder.layer.0.attention.self.query.weight"
    plain = load_file(path)
    expected = update.read(name) - plain[name]
    state, meant = four_bits(plain[name], name)
    save_file({key: tensor for key, tensor in plain.items() if key != name} | state, path)
    tuned = open_checkpoint(tmp_path / "adapter", tmp_path / "base").read(name)
    torch.testing.assert_close(tuned - meant, expected, atol=1e-5, rtol=1e-4)


def test_adapter_over_a_base_that_cannot_be_read(tmp_path):
    base = tiny("bert")
    base.save_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["query"])).save_pretrained(tmp_path / "adapter")
    path, layer = tmp_path / "base" / "model.safetensors", "encoder.layer.0.attention.self.query"
    stored = load_file(path)
    stored[f"{layer}.trellis"] = torch.ones(2, 2, 48, dtype=torch.int16)
    del stored[f"{layer}.weight"]
    save_file(stored, path)
    with pytest.raises(InputError, match=r"query, which the adapter .* updates, cannot be read: quantized \(QTIP"):
        open_checkpoint(tmp_path / "adapter", tmp_path / "base")


@pytest.mark.parametrize("beside", ["input_scale", "w_s"])
def test_float8_beside_anything_but_a_bias_is_listed(beside):
    # Neither says what scales the weight, and the bare numbers would be measured as if nothing did.
    W = torch.randn(8, 16).to(FP8)
    state = {"up.weight": W, f"up.{beside}": torch.ones(8, 1), "down.weight": W.T.contiguous(), "down.bias": W[0]}
    matrices, skipped = logical_matrices(open_checkpoint(state))
    assert list(matrices) == ["down"]
    assert list(skipped) == ["up"]
    assert f"with `{beside}`, of an unknown format" in skipped["up"]
