"""Installs the built wheel in a clean environment and uses it from elsewhere: `python -m tools.wheel_check [WHEEL]`.

`make wheel-check` builds the wheel first. The environment is made with constraints.txt, away from the checkout.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAKE_PAIR = """
import sys, torch
from safetensors.torch import save_file
base = {f"layer.{i}.dense.weight": torch.randn(24, 20) for i in range(6)}
save_file(base, "base.safetensors")
save_file({name: W + 0.1 * torch.randn(24, 20) for name, W in base.items()}, "tuned.safetensors")
"""
WRONGLY_TYPED = """
import spectralbasis as sb
count: int = sb.compare("base", ["tuned"])
file: int = sb.SpectralBasis.load("basis.safetensors")
"""


WITHOUT_OTHERS = """
[mypy]
[mypy-torch.*,transformers.*,peft.*,pandas.*,numpy.*,scipy.*,datasets.*,sklearn.*]
follow_imports = skip
ignore_missing_imports = True
"""


class Environment:
    """A virtual environment in a folder, and commands run in that folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=True)
        self.bin = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")

    def run(self, program: str, *arguments: str | Path, fails: bool = False) -> str:
        """What a program of the environment prints.

        Raises:
            SystemExit: it failed, or succeeded where it should fail.
        """
        outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        command = [str(self.bin / program), *map(str, arguments)]
        print("$", program, *arguments, file=sys.stderr)
        done = subprocess.run(command, cwd=self.folder, env=outside, capture_output=True, text=True, check=False)
        if (done.returncode != 0) != fails:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout


def check(wheel: Path, folder: Path) -> None:
    """Install a wheel and use what a newcomer uses first."""
    environment = Environment(folder)
    constraints = ("--quiet", "--constraint", ROOT / "constraints.txt")
    environment.run("python", "-m", "pip", "install", *constraints, f"{wheel}[tune]", "mypy")
    environment.run("python", "-m", "pip", "check")
    version = wheel.name.split("-")[1]
    expect(environment.run("spectralbasis", "--version").strip() == version, f"--version is not {version}")
    place = environment.run("python", "-c", "import spectralbasis; print(spectralbasis.__file__)").strip()
    expect(str(folder) in place, f"the package comes from {place}, not from the wheel")
    expect((Path(place).parent / "py.typed").is_file(), "py.typed is not there")
    json.loads(environment.run("spectralbasis", "doctor", "--json"))
    environment.run("python", "-c", MAKE_PAIR)
    compare = ("compare", "base.safetensors", "tuned.safetensors", "--leading", "4", "-o", "out", "--json")
    found = json.loads(environment.run("spectralbasis", *compare))
    expect(found["matrices"] == 6, f"{found['matrices']} matrices were compared, not 6")
    expect((folder / "out" / "index.html").stat().st_size > 0, "the page is empty")
    (folder / "typed.py").write_text(WRONGLY_TYPED)
    (folder / "mypy.ini").write_text(WITHOUT_OTHERS)
    told = environment.run("mypy", "typed.py", fails=True)
    for name in ("Comparison", "SpectralBasis"):
        expect(f'expression has type "{name}"' in told, f"mypy does not see the type {name}:\n{told}")
    environment.run("spectralbasis", "quickstart", "-o", "quickstart")
    expect((folder / "quickstart" / "index.html").stat().st_size > 0, "the quickstart wrote no page")


def expect(found: bool, otherwise: str) -> None:
    """End with a message unless something holds."""
    if not found:
        raise SystemExit(otherwise)


def main() -> None:
    wheels = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "dist").glob("*.whl"))
    expect(len(wheels) == 1, f"expected one wheel in {ROOT / 'dist'}, found {len(wheels)}; run make wheel-check")
    with tempfile.TemporaryDirectory() as folder:
        check(wheels[0].absolute(), Path(folder))
    print("the wheel works")


if __name__ == "__main__":
    main()
