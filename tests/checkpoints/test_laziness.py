"""Opening and listing read no data; reading takes one tensor at a time."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from spectralbasis.checkpoints import Checkpoint, logical_matrices, match_matrices, open_checkpoint, weight_files
from spectralbasis.checkpoints.weight_files import SafetensorsFile
from spectralbasis.errors import InputError
from tests.models import tiny


class NamesOnly(Checkpoint):
    """A checkpoint that fails as soon as data is asked for, and says how much was."""

    source, config = "names only", {"model_type": "llama4_text", "hidden_size": 6}

    def __init__(self, shapes):
        self.shapes, self.read_so_far = shapes, []

    def names(self):
        return tuple(self.shapes)

    def shape(self, name):
        return self.shapes[name]

    def dtype(self, name):
        return torch.float32

    def read(self, name):
        raise AssertionError(f"{name} was read as a whole")

    def read_rows(self, name, start, stop):
        self.read_so_far.append((name, start, stop))
        return torch.ones(stop - start, *self.shapes[name][1:])


SHAPES = {
    "layers.0.dense.weight": (4, 3),
    "layers.0.attn.qkv.weight": (12, 4),
    "layers.0.conv.weight": (4, 3, 2, 2),
    "layers.0.experts.gate_up_proj": (5, 6, 16),
    "layers.0.experts.down_proj": (5, 8, 6),
}


def test_listing_and_matching_read_nothing():
    checkpoint = NamesOnly(SHAPES)
    matrices, _ = logical_matrices(checkpoint)
    pairs = match_matrices(checkpoint, NamesOnly(SHAPES)).pairs
    assert len(matrices) == len(pairs) == 1 + 3 + 1 + 15
    assert checkpoint.read_so_far == []


def test_parts_read_only_their_rows():
    checkpoint = NamesOnly(SHAPES)
    matrices, _ = logical_matrices(checkpoint)
    matrices["layers.0.attn.qkv.key"].read()
    matrices["layers.0.experts.3.down_proj"].read()
    assert checkpoint.read_so_far == [("layers.0.attn.qkv.weight", 4, 8), ("layers.0.experts.down_proj", 3, 4)]


def test_safetensors_are_not_read_when_opened(tmp_path, monkeypatch):
    save_file({"a.weight": torch.eye(3)}, tmp_path / "model.safetensors")
    for method in ("read", "read_rows"):
        monkeypatch.setattr(SafetensorsFile, method, lambda *args: pytest.fail("data was read"))
    matrices, _ = logical_matrices(open_checkpoint(tmp_path))
    assert list(matrices) == ["a"]


def test_the_header_is_parsed_once(tmp_path, monkeypatch):
    state = {"a.weight": torch.randn(4, 3), "b.weight": torch.zeros(0, 2), "c": torch.tensor(3.0)}
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    monkeypatch.setattr(weight_files, "parse_json", lambda *args, **options: pytest.fail("parsed again"))
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.items())
    assert torch.equal(checkpoint.read_rows("a.weight", 1, 9), state["a.weight"][1:9])
    assert checkpoint.read_rows("a.weight", 3, 2).shape == (0, 3)


def test_a_file_that_shrank_or_went_after_it_was_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.eye(3)}, path)
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="has become shorter"):
        checkpoint.read("a.weight")
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint.read("a.weight")


def test_torch_files_are_mapped(tmp_path, monkeypatch):
    modes = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: modes.append(options) or load(*args, **options))
    torch.save({"a.weight": torch.eye(3)}, tmp_path / "model.pt")
    open_checkpoint(tmp_path / "model.pt")
    assert modes == [{"map_location": "cpu", "weights_only": True, "mmap": True}]


def test_a_module_is_shared_and_not_copied():
    model = tiny("bert")
    read = open_checkpoint(model).read("pooler.dense.weight")
    assert read.data_ptr() == model.pooler.dense.weight.data_ptr()


def test_checkpoints_and_matrices_of_files_travel_between_processes(tmp_path):
    tiny("phi3").save_pretrained(tmp_path)
    matrices, _ = logical_matrices(open_checkpoint(tmp_path))
    sent = pickle.loads(pickle.dumps(matrices))
    assert all(torch.equal(matrix.read(), sent[name].read()) for name, matrix in matrices.items())
