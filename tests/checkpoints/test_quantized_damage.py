"""Parts of quantized weights that contradict each other are refused or listed: no weight is computed from them."""

import json

import pytest
import torch

from spectralbasis.checkpoints import logical_matrices
from spectralbasis.checkpoints.checkpoint import TensorCheckpoint
from spectralbasis.checkpoints.decoded import decoded
from spectralbasis.errors import InputError
from tests.checkpoints.test_quantized import FP8, drawn, eight_bits, four_bits, hqq_state, packed

DESCRIPTION = "a.weight.quant_state.bitsandbytes__nf4"


def described(**facts):
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def compressed(**changes):
    parts = {
        "packed": packed(drawn(4, 12, 96), 4), "scale": torch.rand(12, 3), "shape": torch.tensor([12, 96]),
        "zero_point": packed(drawn(4, 3, 12), 4).T.contiguous(), "g_idx": torch.arange(96).int() // 32, **changes,
    }  # fmt: skip
    return {f"a.weight_{part}": tensor for part, tensor in parts.items() if tensor is not None}


def gptq(**changes):
    parts = {
        "qweight": packed(drawn(4, 64, 96), 4).T.contiguous(), "qzeros": packed(drawn(4, 3, 64), 4),
        "scales": torch.rand(3, 64), "g_idx": torch.arange(96).int() // 32, **changes,
    }  # fmt: skip
    return {f"a.{part}": tensor for part, tensor in parts.items() if tensor is not None}


GPTQ, COMPRESSED = {"quant_method": "gptq", "bits": 4}, {"quant_method": "compressed-tensors"}
WHOLE = {
    "bitsandbytes": (four_bits(torch.randn(32, 64), "a.weight")[0], {}),
    "bitsandbytes, nested": (four_bits(torch.randn(32, 64), "a.weight", 16, 4)[0], {}),
    "compressed-tensors": (compressed(), COMPRESSED),
    "gptq": (gptq(), GPTQ),
    "awq": ({"a.qweight": packed(drawn(4, 64, 16), 4), "a.qzeros": packed(drawn(4, 2, 16), 4),
             "a.scales": torch.rand(2, 16)}, {"quant_method": "awq", "bits": 4}),
    "fp8": (eight_bits(torch.randn(9, 10), "a.weight", (4, 4))[0],
            {"quant_method": "fp8", "weight_block_size": [4, 4]}),
    "mxfp4": ({"a.experts.down_proj_blocks": drawn(8, 2, 8, 2, 16).byte(),
               "a.experts.down_proj_scales": drawn(4, 2, 8, 2).byte()}, {"quant_method": "mxfp4"}),
    "nvfp4": ({"a.weight_packed": drawn(8, 6, 32).byte(), "a.weight_scale": torch.rand(6, 4).to(FP8),
               "a.weight_global_scale": torch.ones(1)}, COMPRESSED),
    "mlx": ({"a.weight": packed(drawn(4, 4, 64), 4).view(torch.uint32), "a.scales": torch.rand(4, 2),
             "a.biases": torch.rand(4, 2)}, {"bits": 4, "group_size": 32}),
    "hqq": (hqq_state(4, 1, (96, 128), 64)[0], {"quant_method": "hqq"}),
    "bitnet": ({"a.weight": drawn(8, 4, 6).byte(), "a.weight_scale": torch.ones(1)}, {"quant_method": "bitnet"}),
    "int8": ({"a.weight": drawn(7, 8, 6).to(torch.int8), "a.SCB": torch.rand(8)}, {}),
}  # fmt: skip
DAMAGE = {
    "turned": lambda tensor: tensor.T if tensor.ndim == 2 else tensor.flip(0),
    "cut": lambda tensor: tensor[1:] if tensor.ndim else tensor[None],
    "flat": lambda tensor: tensor.flatten()[None],
    "empty": lambda tensor: tensor[:0] if tensor.ndim else tensor[None][:0],
    "scalar": lambda tensor: tensor.flatten()[0],
    "negative": lambda tensor: -tensor.float() if tensor.is_floating_point() else tensor.to(torch.int8) * 0 - 1,
    "large": lambda tensor: torch.full_like(tensor, 2**31 - 1 if tensor.dtype.itemsize > 3 else 127),
    **{
        str(kind): lambda tensor, kind=kind: tensor.float().to(kind)
        for kind in (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float16, FP8)
    },
    "complex": lambda tensor: tensor.float() * 1j,
}


def read(state, settings):
    """Every matrix of a state by name, and what is listed."""
    key = "quantization_config" if "quant_method" in settings else "quantization"
    matrices, skipped = logical_matrices(decoded(TensorCheckpoint(state, "model", {key: settings} if settings else {})))
    return {name: matrix.read() for name, matrix in matrices.items()}, skipped


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_whole_is_read(name):
    matrices, skipped = read(*WHOLE[name])
    assert len(matrices) >= 1
    assert skipped == {}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.filterwarnings("ignore:Casting complex")
