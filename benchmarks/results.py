"""Where benchmarks leave what they measured, and on what."""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"


def parse_arguments(description: str | None, **defaults: Any) -> argparse.Namespace:
    """Command-line options with these defaults, each of the default's type."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args()


def environment(device: str = "cpu") -> dict[str, Any]:
    """The machine and the versions that a figure was measured with; an accelerator by its name."""
    packages = ("spectralbasis", "torch", "numpy", "scipy", "transformers", "peft")
    accelerator = {} if device == "cpu" else {"device": torch.cuda.get_device_name(device)}
    return {
        **accelerator,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def write(name: str, content: dict[str, Any]) -> None:
    """Write one benchmark's results as JSON."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def read(name: str) -> dict[str, Any]:
    """Read one benchmark's results."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def earlier(name: str, device: str = "cpu") -> dict[str, Any]:
    """What earlier parts of a run left, so that later parts can be added; empty where there is nothing.

    Raises:
        SystemExit: they were measured under other conditions, so that the times cannot stand in one table.
    """
    if not (FOLDER / f"{name}.json").exists():
        return {}
    found = read(name)
    changed = [key for key, value in environment(device).items() if found.get(key) != value]
    if changed:
        raise SystemExit(
            f"{FOLDER / name}.json was measured with other {', '.join(changed)}; move it away to measure all anew"
        )
    return found
