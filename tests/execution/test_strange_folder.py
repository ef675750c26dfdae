"""A working folder that came with somebody's model: its modules are not imported, by no process of ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import spectralbasis

STANDARD = ("multiprocessing", "numpy", "torch", "typer", "spectralbasis", "socket", "random")
SCRIPT = """
import sys
import mine
from spectralbasis.execution import Crew, open_executor

if __name__ == "__main__":
    with open_executor(**{workers}) as executor:
        crew = Crew(executor)
        crew.start("one", mine.double, 4)
        print(crew.finished())
"""


@pytest.fixture
def strange(tmp_path):
    """A folder of modules that leave a mark when they are imported."""
    folder = tmp_path / "strange"
    folder.mkdir()
    for name in STANDARD:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')\n")
    return folder


def run(arguments, folder):
    own = str(Path(spectralbasis.__file__).parents[1])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment | {"PYTHONPATH": own, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "workers",
    [{"workers": 2}, pytest.param({"ray": "local"}, marks=pytest.mark.xdist_group("ray"))],
    ids=["processes", "ray"],
)
def test_workers_import_the_modules_of_a_script_and_none_of_the_working_folder(workers, strange, tmp_path):
    if "ray" in workers:
        pytest.importorskip("ray")
    (tmp_path / "mine.py").write_text("def double(value):\n    return 2 * value\n")
    (tmp_path / "script.py").write_text(SCRIPT.format(workers=workers))
    done = run([tmp_path / "script.py"], strange)
    assert "[('one', 8)]" in done.stdout, done.stderr[-2000:]
    assert not (tmp_path / "ran").exists()


def test_the_command_line_as_a_module_of_python_imports_none_of_the_working_folder(strange, tmp_path):
    (strange / "spectralbasis.py").unlink()  # which `python -m spectralbasis` asks for by name
    done = run(["-m", "spectralbasis", "--version"], strange)
    assert done.stdout.strip() == spectralbasis.__version__, done.stderr[-2000:]
    assert not (tmp_path / "ran").exists()
