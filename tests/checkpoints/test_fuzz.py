"""Damaged files never raise anything but InputError, on opening, listing or reading."""

import json
import struct
import tempfile
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from spectralbasis.checkpoints.checkpoint import TensorCheckpoint
from spectralbasis.errors import InputError

FUSED = ("qkv", "qkv_proj", "Wqkv", "wqkv", "query_key_value", "c_attn", "gate_up_proj", "to_kv")

WHOLE = save({"layer.0.weight": torch.eye(4), "layer.1.weight": torch.ones(2, 4, dtype=torch.bfloat16)})
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
tensor_headers = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "I64", "BOOL", "Q9", ""]),
        "shape": st.lists(st.integers(-1, 2**63), max_size=3),
        "data_offsets": st.lists(st.integers(0, 200) | st.integers(2**60, 2**64), min_size=2, max_size=2),
    }
)


def read_all(content: bytes, name: str) -> bool:
    """Whether the file is read; False where it is refused with a sentence, and any other error is the test's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            matrices, _ = logical_matrices(open_checkpoint(path))
            for matrix in matrices.values():
                assert tuple(matrix.read().shape) == matrix.shape
        except InputError:
            return False
        return True


@given(st.integers(0, len(WHOLE)))
def test_truncated(length):
    assert read_all(WHOLE[:length], "model.safetensors") == (length == len(WHOLE))


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_flipped_bytes(flips):
    content = bytearray(WHOLE)
    for position, value in flips:
        content[position] = value
    read_all(bytes(content), "model.safetensors")


@given(st.dictionaries(st.text(max_size=8), tensor_headers | json_values, max_size=3), st.binary(max_size=64))
def test_invented_headers(header, data):
    encoded = json.dumps(header).encode()
    read_all(struct.pack("<Q", len(encoded)) + encoded + data, "model.safetensors")


@given(st.binary(max_size=200), st.sampled_from(["model.safetensors", "model.pt", "model.bin"]))
def test_noise(content, name):
    read_all(content, name)


@settings(max_examples=50)
@given(json_values)
def test_invented_index(weight_map):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        try:
            open_checkpoint(folder)
        except InputError:
            return
    raise AssertionError("an index without shards was opened")


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.sampled_from(["model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "text_config"]),
        st.sampled_from(["falcon", "gpt2", "codegen", 0, -1, 1, 3, 2**40, True, 1.5, [], {"num_attention_heads": 2}]),
    ),
    st.sampled_from([1, 3, 6, 12, 18, 24]),
)
def test_any_config(config, rows):
    checkpoint = TensorCheckpoint({f"0.{name}.weight": torch.ones(rows, 4) for name in FUSED}, "invented", config)
    matrices, _ = logical_matrices(checkpoint)
    assert sum(prod(matrix.shape) for matrix in matrices.values()) == len(FUSED) * rows * 4
    assert all(tuple(matrix.read().shape) == matrix.shape for matrix in matrices.values())


FACTORS = save(
    {"base_model.model.0.lora_A.weight": torch.ones(2, 4), "base_model.model.0.lora_B.weight": torch.ones(4, 2)}
)
SETTINGS = ("base_model_name_or_path", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights",
            "fan_in_fan_out", "layer_replication")  # fmt: skip
values = json_values | st.sampled_from(["pissa", "olora", {"0": 3}, {"0": "x"}, {"(": 1}, 1e308, 0])


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(SETTINGS), values), st.booleans())
def test_any_adapter_config(config, give_base):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
        Path(folder, "adapter_model.safetensors").write_bytes(FACTORS)
        try:
            checkpoint = open_checkpoint(folder, {"0.weight": torch.randn(4, 4)} if give_base else None)
            assert checkpoint.read("0.weight").shape == (4, 4)
        except InputError:
            pass


@settings(max_examples=50)
@given(json_values)
def test_any_adapter_config_file(content):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "adapter_config.json").write_text(json.dumps(content))
        Path(folder, "adapter_model.safetensors").write_bytes(FACTORS)
        with pytest.raises(InputError):
            open_checkpoint(folder)


sizes = st.integers(-2, 9) | st.integers(-(2**31), 2**31 - 1)


@given(st.lists(sizes, min_size=7, max_size=7), st.binary(max_size=400), st.integers(0, 8))
def test_any_llama2c_header(header, data, cut):
    read_all((struct.pack("<7i", *header) + data)[: 428 - cut], "model.bin")


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.sampled_from(["quant_type", "shape", "blocksize", "nested_blocksize", "nested_offset"]),
        json_values | st.sampled_from([[4, 4], [2, 8], 16, 8, 4]),
    )
)
def test_any_description_of_four_bits(facts):
    described = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    state = {"0.weight": torch.ones(8, 1, dtype=torch.uint8), "0.weight.quant_map": torch.ones(16)}
    state |= {"0.weight.absmax": torch.ones(1), "0.weight.quant_state.bitsandbytes__nf4": described}
    read_all(save(state), "model.safetensors")
