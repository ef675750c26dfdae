"""Rows of a matrix are those of the whole matrix; formats that can read them alone read no others."""

import json

import pytest
import torch
from safetensors.torch import save_file

from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from spectralbasis.checkpoints.weight_files import SafetensorsFile
from spectralbasis.errors import InputError

CONFIG = {"model_type": "bloom", "num_attention_heads": 4, "hidden_size": 8}


def state():
    """A linear layer, one fused by heads, a convolution, two stacks of experts, and a matrix stored transposed."""
    return {
        "h.0.dense.weight": torch.randn(12, 8),
        "h.0.query_key_value.weight": torch.randn(24, 8).bfloat16(),
        "h.0.conv.weight": torch.randn(4, 3, 2, 2),
        "h.0.experts.gate_up_proj": torch.randn(5, 16, 6).half(),
        "h.0.experts.down_proj": torch.randn(5, 6, 8),
        "h.1.experts.gate_up_proj": torch.randn(2, 6, 16),
        "h.1.experts.down_proj": torch.randn(2, 8, 6),
    }


def write(folder, kind):
    tensors = state()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if kind == "torch":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif kind == "shards":
        located = {name: f"{i}.safetensors" for i, name in enumerate(tensors)}
        for name, file in located.items():
            save_file({name: tensors[name]}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": located}))
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "shards", "torch"])
def test_rows_of_every_kind_of_matrix_are_those_of_the_whole(tmp_path, kind):
    matrices, _ = logical_matrices(open_checkpoint(write(tmp_path, kind)))
    assert len(matrices) == 1 + 3 + 1 + 15 + 6
    for name, matrix in matrices.items():
        whole, read = matrix.read(), matrix.open_rows()
        for rows in (torch.randperm(matrix.shape[0]), torch.arange(1, 3), torch.tensor([2]), torch.arange(0)):
            assert torch.equal(read(rows), whole[rows]), name
        transposed = name.startswith("h.1.experts")
        assert matrix.held_bytes == (whole.numel() * whole.element_size() if transposed else 0)


def test_rows_of_files_are_read_alone(tmp_path, monkeypatch):
    matrices, _ = logical_matrices(open_checkpoint(write(tmp_path, "safetensors")))
    expected = matrices["h.0.experts.3.down_proj"].read()
    monkeypatch.setattr(SafetensorsFile, "read", lambda *args: pytest.fail("the whole tensor was read"))
    rows = torch.tensor([4, 0, 1])
    assert torch.equal(matrices["h.0.experts.3.down_proj"].open_rows()(rows), expected[rows])


def test_what_is_quantized_or_adapted_is_read_whole(tmp_path):
    weight = torch.randint(-127, 128, (6, 4), dtype=torch.int8)
    save_file({"a.weight": weight, "a.SCB": torch.rand(6)}, tmp_path / "model.safetensors")
    matrix = logical_matrices(open_checkpoint(tmp_path))[0]["a"]
    assert matrix.held_bytes == 4 * (6 * 4 * 4)
    assert torch.equal(matrix.open_rows()(torch.tensor([5, 1])), matrix.read()[[5, 1]])


def test_a_file_that_shrank_is_noticed(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.eye(3)}, path)
    read = logical_matrices(open_checkpoint(path))[0]["a"].open_rows()
    path.write_bytes(path.read_bytes()[:-1])
    assert torch.equal(read(torch.tensor([0])), torch.eye(3)[:1])
    with pytest.raises(InputError, match="has become shorter"):
        read(torch.tensor([2]))
