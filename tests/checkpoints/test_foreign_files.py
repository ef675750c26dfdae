"""Files and folders that are no model which can be read: the refusal names what each is and says what to do."""

import gzip
import io
import json
import re
import struct
import tarfile
import zipfile

import h5py
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save, save_file
from torch import nn

from spectralbasis.checkpoints import open_checkpoint
from spectralbasis.checkpoints.adapters import AdapterCheckpoint
from spectralbasis.checkpoints.foreign import KINDS
from spectralbasis.errors import InputError
from tests.models import tiny

WEIGHTS = {"a.weight": torch.eye(4)}
HTML = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 133466304\n"


def refusal(source) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(source)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def hdf5():
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file["kernel"] = np.eye(2)
    return content.getvalue()


def numpy_archive():
    content = io.BytesIO()
    np.savez(content, kernel=np.eye(2))
    return content.getvalue()


def numpy_array():
    content = io.BytesIO()
    np.save(content, np.eye(2))
    return content.getvalue()


def torchscript():
    content = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), content)
    return content.getvalue()


def exported():
    content = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), content)
    return content.getvalue()


def zipped(*names):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return content.getvalue()


def tarred():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        entry = tarfile.TarInfo("model/model.safetensors")
        entry.size = 8
        archive.addfile(entry, io.BytesIO(b"12345678"))
    return content.getvalue()


def msgpack():
    return b"\x81\xa6params\x81\xa5dense\x81\xa6kernel\xc0"


def onnx():
    """The start of a graph: the version of the format (8), and who wrote it."""
    return b"\x08\x08\x12\x07pytorch\x1a\x032.0" + b"\0" * 40


# The usual name, the content, what the message calls it, and what it says to do.
FILES = [
    ("ggml-model.bin", b"lmgg" + b"\0" * 40, "GGML", "pass the safetensors"),
    ("tf_model.h5", hdf5, "Keras or HDF5", "from_tf=True"),
    ("model.keras", lambda: zipped("config.json", "model.weights.h5"), "Keras or HDF5", "from_tf=True"),
    ("flax_model.msgpack", msgpack, "Flax", "from_flax=True"),
    ("model.onnx", onnx, "ONNX", "exported from"),
    ("model.tflite", b"\x1c\0\0\0TFL3" + b"\0" * 40, "TensorFlow Lite", "converted from"),
    ("weights.npz", numpy_archive, "NumPy", r"numpy\.load"),
    ("weights.npy", numpy_array, "NumPy", r"numpy\.load"),
    ("model.pt2", exported, r"torch\.export", r"torch\.export\.load"),
    ("scripted.pt", torchscript, "TorchScript", r"torch\.jit\.load"),
    ("model.zip", lambda: zipped("model/config.json", "model/model.safetensors"), "an archive", "unpack"),
    ("model.tar", tarred, "an archive", "unpack"),
    ("model.tar.gz", lambda: gzip.compress(tarred()), "an archive", "unpack"),
    ("page.html", HTML, "a web page", "access token"),
    ("error.json", b'{"error":"Repository not found"}', "error message", "access token"),
    ("pointer", POINTER, "pointer of git-lfs", "git lfs pull"),
    ("empty", b"", "empty file", "again"),
]


@pytest.mark.parametrize("name", ["", "model.safetensors", "pytorch_model.bin", "model.pt", "model"])
@pytest.mark.parametrize(("usual", "content", "called", "remedy"), FILES, ids=[usual for usual, *_ in FILES])
def test_files_are_recognised_by_their_content_whatever_their_name(usual, content, called, remedy, name, tmp_path):
    path = tmp_path / (name or usual)
    path.write_bytes(content() if callable(content) else content)
    message = refusal(path)
    assert message.startswith(f"{path} is ")
    assert re.search(rf"{called}.*; .*{remedy}", message)


@pytest.mark.parametrize("content", [HTML, POINTER, b""])
@pytest.mark.parametrize("where", ["folder", "shard", "adapter"])
def test_what_is_no_file_of_weights_is_recognised_within_folders(content, where, tmp_path):
    name = {"folder": "model", "shard": "model-00002-of-00002", "adapter": "adapter_model"}[where] + ".safetensors"
    (tmp_path / name).write_bytes(content)
    if where == "shard":
        save_file(WEIGHTS, tmp_path / "model-00001-of-00002.safetensors")
        weight_map = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": name}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif where == "adapter":
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    assert refusal(tmp_path).startswith(f"{tmp_path / name} is a")


# Files by their names alone, since their content has no mark or is never looked at in a folder.
NAMED = [
    ("model.safetensors.incomplete", "did not finish", "download it again"),
    ("model.ckpt.index", "TensorFlow", "from_tf=True"),
    ("model.ckpt.data-00000-of-00001", "TensorFlow", "from_tf=True"),
    ("saved_model.pb", "TensorFlow", "from_tf=True"),
    ("tf_model.h5", "Keras", "from_tf=True"),
    ("flax_model.msgpack", "Flax", "from_flax=True"),
    ("ggml-model-q4.ggml", "GGML", "or a GGUF file"),
    ("model.onnx", "ONNX", "exported from"),
    ("openvino_model.xml", "OpenVINO", "converted from"),
    ("weights.npz", "NumPy", "numpy.load"),
    ("model_state.pdparams", "Paddle", "names to torch tensors"),
    ("__0_0.distcp", "distributed checkpoint", "dcp_to_torch {folder} OUT.pt"),
    ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "ZeRO", "zero_to_fp32.py"),
]


