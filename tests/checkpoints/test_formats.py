"""Every way of storing one state gives back the same tensors, shapes and dtypes."""

import json

import pytest
import torch
from safetensors.torch import save_file

from spectralbasis.checkpoints import Format, logical_matrices, match_matrices, open_checkpoint, register_format
from spectralbasis.checkpoints.checkpoint import TensorCheckpoint
from spectralbasis.checkpoints.opening import FORMATS
from spectralbasis.errors import InputError

STATE = {
    "layer.0.weight": torch.randn(5, 3, generator=torch.Generator().manual_seed(1)),
    "layer.0.bias": torch.arange(5.0),
    "layer.1.weight": torch.ones(2, 5, dtype=torch.bfloat16),
    "steps": torch.tensor(7),
}
CONFIG = {"model_type": "bert"}


def safetensors_file(folder):
    save_file(STATE, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def safetensors_folder(folder):
    save_file(STATE, folder / "model.safetensors")
    return folder


def torch_file(folder):
    torch.save(STATE, folder / "weights.pt")
    return folder / "weights.pt"


def old_torch_file(folder):
    torch.save(STATE, folder / "weights.pth", _use_new_zipfile_serialization=False)
    return folder / "weights.pth"


def torch_folder(folder):
    torch.save(STATE, folder / "pytorch_model.bin")
    torch.save({"lr": 0.1}, folder / "training_args.bin")
    return folder


def sharded(folder, name, save):
    halves = [dict(list(STATE.items())[:2]), dict(list(STATE.items())[2:])]
    weight_map = {}
    for index, half in enumerate(halves):
        save(half, folder / name.format(index))
        weight_map |= dict.fromkeys(half, name.format(index))
    return weight_map


def sharded_safetensors(folder):
    weight_map = sharded(folder, "model-{}.safetensors", save_file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def sharded_torch(folder):
    weight_map = sharded(folder, "pytorch_model-{}.bin", torch.save)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def index_itself(folder):
    return sharded_safetensors(folder) / "model.safetensors.index.json"


def loose_shards(folder):
    """All shards, without their index, and the same weights once more in one file as Mistral publishes them."""
    sharded(folder, "model-0000{}-of-00002.safetensors", lambda half, path: save_file(half, one_up(path)))
    save_file({"other.weight": torch.eye(2)}, folder / "consolidated.safetensors")
    return folder


def loose_torch_shards(folder):
    sharded(folder, "pytorch_model-0000{}-of-00002.bin", lambda half, path: torch.save(half, one_up(path)))
    return folder


def one_up(path):
    """Shards that `sharded` counts from 0, counted from 1 as `save_pretrained` does."""
    return path.with_name(path.name.replace("-00001-", "-00002-").replace("-00000-", "-00001-"))


def variant_index(folder):
    weight_map = sharded(folder, "model.fp16-{}.safetensors", save_file)
    (folder / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def variant_folder(folder):
    save_file(STATE, folder / "model.fp16.safetensors")
    return folder


def diffusers_folder(folder):
    save_file(STATE, folder / "diffusion_pytorch_model.safetensors")
    save_file({"other.weight": torch.eye(2)}, folder / "diffusion_pytorch_model.fp16.safetensors")
    return folder


def mistral_folder(folder):
    save_file(STATE, folder / "consolidated.safetensors")
    return folder


def safetensors_under_another_suffix(folder):
    save_file(STATE, folder / "pytorch_model.bin")
    return folder


def torch_file_without_a_suffix(folder):
    torch.save(STATE, folder / "0123abcd")
    return folder / "0123abcd"


def file_without_a_suffix(folder):
    save_file(STATE, folder / "0123abcd")
    return folder / "0123abcd"


WAYS = [
    safetensors_file,
    safetensors_folder,
    torch_file,
    old_torch_file,
    torch_folder,
    sharded_safetensors,
    sharded_torch,
    index_itself,
    loose_shards,
    loose_torch_shards,
    variant_index,
    variant_folder,
    diffusers_folder,
    mistral_folder,
    safetensors_under_another_suffix,
    torch_file_without_a_suffix,
    file_without_a_suffix,
]


@pytest.mark.parametrize("way", WAYS)
def test_same_tensors(way, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    source = way(tmp_path)

    checkpoint = open_checkpoint(source)

    assert set(checkpoint.names()) == set(STATE)
    for name, expected in STATE.items():
        assert checkpoint.shape(name) == tuple(expected.shape)
        assert checkpoint.dtype(name) == expected.dtype
        torch.testing.assert_close(checkpoint.read(name), expected, rtol=0, atol=0)
    torch.testing.assert_close(checkpoint.read_rows("layer.0.weight", 1, 4), STATE["layer.0.weight"][1:4])
    assert checkpoint.source == str(source)
    assert checkpoint.config == CONFIG


def test_state_dict_and_module_and_checkpoint():
    module = torch.nn.Sequential(torch.nn.Linear(3, 5))
    for source in (module, module.state_dict(), open_checkpoint(module)):
        checkpoint = open_checkpoint(source)
        assert set(checkpoint.names()) == {"0.weight", "0.bias"}
        assert torch.equal(checkpoint.read("0.weight"), module[0].weight)
        assert not checkpoint.read("0.weight").requires_grad
        assert checkpoint.config == {}
    assert open_checkpoint(checkpoint) is checkpoint


def test_relative_and_string_paths(tmp_path, monkeypatch):
    safetensors_folder(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert open_checkpoint(tmp_path.name).source == tmp_path.name


@pytest.mark.parametrize("layout", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_a_sparse_tensor_is_read_as_the_matrix_that_it_is(layout):
    W = torch.eye(4) * torch.arange(4)
    matrices, _ = logical_matrices(open_checkpoint({"a.weight": layout(W)}))
    assert torch.equal(matrices["a"].read(), W)


@pytest.fixture
def eye_format(monkeypatch):
    """A format that is one entry: a text file such as `EYE 3`, for an identity matrix."""
    formats = list(FORMATS)

    def read(path, source, config):
        return TensorCheckpoint({"layer.weight": torch.eye(int(path.read_text().split()[1]))}, source, config)

    register_format(Format("eye", (".eye",), read, start=rb"EYE "))
    yield
    FORMATS[:] = formats


@pytest.mark.usefixtures("eye_format")
@pytest.mark.parametrize("place", ["model.eye", "named_otherwise", "."])
def test_a_further_format_is_one_entry(place, tmp_path):
    (tmp_path / ("model.eye" if place == "." else place)).write_text("EYE 3")
    matrices = match_matrices(open_checkpoint(tmp_path / place), open_checkpoint({"layer.weight": torch.eye(3)})).pairs
    assert all(torch.equal(matrix.read(), torch.eye(3)) for pair in matrices for matrix in pair)
    assert len(matrices) == 1


@pytest.mark.usefixtures("eye_format")
def test_what_can_be_opened_is_said_with_a_further_format(tmp_path):
    (tmp_path / "unknown").write_text("something else")
    with pytest.raises(
        InputError, match=r"eye \(\.eye\), safetensors \(\.safetensors\), llama2\.c \(\.bin\), torch\.save"
    ):
        open_checkpoint(tmp_path / "unknown")
    (tmp_path / "unknown").unlink()
    with pytest.raises(InputError, match=r"one other file of weights \(\.eye, \.safetensors, "):
        open_checkpoint(tmp_path)


@pytest.mark.usefixtures("eye_format")
def test_a_further_format_may_be_one_that_is_refused_otherwise(tmp_path):
    def read(path, source, config):
        return TensorCheckpoint({"layer.weight": torch.eye(2)}, source, config)

    (tmp_path / "model.ggml").write_bytes(b"lmgg" + bytes(12))
    with pytest.raises(InputError, match=r"a GGML file, .* not read"):
        open_checkpoint(tmp_path / "model.ggml")
    register_format(Format("GGML", (".ggml",), read, start=rb"lmgg"))
    assert open_checkpoint(tmp_path).names() == ("layer.weight",)


@pytest.mark.usefixtures("eye_format")
def test_a_format_that_leaves_a_file_to_others_changes_nothing_for_them(tmp_path):
    register_format(Format("none", (".pt", ".safetensors", ".ggml"), lambda path, source, config: None, start=rb"PK"))
    assert set(open_checkpoint(torch_file(tmp_path)).names()) == set(STATE)
    assert set(open_checkpoint(safetensors_file(tmp_path)).names()) == set(STATE)
    (tmp_path / "model.ggml").write_bytes(b"lmgg" + bytes(12))
    with pytest.raises(InputError, match=r"a GGML file, .* not read"):
        open_checkpoint(tmp_path / "model.ggml")
