"""The commands of docs/extract.md run on tiny models, and its workflow is one that GitHub reads."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BertTokenizerFast
from typer.testing import CliRunner

from spectralbasis.cli import app
from spectralbasis.comparison.gate import parse_condition
from tests.coefficients.folders import load_base, save_base

PAGE = (Path(__file__).parents[2] / "docs" / "extract.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, text in BLOCKS if not kind for line in text.splitlines()]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guide")
    save_base(folder / "base")
    tuned = load_base(folder / "base")
    for name, parameter in tuned.named_parameters():
        if name.endswith(("query.weight", "value.weight", "dense.weight")):
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    tuned.save_pretrained(folder / "tuned")
    (folder / "tuned" / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"])
    )
    BertTokenizerFast(str(folder / "tuned" / "vocab.txt"), model_max_length=16).save_pretrained(folder / "tuned")
    (folder / "texts.csv").write_text("text\ngood\nbad bad\n")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_runs(command, models, monkeypatch):
    monkeypatch.chdir(models)
    program, *arguments = shlex.split(command)
    assert program == "spectralbasis"
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    if "-o" in arguments:
        output = models / arguments[arguments.index("-o") + 1]
        assert (output / "adapter_model.safetensors").is_file()
        assert (output / "extraction.json").is_file()


def test_the_python_of_the_page_loads_the_adapter(models, monkeypatch):
    monkeypatch.chdir(models)
    if not Path("adapter").exists():
        CliRunner().invoke(app, shlex.split(COMMANDS[0])[1:])
    code = next(text for kind, text in BLOCKS if kind == "python")
    names = {"AutoModelForSequenceClassification": AutoModelForSequenceClassification, "PeftModel": PeftModel}
    exec(code, names)
    assert isinstance(names["model"], PeftModel)


def test_the_workflow_compares_with_conditions_that_can_be_read():
    workflow = yaml.safe_load(next(text for kind, text in BLOCKS if kind == "yaml"))
    assert set(workflow) == {"name", True, "permissions", "jobs"}  # YAML reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    steps = workflow["jobs"]["compare"]["steps"]
    script = next(step["run"] for step in steps if "compare with" in step.get("name", ""))
    assert "${{" not in script  # what a person types never becomes part of the script
    words = shlex.split(script.replace("\\\n", " "))
    conditions = [words[index + 1] for index, word in enumerate(words) if word == "--fail-if"]
    assert [parse_condition(text).text for text in conditions] == conditions
    assert len(conditions) == 4
    assert all("uses" in step or "run" in step for step in steps)
