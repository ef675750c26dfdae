"""A disk that is full while a comparison writes: a sentence, nothing half-written, and `--resume` goes on."""

import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path


def run(command, limit=None):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=limit)


@pytest.fixture
def checkpoints(tmp_path):
    base = {f"layer.{i}.dense.weight": torch.randn(40, 40) for i in range(8)}
    save_file(base, tmp_path / "base.safetensors")
    save_file({name: W + 0.1 * torch.randn(40, 40) for name, W in base.items()}, tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


def compare(base, tuned, output, *options, room=None):
    """The command in a process whose files may have `room` bytes at most, as a full disk would have it."""
    command = [sys.executable, "-m", "spectralbasis", "compare", base, tuned, "-o", output, "--leading", "8", *options]
    limit = None if room is None else (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    return run(list(map(str, command)), limit)


@pytest.mark.slow
def test_a_full_disk_is_a_sentence_and_resume_goes_on(checkpoints, tmp_path):
    output = tmp_path / "out"
    failed = compare(*checkpoints, output, room=100_000)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert "cannot be written" in failed.stderr or "disk is full" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (output / "summary.json").exists()
    again = compare(*checkpoints, output, "--resume")
    assert again.returncode == 0, again.stderr
    assert {"comparison.parquet", "summary.json", "index.html"} <= {file.name for file in output.iterdir()}


@pytest.mark.parametrize("room", [pytest.param(10, marks=pytest.mark.slow), 2_000])
def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path, room):
    code = (
        "import resource, sys, torch\n"
        "from safetensors.torch import save_file\n"
        "from spectralbasis.files import atomic_path\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "with atomic_path(sys.argv[1]) as path:\n"
        "    save_file({'a': torch.zeros(5000)}, path)\n"
    )
    target = tmp_path / "old.safetensors"
    target.write_bytes(b"old")
    ran = run([sys.executable, "-c", code, str(target)])
    assert "InputError" in ran.stderr
    assert "disk is full" in ran.stderr
    assert target.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["old.safetensors"]


def test_other_errors_of_a_block_are_its_own(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file") as path:
        path.with_name("absent").read_text()
    with pytest.raises(InputError, match="cannot write"), atomic_path("/proc/none/file"):
        pass
