"""Hub ids: taken from the cache while offline, downloaded only where the text can be nothing else."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from spectralbasis.checkpoints import open_checkpoint, opening
from spectralbasis.errors import InputError

WEIGHTS = {"a.weight": torch.eye(3)}
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Folder of the snapshot of `org/name` in an otherwise empty cache, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return snapshot


def test_cached_model_opens_offline(cached):
    save_file(WEIGHTS, cached / "model.safetensors")
    checkpoint = open_checkpoint("org/name")
    assert checkpoint.names() == ("a.weight",)
    assert checkpoint.source == "org/name"


def test_pickles_where_there_are_no_safetensors(cached):
    torch.save(WEIGHTS, cached / "pytorch_model.bin")
    assert open_checkpoint("org/name").names() == ("a.weight",)


@pytest.mark.parametrize("hub_id", ["org/other", "other"])
def test_uncached_model_offline(cached, hub_id):
    with pytest.raises(InputError, match=f"{hub_id} is neither a file nor a folder.*HF_HUB_OFFLINE"):
        open_checkpoint(hub_id)


@pytest.mark.slow
def test_a_hub_that_does_not_answer(tmp_path):
    program = """
import spectralbasis as sb
try:
    sb.open_checkpoint("org/name")
except sb.InputError as error:
    print(error)
"""
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", program]
    told = subprocess.run(command, env=os.environ | closed, capture_output=True, text=True, check=True).stdout
    assert "org/name is neither a file nor a folder here, and it cannot be downloaded as a hub id: " in told
    assert "Check the spelling, the network and your access to the model" in told
    assert "HF_HUB_OFFLINE" not in told


def test_safetensors_are_asked_for_first(cached, monkeypatch):
    asked = []

    def snapshot_download(hub_id, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        return str(cached)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    save_file(WEIGHTS, cached / "model.safetensors")
    open_checkpoint("org/name")
    assert len(asked) == 1
    assert "*.safetensors" in asked[0]
    assert not any(pattern.endswith(".bin") for pattern in asked[0])


def test_mistrals_own_file_is_taken_where_there_is_no_other(cached, monkeypatch):
    def snapshot_download(hub_id, allow_patterns, ignore_patterns):
        if "consolidated*.safetensors" in allow_patterns:
            assert "consolidated*" not in ignore_patterns
            save_file(WEIGHTS, cached / "consolidated.safetensors")
        return str(cached)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert open_checkpoint("org/name").names() == ("a.weight",)


def test_a_repository_of_another_format_is_named(cached, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(cached))
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda hub_id: ["README.md", "model-q4.gguf"])
    with pytest.raises(
        InputError, match=r"org/name on the hub holds GGUF files \(model-q4\.gguf\).*hf download org/name"
    ):
        open_checkpoint("org/name")


@pytest.mark.parametrize("files", [["README.md"], None])
def test_a_repository_without_weights(cached, files, monkeypatch):
    def list_repo_files(hub_id):
        if files is None:
            raise ConnectionError
        return files

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(cached))
    monkeypatch.setattr("huggingface_hub.list_repo_files", list_repo_files)
    with pytest.raises(InputError, match="holds no weights"):
        open_checkpoint("org/name")


def test_a_folder_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opening, "_snapshot", lambda *args: pytest.fail("the hub was asked"))
    (tmp_path / "org" / "name").mkdir(parents=True)
    save_file(WEIGHTS, tmp_path / "org" / "name" / "model.safetensors")
    assert open_checkpoint("org/name").names() == ("a.weight",)
    shutil.rmtree(tmp_path / "org")


@pytest.mark.parametrize(
    "source",
    [
        "/abs/path",
        "./here",
        "../up",
        "a/b/c",
        "~/models",
        "runs/model.safetensors",
        "weights.pt",
        "a b",
        "a//b",
        "-x",
        "",
    ],
)
def test_paths_are_never_looked_up(source, monkeypatch):
    monkeypatch.setattr(opening, "_snapshot", lambda *args: pytest.fail("the hub was asked"))
    with pytest.raises(InputError):
        open_checkpoint(source)


def test_links_in_a_subfolder_of_a_snapshot_lead_to_its_blobs(cached):
    blobs = cached.parents[1] / "blobs"
    blobs.mkdir()
    save_file(WEIGHTS, blobs / "0123")
    (cached / "unet").mkdir()
    (cached / "unet" / "diffusion_pytorch_model.safetensors").symlink_to("../../../blobs/0123")
    assert open_checkpoint(cached / "unet").names() == ("a.weight",)
