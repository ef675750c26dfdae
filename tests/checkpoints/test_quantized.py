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
@pytest.mark.parametrize("block", [(8, 12), (1, 12), (4, 6)])
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
    assert "quantized (float8_e4m3fn): compare the checkpoint that it was made from" in skipped["a"]


def test_parts_of_other_encodings_are_no_matrices():
    state = {"a.qweight": torch.ones(4, 8, dtype=torch.int32), "a.scales": torch.ones(4, 8).half(),
             "b.weight_packed": torch.ones(4, 8, dtype=torch.uint8), "b.weight_scale": torch.ones(4, 2).to(FP8),
             "c.weight": torch.ones(2, 2)}  # fmt: skip
    matrices, skipped = logical_matrices(open_checkpoint(state))
    assert list(matrices) == ["c"]
    assert set(skipped) == {"a.qweight", "b.weight_packed"}


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
