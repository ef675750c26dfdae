"""The commands and the script of the page about GGUF files run, on files of a tiny Llama."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from spectralbasis import SpectralBasis, cli
from tests.models import tiny

pytest.importorskip("gguf", reason="the extra gguf is not installed")
from benchmarks.gguf_files import write

PAGE = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text()
COMMANDS = re.search(r"<!-- commands -->\n```\n(.+?)```", PAGE, re.DOTALL)[1].splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    model = tiny("llama", "causal", hidden_size=64, intermediate_size=96)
    model.save_pretrained(made / "base")
    for kind in ("Q8_0", "Q4_0"):
        write(model, made / f"base-{kind}.gguf", kind)
    return made


def test_the_commands(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for command in COMMANDS:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
    found = {name: json.loads((folder / name / "summary.json").read_text()) for name in ("quantized", "between")}
    assert [(one["matrices"], one["unpaired"]) for one in found.values()] == [(14, []), (14, [])]
    assert len(SpectralBasis.load(folder / "basis.safetensors")) == 14


def test_the_script(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(script, "quantization.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 11
