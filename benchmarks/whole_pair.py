"""How long does a whole pair of models take, against what people would run instead?

Run with `python -m benchmarks.whole_pair`; the base is the MiniLM of the extra `minilm`, the finetuned model a folder
given with `--tuned`, else the base with a small update in every matrix. Each tool has a process of its own, with
nothing cached; the tools take turns, and the least time of each counts. Peers that are not installed are left out.
"""

import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.processes import ToolFailed, measure
from benchmarks.results import environment, parse_arguments, write
from spectralbasis.locations import installed_folder

DRAWS = 5
STEP = 0.03
RUNS: dict[str, tuple[str, ...]] = {
    "compare, no null": ("ours", "0"),
    "compare, default null": ("ours", "default"),
    f"compare, {DRAWS} draws": ("ours", str(DRAWS)),
    "script of two full SVDs per matrix": ("script", "0"),
    f"the same script with {DRAWS} draws": ("script", str(DRAWS)),
    "modeldelta, all tensors": ("modeldelta", "all"),
    "modeldelta, the same matrices": ("modeldelta", "matrices"),
    "weightwatcher distances": ("weightwatcher_distances",),
    "weightwatcher analyze, both models": ("weightwatcher_analyze",),
}


def main() -> None:
    arguments = parse_arguments(__doc__, tuned="", repeats=3, only="")
    base = installed_folder("minilm")
    wanted = {name: run for name, run in RUNS.items() if arguments.only in name}
    rows: dict[str, dict[str, Any]] = {name: {"tool": name} for name in wanted}
    with tempfile.TemporaryDirectory() as folder:
        tuned = arguments.tuned or perturbed(Path(str(base)), Path(folder))
        for _ in range(arguments.repeats):
            for name, (tool, *options) in wanted.items():
                if "absent" not in rows[name]:
                    keep(rows[name], tool, [str(base), str(tuned), *options])
    peers = {name: _version(name) for name in ("modeldelta", "weightwatcher")}
    settings = {"k": 64, "draws": DRAWS, "step": None if arguments.tuned else STEP, "repeats": arguments.repeats}
    write("whole_pair", {"settings": settings, "peers": peers, "rows": list(rows.values()), **environment()})


def keep(row: dict[str, Any], tool: str, arguments: list[str]) -> None:
    """Run a tool once more; keep its least times and its largest memory, or why it cannot run."""
    try:
        found = measure(f"benchmarks.tools:{tool}", *arguments)
    except ToolFailed as error:
        row["absent"] = str(error)
        return
    row["matrices"] = found["result"]
    for field in ("seconds", "start_up_seconds"):
        row[field] = min(found[field], row.get(field, found[field]))
    for field in ("peak_bytes", "peak_anonymous_bytes"):
        row[field] = max(found[field], row.get(field, 0))


def perturbed(base: Path, folder: Path) -> Path:
    """A copy of a model with an update in every matrix, half of its energy in 8 directions, half everywhere."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: updated(W, generator) if W.ndim == 2 and W.is_floating_point() else W
        for name, W in load_file(base / "model.safetensors").items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    copyfile(base / "config.json", folder / "config.json")
    return folder


def updated(W: Tensor, generator: torch.Generator) -> Tensor:
    """W with an update of `STEP` of its norm, half of its energy in 8 directions, half everywhere."""
    m, n = W.shape
    few = torch.randn(m, 8, generator=generator) @ torch.randn(8, n, generator=generator)
    many = torch.randn(m, n, generator=generator)
    update = few / few.norm() + many / many.norm()
    return W + STEP * W.norm() * update / update.norm()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
