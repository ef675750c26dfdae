"""The examples run, with settings that keep them short, and the guide shows one of them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.slow


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_many_tasks(minilm, tmp_path):
    out = run("many_tasks.py", "--tasks", 300, "--rows", 8, "--length", 8, "--file", tmp_path / "bank.safetensors")
    assert "300 tasks of 3,138 numbers" in out
    assert len(re.findall(r"8 rows of \d tasks: .* logits \(8, 2\)", out)) == 2
    assert "299 tasks" in out
    assert (tmp_path / "bank.safetensors").stat().st_size < 1.1 * 300 * 3138 * 4


def test_lora_for_everyone(minilm, data_dir, tmp_path):
    arguments = ("--steps", 2, "--batch-size", 4, "--train-examples", 16, "--output", tmp_path / "out")
    out = run("lora_for_everyone.py", "--data", data_dir / "glue", *arguments)
    assert "spectralbasis is loaded: False" in out
    assert float(re.search(r"differ by (\S+)", out)[1]) < 1e-5
    assert "error 0" in out


def test_train_with_trainer(minilm, tmp_path):
    out = run("train_with_trainer.py", "--epochs", 2, "--output", tmp_path / "adapter")
    before, after = (float(share) for share in re.findall(r"accuracy \w+ training: (\d\.\d+)", out))
    assert after > max(before, 0.8)
    assert "trained: 42,550 coefficients" in out
    assert re.search(r"predicted labels: \[[01], [01]\]", out)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_guide_shows_the_script():
    source = (EXAMPLES / "train_with_trainer.py").read_text()
    after_docstring = source.splitlines()[ast.parse(source).body[0].end_lineno :]
    guide = (EXAMPLES.parent / "docs" / "peft.md").read_text()
    assert "\n".join(after_docstring).strip() in guide
