"""Two processes that each take half of every batch learn what one process learns, and write it once."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.training.examples import save_text_model


def tuned(model, file, output, processes):
    """What `tune` wrote, and what it said."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launch, "-m", "spectralbasis", "tune", model, "--train", file, "--validation", file,
         "-o", output, "--steps", "6", "--batch-size", "8", "--leading", "4",
         "--max-length", "16"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return load_file(output / "adapter_model.safetensors"), done


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classification", "instructions"])
def test_two_processes_learn_what_one_does(tmp_path, writer, kind):
    file = tmp_path / "rows.jsonl"
    if kind == "instructions":  # whose answers differ in length, so that the halves of a batch do
        model = writer
        rows = [{"prompt": "is a film good", "completion": "yes " * (1 + number % 5)} for number in range(24)]
    else:
        model = save_text_model(tmp_path / "model", hidden_dropout_prob=0, attention_probs_dropout_prob=0)
        rows = [{"text": "a film is " + ("bad", "very good")[n % 2], "label": ("no", "yes")[n % 2]} for n in range(24)]
    file.write_text("\n".join(map(json.dumps, rows)))
    alone, _ = tuned(model, file, tmp_path / "one", 1)
    halved, done = tuned(model, file, tmp_path / "two", 2)
    assert done.stdout.count("scored on") == 1
    assert alone.keys() == halved.keys()
    for name, numbers in alone.items():
        torch.testing.assert_close(halved[name], numbers, rtol=0, atol=1e-5)