@pytest.mark.parametrize("in_folder", [True, False])
@pytest.mark.parametrize(("name", "called", "remedy"), NAMED)
def test_files_are_recognised_by_their_name(name, called, remedy, in_folder, tmp_path):
    (tmp_path / name).write_bytes(b"\x01\x02\x03\x04")
    (tmp_path / "README.md").write_text("A model.")
    (tmp_path / "config.json").write_text("{}")
    message = refusal(tmp_path if in_folder else tmp_path / name)
    assert called in message
    assert remedy.format(folder=tmp_path) in message.partition(";")[2]


def test_the_common_part_of_a_tensorflow_checkpoints_names(tmp_path):
    (tmp_path / "model.ckpt.index").write_bytes(b"\x01")
    assert "TensorFlow" in refusal(tmp_path / "model.ckpt")


def files(folder, *names):
    """Makes files that are no checkpoints."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x80\x02N.")


def test_a_download_in_progress(tmp_path):
    files(tmp_path, ".cache/huggingface/download/abc.incomplete", "config.json")
    (tmp_path / "config.json").write_text("{}")
    assert "did not finish" in refusal(tmp_path)


@pytest.mark.parametrize("folder", ["", "pytorch_model_fsdp_0"])
def test_distributed_checkpoint(folder, tmp_path):
    files(tmp_path / folder, ".metadata", "__0_0.distcp", "__1_0.distcp")
    files(tmp_path, "common.pt", "scheduler.pt", "rng_state_0.pth")
    assert f"format_utils dcp_to_torch {tmp_path / folder} OUT.pt" in refusal(tmp_path)


def test_a_real_distributed_checkpoint_converts_as_the_refusal_says(tmp_path):
    from torch.distributed.checkpoint import format_utils, save

    save({"a.weight": torch.eye(4)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    assert "dcp_to_torch" in refusal(tmp_path / "saved")
    format_utils.dcp_to_torch_save(tmp_path / "saved", tmp_path / "out.pt")
    assert torch.equal(open_checkpoint(tmp_path / "out.pt").read("a.weight"), torch.eye(4))


def test_folders_of_zero(tmp_path):
    step = tmp_path / "global_step500"
    files(step, "zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    files(tmp_path, "zero_to_fp32.py", "latest", "training_args.bin", "rng_state_0.pth")
    for source in (tmp_path, step, step / "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        assert "zero_to_fp32.py . OUT" in refusal(source)


@pytest.mark.parametrize(
    "names",
    [
        ["iter_0001000/mp_rank_00/model_optim_rng.pt", "latest_checkpointed_iteration.txt"],
        ["mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"],
        ["consolidated.00.pth", "consolidated.01.pth", "params.json"],
    ],
)
def test_folders_of_slices(names, tmp_path):
    files(tmp_path, *names)
    message = refusal(tmp_path)
    assert "split over several devices" in message
    assert "convert it" in message


def test_one_slice_of_a_llama_as_meta_publishes_it(tmp_path):
    for number in ("00", "01"):
        torch.save({"layers.0.wq.weight": torch.eye(3)}, tmp_path / f"consolidated.{number}.pth")
    assert "one slice" in refusal(tmp_path / "consolidated.00.pth")
    (tmp_path / "consolidated.01.pth").unlink()
    assert open_checkpoint(tmp_path / "consolidated.00.pth").names() == ("layers.0.wq.weight",)


def test_a_pipeline_of_diffusers_names_its_models(tmp_path):
    for part in ("unet", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
        save_file(WEIGHTS, tmp_path / part / "diffusion_pytorch_model.safetensors")
    files(tmp_path, "scheduler/scheduler_config.json", "model_index.json")
    message = refusal(tmp_path)
    assert "pipeline of diffusers" in message
    assert all(str(tmp_path / part) in message for part in ("unet", "vae", "text_encoder"))
    assert "scheduler" not in message
    assert open_checkpoint(tmp_path / "unet").names() == ("a.weight",)


def test_a_sentence_transformer_names_its_transformer(tmp_path):
    (tmp_path / "0_Transformer").mkdir()
    save_file(WEIGHTS, tmp_path / "0_Transformer" / "model.safetensors")
    files(tmp_path, "modules.json")
    message = refusal(tmp_path)
    assert "sentence-transformers" in message
    assert str(tmp_path / "0_Transformer") in message


def test_a_trainers_output_names_its_last_checkpoint(tmp_path):
    for step in (500, 1000, 1500):
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file(WEIGHTS, tmp_path / f"checkpoint-{step}" / "model.safetensors")
    files(tmp_path, "runs/events.out", "training_args.bin")
    message = refusal(tmp_path)
    assert "output folder of a Trainer" in message
    assert f"{tmp_path / 'checkpoint-1500'}," in message
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).names() == ("a.weight",)


def test_several_files_of_weights_are_asked_about_whatever_lies_beside_them(tmp_path):
    files(tmp_path, "modules.json", "checkpoint-500/model.safetensors", "model.gguf")
    for variant in ("fp16", "bf16"):
        save_file(WEIGHTS, tmp_path / f"model.{variant}.safetensors")
    assert "several files of weights (model.bf16.safetensors, model.fp16.safetensors)" in refusal(tmp_path)


# Names of one tensor of a LoRA file in each convention.
LORA_NAMES = [
    ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "kohya", "fuse_lora"),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "kohya", "fuse_lora"),
    ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "kohya", "fuse_lora"),
    ("diffusion_model.double_blocks.0.img_attn.proj.lora_down.weight", "kohya", "fuse_lora"),
    ("unet.down_blocks.0.attn1.processor.to_q_lora.down.weight", "diffusers", "fuse_lora"),
    ("unet.down_blocks.0.attn1.to_q.lora.down.weight", "diffusers", "fuse_lora"),
    ("unet.down_blocks.0.attn1.to_q.lora_A.weight", "diffusers", "fuse_lora"),
    ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "diffusers", "fuse_lora"),
    ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "ComfyUI", "fuse_lora"),
    ("base_model.model.layers.0.q_proj.lora_A.weight", "adapter's tensors", "save_pretrained"),
    ("model.layers.0.q_proj.lora_A.default.weight", "adapter's tensors", "save_pretrained"),
    ("transformer.h.0.attn.c_attn.lora_A.weight", "adapter's tensors", "save_pretrained"),
    ("layers.0.attn.q_proj.lora_a.weight", "adapter's tensors", "merge_and_unload"),
    ("layers.0.q_proj.lora_A", "adapter's tensors", "merge_and_unload"),
    ("base_model.model.layers.0.q_proj.spectral_coefficients", "adapter's tensors", "save_pretrained"),
    ("base_model.model.layers.0.q_proj.spectral_coefficients.weight", "adapter's tensors", "save_pretrained"),
    ("base_model.model.layers.0.q_proj.randlora_lambda", "adapter's tensors", "save_pretrained"),
    ("prompt_embeddings", "adapter's tensors", "save_pretrained"),
]


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".pt"])
@pytest.mark.parametrize(("name", "called", "remedy"), LORA_NAMES)
def test_adapters_tensors_alone_are_refused(name, called, remedy, suffix, tmp_path):
    state = {name: torch.ones(4, 2), "layers.0.q_proj.weight": torch.eye(4)}
    source = tmp_path / f"weights{suffix}" if suffix else state
    if suffix:
        (torch.save if suffix == ".pt" else save_file)(state, source)
    message = refusal(source)
    assert called in message
    assert name in message
    assert remedy in message


def test_diffusers_lora_in_its_folder(tmp_path):
    save_file({"unet.a.lora_A.weight": torch.ones(2, 4)}, tmp_path / "pytorch_lora_weights.safetensors")
    assert "diffusers" in refusal(tmp_path)


@pytest.fixture
def adapter(tmp_path):
    """Folder of a LoRA adapter whose base lies beside it."""
    tiny("bert").save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny("bert"), LoraConfig(target_modules=["query"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapters_tensors_stand_for_its_folder(adapter, name):
    path = adapter / "adapter_model.safetensors"
    if name != path.name:
        torch.save({key: 2 * tensor for key, tensor in load_file(path).items()}, adapter / name)
    opened, folder = open_checkpoint(adapter / name), open_checkpoint(adapter)
    assert isinstance(opened, AdapterCheckpoint)
    query = "encoder.layer.0.attention.self.query.weight"
    base = folder.base.read(query)
    scale = 1 if name == path.name else 4  # both factors of the other file are twice as large
    torch.testing.assert_close(opened.read(query) - base, scale * (folder.read(query) - base), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("in_folder", [True, False])
def test_an_adapter_without_its_config(adapter, in_folder):
    (adapter / "adapter_config.json").unlink()
    message = refusal(adapter if in_folder else adapter / "adapter_model.safetensors")
    assert "without the adapter_config.json" in message
    assert "save_pretrained" in message


def test_an_adapters_state_in_memory():
    model = get_peft_model(tiny("bert"), LoraConfig(target_modules=["query"]))
    assert "without the adapter_config.json" in refusal(get_peft_model_state_dict(model))


def test_no_header_of_a_real_checkpoint_is_taken_for_another_kind(tmp_path):
    path = tmp_path / "model.safetensors"
    whole = save(WEIGHTS)
    for length in range(88, 4096, 8):
        header = whole[8 : 8 + int.from_bytes(whole[:8], "little")]
        path.write_bytes(struct.pack("<Q", length) + header.ljust(length) + whole[8 + len(header) :])
        assert open_checkpoint(path).names() == ("a.weight",)


def test_every_kind_is_recognised_by_something():
    for kind in KINDS:
        assert kind.start or kind.members or kind.files or kind.marks or kind.holds or kind.state
        kind.remedy.format(folder="", name="", parts="", last="")
