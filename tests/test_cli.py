"""The command line as a user types it: output, exit codes, and errors of one paragraph."""

import json
import subprocess
import sys

import click
import pytest
import typer
from safetensors.torch import save_file

from spectralbasis import SpectralBasis, cli
from spectralbasis.commands import COMMANDS
from spectralbasis.comparison import comparing
from spectralbasis.comparison.nulls import NULLS
from spectralbasis.version import __version__
from tests.comparison.pairs import random_updates

NAMES = [command.__name__ for command in COMMANDS]


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a command; gives its exit code, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["spectralbasis", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code or 0
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def pair(tmp_path):
    base, tuned = random_updates(4, 0.3)
    for name, state in {"base": base, "tuned": tuned}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


@pytest.mark.parametrize("command", NAMES)
def test_every_command_has_help_with_an_example_and_prints_json(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"spectralbasis {command}" in " ".join(out.split())
    assert "Example:" in out
    assert "--json" in out


@pytest.mark.parametrize("command", NAMES)
def test_help_says_every_default(command):
    for option in typer.main.get_command(cli.app).commands[command].params:
        if (
            isinstance(option, click.Option)
            and option.default is None
            and not option.required
            and option.name != "help"
        ):
            assert "efault: " in option.help, option.name


def test_help_names_every_null_without_a_second_list(run):
    _, out, _ = run("compare", "--help")
    assert all(null.name in out and null.update.split()[-1] in out for null in NULLS.values())


def test_version(run):
    assert run("--version")[:2] == (0, f"{__version__}\n")


def test_compare_prints_findings_and_writes_the_folder(run, pair, tmp_path):
    code, out, err = run("compare", *pair, "--leading", 8, "-o", tmp_path / "out")
    assert code == 0
    assert "stability" in out
    assert "undecided" in out
    assert str(tmp_path / "out" / "index.html") in err
    assert (tmp_path / "out" / "index.html").stat().st_size > 0


def test_json_is_all_that_stdout_holds(run, pair):
    code, out, _ = run("compare", *pair, "--leading", 8, "--null", "none", "--json")
    assert code == 0
    assert json.loads(out)["stability"]["null_mean"] is None


def test_resume_takes_over_and_needs_a_folder(run, pair, tmp_path):
    run("compare", *pair, "--leading", 8, "-o", tmp_path / "out")
    assert run("compare", *pair, "--leading", 8, "-o", tmp_path / "out", "--resume")[0] == 0
    code, _, err = run("compare", *pair, "--resume")
    assert code == 1
    assert "add -o DIR" in err


def test_several_checkpoints_are_held_against_each_other(run, pair, tmp_path):
    labels = ("--label", "RTE", "--label", "RTE")
    arguments = ("compare", pair[0], pair[1], pair[1].with_name("copy.safetensors"), "--leading", 8)
    arguments[3].write_bytes(pair[1].read_bytes())
    code, out, _ = run(*arguments, *labels, "--json")
    assert code == 0
    assert json.loads(out)["sharing"]["over"] == "same task"
    assert "sharing" in run(*arguments)[1]
    code, _, err = run(*arguments, "--label", "RTE")
    assert code == 1
    assert "1 task label(s) (RTE) for 2 finetuned checkpoints" in err


def test_similarity_prints_cosines_and_writes_the_folder(run, pair, tmp_path):
    code, out, _ = run("similarity", pair[1], pair[1], "--base", pair[0], "-o", tmp_path / "out")
    assert code == 0
    assert "+1.0000" in out
    code, out, _ = run("similarity", pair[1], pair[1], "--base", pair[0], "--json")
    assert json.loads(out) == json.loads((tmp_path / "out" / "similarity.json").read_text())
    code, _, err = run("similarity", pair[1], pair[1])
    assert code == 1
    assert "--base MODEL" in err


def test_basis_is_written_and_described(run, pair, tmp_path):
    file = tmp_path / "basis.safetensors"
    code, out, _ = run("basis", pair[0], "-o", file, "--leading", "0.1", "--json")
    assert code == 0
    assert list(json.loads(out)["matrices"]) == list(SpectralBasis.load(file))
    assert json.loads(out)["bytes"] == file.stat().st_size


def test_report_is_made_again_from_the_results(run, pair, tmp_path):
    run("compare", *pair, "--leading", 8, "-o", tmp_path / "out")
    (tmp_path / "out" / "index.html").unlink()
    code, out, _ = run("report", tmp_path / "out")
    assert (code, out.strip()) == (0, str(tmp_path / "out" / "index.html"))
    _, out, _ = run("report", tmp_path / "out", "--json")
    assert json.loads(out) == {"report": str(tmp_path / "out" / "index.html")}


@pytest.mark.parametrize(
    "arguments",
    [
        ("compare",),
        ("compare", "only-one"),
        ("nonsense",),
        ("compare", "a", "b", "--draws", "few"),
        ("tune", "minilm", "-o", "x"),
    ],
)
def test_wrong_usage_ends_with_2(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err


def test_bad_input_ends_with_1_and_one_paragraph(run, pair, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(pair[1].read_bytes()[:100])
    for arguments in (
        ("compare", pair[0], tmp_path / "missing.safetensors"),
        ("compare", pair[0], broken),
        ("compare", *pair, "--leading", "many"),
        ("compare", pair[0], pair[0]),
        ("basis", broken, "-o", tmp_path / "basis.safetensors"),
        ("report", tmp_path / "empty"),
        ("evaluate", tmp_path / "missing", "--task", "RTE"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (1, ""), arguments
        assert err.startswith("error: "), arguments
        assert "Traceback" not in err
        assert err.count("\n") == 1
    assert not (tmp_path / "basis.safetensors").exists()


def test_a_plan_is_printed_and_nothing_is_compared(run, pair, tmp_path):
    code, out, _ = run("compare", *pair, "--leading", 8, "--plan", "-o", tmp_path / "out")
    assert code == 0
    assert "4 matrices to compare, 0 skipped" in out
    assert "48×40" in out
    assert "this process" in out
    assert not (tmp_path / "out").exists()
    code, out, _ = run("compare", *pair, "--leading", 8, "--plan", "--json")
    assert json.loads(out)["matrices"][0]["shape"] == [48, 40]


def test_warnings_about_libraries_that_peft_imports_are_silent_and_no_others():
    program = "import logging, spectralbasis.cli, peft; logging.getLogger('torchao').warning('heard'); print('done')"
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.split()[-1] == "done"
    assert "heard" in ended.stderr.splitlines()
    assert not any(words in ended.stderr for words in cli.NOISE.values())


def test_debug_shows_where_an_error_comes_from(run, tmp_path):
    code, _, err = run("compare", tmp_path / "missing.pt", tmp_path / "missing.pt", "--debug")
    assert code == 1
    assert "Traceback" in err


def test_an_unforeseen_error_is_no_traceback_either(run, pair, monkeypatch):
    monkeypatch.setattr(comparing, "summarise", lambda *_: 1 / 0)
    code, _, err = run("compare", *pair, "--leading", 8)
    assert code == 1
    assert err.startswith("unexpected ZeroDivisionError")
    assert "--debug" in err
