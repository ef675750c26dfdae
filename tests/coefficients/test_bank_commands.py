"""`spectralbasis bank` as a user types it, and what `spectralbasis serve` refuses before it starts anything."""

import json
import socket

import pytest
import torch
from typer.testing import CliRunner

import spectralbasis as sb
from spectralbasis import InputError
from spectralbasis.cli import app
from spectralbasis.coefficients.bank_file import read_bank
from tests.coefficients.folders import load_base, save_adapter, save_base, tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    base = save_base(folder / "base")
    for seed, name in enumerate(("a", "b")):
        save_adapter(folder / name, base, seed=seed, labels=2 + seed)
    save_adapter(folder / "causal", base, "", target_modules=["query"])
    return folder


def run(*arguments):
    """Exit code, stdout and what was raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.exception


def test_build_and_list(folder, tmp_path):
    file = tmp_path / "bank.safetensors"
    code, out, error = run(
        "bank", "build", folder / "base", folder / "a", f"glue/b={folder / 'b'}", "-o", file, "--json"
    )
    assert code == 0, error
    said = json.loads(out)
    assert said["tasks"] == {"a": {"classifier": 2}, "glue/b": {"classifier": 3}}
    assert (said["task_type"], said["coefficients"], said["dtype"]) == ("SEQ_CLS", "band", "float32")
    assert said["bytes"] == file.stat().st_size
    code, shown, _ = run("bank", "list", file)
    assert code == 0
    assert "2 tasks" in shown
    assert "3 (classifier)" in shown
    assert json.loads(run("bank", "list", file, "--json")[1]) == said
    built = sb.CoefficientBank.open(file, load_base(folder / "base", labels=3))
    direct = sb.CoefficientBank.from_adapters(
        load_base(folder / "base", labels=3), {"a": folder / "a", "glue/b": folder / "b"}
    )
    tasks = ["a", "glue/b", "a", "a", "glue/b"]
    assert torch.equal(built(**tokens(), tasks=tasks).logits, direct(**tokens(), tasks=tasks).logits)


def test_a_long_list_says_how_much_it_leaves_out(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("spectralbasis.commands.tables.ROWS_SHOWN", 1)
    file = tmp_path / "bank.safetensors"
    code, out, _ = run("bank", "build", folder / "base", folder / "a", folder / "b", "-o", file, "--dtype", "float16")
    assert code == 0
    assert "1 more tasks are in the output of --json" in " ".join(out.split())
    assert read_bank(file).dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a", "a"], "both named 'a'"),
        (["=a"], "names no task or no folder"),
        (["x="], "names no task or no folder"),
        (["absent"], "does not exist"),
        (["a/adapter_config.json"], "is a file"),
        (["a", "--dtype", "int8"], "--dtype int8 is unknown"),
        (["\x1b=a"], "visible characters"),
        (["causal", "a"], "BertModel has nothing there"),
    ],
)
def test_what_makes_no_bank_is_refused(folder, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(folder)
    code, _, error = run("bank", "build", "base", *arguments, "-o", tmp_path / "bank.safetensors")
    assert code == 1
    assert isinstance(error, InputError)
    with pytest.raises(InputError, match=sentence):
        raise error
    assert not list(tmp_path.iterdir())


def test_a_base_that_lacks_what_no_task_brings_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    base = save_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors = {name: one for name, one in tensors.items() if "pooler" not in name}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    code, _, error = run("bank", "build", base, folder / "a", "-o", tmp_path / "bank.safetensors")
    assert code == 1
    assert "pooler.dense" in str(error)
    assert "would be random" in str(error)


def test_what_cannot_be_served_is_said(folder, tmp_path):
    pytest.importorskip("ray", reason="the extra `serve` is not installed")
    pytest.importorskip("starlette", reason="the extra `serve` is not installed")
    file, other = tmp_path / "bank.safetensors", tmp_path / "other.safetensors"
    assert run("bank", "build", folder / "base", folder / "a", "-o", file)[0] == 0
    assert run("bank", "build", folder / "base", folder / "causal", "-o", other)[0] == 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for arguments, sentence in {
            (file, "--port", taken.getsockname()[1]): "pass another --host or --port",
            (file, "--host", "0.0.0.0"): "add --token-file FILE",
            (file, "--host", "no such host"): "cannot listen|add --token-file",
            (tmp_path / "absent",): "does not exist",
            (file, "--max-waiting", 0): "--max-waiting must be at least 1",
            (file, "--token-file", tmp_path / "absent"): "cannot be read",
            (file, "--adapters", tmp_path / "absent"): "does not exist",
            (other, "--port", 0): "only tasks that classify texts",
        }.items():
            code, _, error = run("serve", folder / "base", *arguments)
            assert code == 1
            with pytest.raises(InputError, match=sentence):
                raise error


@pytest.mark.parametrize("command", [("bank", "build"), ("bank", "list"), ("serve",)])
def test_help_has_an_example(command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Example:" in out
    assert f"spectralbasis {' '.join(command)}" in " ".join(out.split())
