"""The commands and the script of the guide on a user's own data run as printed."""

import csv
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "own-data.md"
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
COMMANDS = [
    line for kind, text in BLOCKS if not kind for line in text.splitlines() if line.startswith("spectralbasis ")
]
SCRIPTS = [text for kind, text in BLOCKS if kind == "python"]


def test_the_guide_has_three_commands_and_a_script():
    assert [command.split()[1] for command in COMMANDS] == ["tune", "evaluate", "predict"]
    assert len(SCRIPTS) == 1


@pytest.mark.slow
def test_the_commands_and_the_script_run_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [("a moving film, and very funny", "liked"), ("two hours of nothing", "hated")]
    for name, count in (("reviews", 20), ("more-reviews", 3)):
        with Path(f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows * count])
    Path("new.csv").write_text("id,text\n7,a funny film\n8,nothing moving\n")
    said = []
    for command in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-m", *shlex.split(command)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
    printed = next(text for kind, text in BLOCKS if not kind and "is read as" in text)
    assert printed in said[0]
    with Path("predicted.csv").open(newline="") as file:
        predicted = list(csv.DictReader(file))
    assert [(row["id"], row["prediction"] in ("liked", "hated")) for row in predicted] == [("7", True), ("8", True)]
    Path("script.py").write_text(SCRIPTS[0])
    runpy.run_path("script.py", run_name="__main__")
    assert capsys.readouterr().out.count("two hours of nothing") == 1