def test_damaged_parts_are_refused_listed_or_read_in_the_shape_that_is_told(name, damage):
    state, settings = WHOLE[name]
    for part, tensor in state.items():
        key = "quantization_config" if "quant_method" in settings else "quantization"
        changed = {**state, part: DAMAGE[damage](tensor)}
        try:
            checkpoint = decoded(TensorCheckpoint(changed, "model", {key: settings} if settings else {}))
            matrices, skipped = logical_matrices(checkpoint)
        except InputError:
            continue
        assert matrices or skipped or 0 in changed[part].shape
        for matrix in matrices.values():
            try:
                assert tuple(matrix.read().shape) == matrix.shape
            except InputError:
                continue


def facts(**changes):
    """What bitsandbytes says of a weight in one block of 64, and changes to it."""
    return {"shape": [32, 64], "blocksize": 64, "quant_type": "nf4", "dtype": "bfloat16", **changes}


@pytest.mark.parametrize(
    "changes",
    [{"blocksize": 0}, {"blocksize": -64}, {"blocksize": 64.5}, {"blocksize": "64"}, {"blocksize": None},
     {"blocksize": True}, {"shape": [64, -32]}, {"shape": []}, {"shape": [2048.0]}, {"shape": "32x64"},
     {"shape": [32, 65]}, {"shape": [2**40, 2**40]}, {"nested_blocksize": 4, "nested_offset": 0.0},
     {"nested_blocksize": -1}, {"nested_offset": "x"}, {"blocksize": 2**60}],
)  # fmt: skip
def test_description_of_four_bits_that_is_damaged(changes):
    state = {**four_bits(torch.randn(32, 64), "a.weight")[0], DESCRIPTION: described(**facts(**changes))}
    with pytest.raises(InputError, match=r"a\.weight"):
        read(state, {})


@pytest.mark.parametrize(
    "text", [b"", b"[", b"[1]", b"\xff", b'{"shape": [32, 64], "shape": [64, 32], "blocksize": 64}', b"[" * 10_000]
)
def test_description_of_four_bits_that_is_no_record(text):
    state, _ = four_bits(torch.randn(32, 64), "a.weight")
    with pytest.raises(InputError):
        read({**state, DESCRIPTION: torch.tensor(list(text), dtype=torch.uint8)}, {})


def test_one_large_block_takes_no_more_memory_than_its_weight():
    state, _ = four_bits(torch.randn(4, 4), "a.weight", block=16)
    large = described(shape=[4, 4], blocksize=2**50)
    (W,) = read({**state, DESCRIPTION: large}, {})[0].values()
    torch.testing.assert_close(W, read(state, {})[0]["a"])


@pytest.mark.parametrize("order", [torch.full((96,), 3), torch.full((96,), -2), torch.arange(96) // 32 - 1])
@pytest.mark.parametrize(("state", "settings"), [(gptq, GPTQ), (compressed, COMPRESSED)])
def test_group_that_does_not_exist(order, state, settings):
    with pytest.raises(InputError, match="groups are numbered"):
        read(state(g_idx=order.int()), settings)


@pytest.mark.parametrize(
    ("state", "settings"),
    [(gptq(g_idx=None), {**GPTQ, "group_size": 128}),
     (compressed(g_idx=None), {**COMPRESSED, "config_groups": {"0": {"weights": {"group_size": 128}}}}),
     (WHOLE["awq"][0], {"quant_method": "awq", "bits": 4, "group_size": 48})],
)  # fmt: skip
def test_groups_of_another_size_than_the_config_names_are_listed(state, settings):
    matrices, skipped = read(state, settings)
    assert matrices == {}
    assert "quantized" in skipped["a"]


def test_zeros_of_another_width_are_listed():
    """Zeros in words of 64 bits fit by their shape, and would be unpacked from the wrong places."""
    for state, settings in ((gptq(), GPTQ), (WHOLE["awq"][0], WHOLE["awq"][1])):
        assert read({**state, "a.qzeros": state["a.qzeros"].long()}, settings)[0] == {}


def test_two_encodings_of_one_weight_are_refused():
    inner = "a.parametrizations.weight.original"
    state = {f"{inner}0": torch.ones(4, 1), f"{inner}1": torch.eye(4)}
    state |= {"a.weight_orig": torch.eye(4), "a.weight_mask": torch.ones(4, 4)}
    with pytest.raises(InputError, match=r"a\.weight more than once.*original1.*weight_orig"):
        read(state, {})
