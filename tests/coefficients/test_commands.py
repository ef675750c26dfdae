"""`spectralbasis export` and `spectralbasis combine` as a user types them."""

import json

import pytest
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from spectralbasis import InputError
from spectralbasis.cli import app
from tests.coefficients.folders import save_adapter, save_base


@pytest.fixture
def adapters(tmp_path):
    """Two adapters without heads."""
    base = save_base(tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        save_adapter(tmp_path / name, base, "", seed=seed, target_modules=["query"])
    return [str(tmp_path / name) for name in ("one", "two")]


def run(*arguments):
    """Exit code, stdout and what was raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.exception


@pytest.mark.parametrize("command", ["export", "combine"])
def test_help_has_an_example(command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"spectralbasis {command}" in " ".join(out.split())
    assert "Example:" in out


def test_export_to_lora(adapters, tmp_path):
    code, out, _ = run("export", adapters[0], "--to", "lora", "-o", tmp_path / "lora", "--json")
    assert code == 0
    assert json.loads(out)["error"] == 0
    assert LoraConfig.from_pretrained(tmp_path / "lora").r == 6
    code, out, _ = run("export", adapters[0], "--to", "lora", "-o", tmp_path / "lora", "--rank", 2, "--overwrite")
    assert code == 0
    assert "relative error" in out
    assert "vLLM opens it with --max-lora-rank 2 or more" in " ".join(out.split())
    assert LoraConfig.from_pretrained(tmp_path / "lora").r == 2


def test_export_to_a_merged_checkpoint(adapters, tmp_path):
    base = (tmp_path / "base").rename(tmp_path / "moved")
    code, out, _ = run("export", adapters[0], "--to", "merged", "-o", tmp_path / "merged", "--base", base, "--json")
    assert code == 0
    assert json.loads(out)["tensors"] == len(load_file(tmp_path / "merged" / "model.safetensors"))
    assert "2 changed" in run("export", adapters[1], "--to", "merged", "-o", tmp_path / "b", "--base", base)[1]


@pytest.mark.parametrize("kind", ["lora", "merged"])
def test_export_of_a_part(adapters, tmp_path, kind):
    path = tmp_path / "base" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if "layer.1." not in name}
    save_file(tensors, path, metadata={"format": "pt"})
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1}))
    code, _, error = run("export", adapters[0], "--to", kind, "-o", tmp_path / "out")
    assert code == 1
    assert isinstance(error, InputError)
    assert "--partial" in str(error)
    code, out, _ = run("export", adapters[0], "--to", kind, "-o", tmp_path / "out", "--partial", "--json")
    assert code == 0
    assert any("the base lacks" in note and "layer.1" in note for note in json.loads(out)["notes"])


def test_combine(adapters, tmp_path):
    code, out, _ = run("combine", *adapters, "--weights", "2,-1", "-o", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["weights"] == [2, -1]
    one, two, found = (load_file(f"{folder}/adapter_model.safetensors") for folder in (*adapters, tmp_path / "out"))
    assert all((found[name] - (2 * one[name] - two[name])).abs().max() < 1e-6 for name in found)
    code, out, _ = run("combine", *adapters, "--method", "ties", "--density", 0.5, "-o", tmp_path / "ties")
    assert code == 0
    assert "ties" in out


def test_wrong_input_is_an_error_for_people(adapters, tmp_path):
    out = ("-o", tmp_path / "out")
    for arguments, message in (
        (("export", adapters[0], "--to", "onnx", *out), "--to onnx is unknown"),
        (("export", adapters[0], "--to", "merged", "--rank", 2, *out), "leave it out with --to merged"),
        (("export", tmp_path / "base", "--to", "lora", *out), "not the folder of a spectral adapter"),
        (("combine", *adapters, "--weights", "1;2", *out), "--weights 1;2 must be numbers"),
        (("combine", *adapters, "--method", "product", *out), "method='product'"),
    ):
        code, _, error = run(*arguments)
        assert code == 1
        assert isinstance(error, InputError)
        assert message in str(error)
    assert run("export", adapters[0], *out)[0] == 2
    assert run("combine", *out)[0] == 2
