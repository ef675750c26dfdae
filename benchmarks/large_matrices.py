"""What does it take to measure a matrix in row blocks read from disk, in memory and in time, and what does it change?

Run with `python -m benchmarks.large_matrices`: writes a base and a finetuned matrix of each shape in bfloat16 to a
temporary folder, and compares them whole and under a memory budget, each in a process of its own. What a comparison of
one small matrix needs is the floor. A part of the shapes (`--shapes 2048x8192`) replaces its own entries.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.memory import STEP
from benchmarks.processes import measure
from benchmarks.results import earlier, environment, parse_arguments, write
from spectralbasis.comparison.measuring import row_block_memory
from spectralbasis.sizes import format_size

NAME = "large_matrices"
DRAWS = 2
K = 64
FIGURES = ("value", "null_mean", "null_std")


def main() -> None:
    arguments = parse_arguments(__doc__, shapes="8192x2048,2048x8192,16384x4096,4096x16384")
    found = earlier(NAME) or {"settings": {"draws": DRAWS, "k": K}, "rows": [], **environment()}
    found.setdefault("floor", run((256, 128), None)["peak_anonymous_bytes"])
    for text in arguments.shapes.split(","):
        m, n = map(int, text.split("x"))
        row = in_both_ways((m, n), found["floor"])
        found["rows"] = sorted(
            [*(other for other in found["rows"] if other["shape"] != [m, n]), row],
            key=lambda row: (row["shape"][0] * row["shape"][1], row["shape"]),
        )
        write(NAME, found)


def in_both_ways(shape: tuple[int, int], floor: int) -> dict[str, Any]:
    """One matrix measured whole, and in row blocks under the least budget that it takes."""
    budget = row_block_memory(*shape, K)
    whole, blocks = run(shape, None), run(shape, format_size(budget, up=True))
    differences = {name: whole["table"][name] - blocks["table"][name] for name in FIGURES}
    return {
        "shape": list(shape),
        "budget": budget,
        **{
            way: {
                "peak_bytes": found["peak_anonymous_bytes"] - floor,
                "seconds": found["seconds"],
                "processor_seconds": found["result"]["processor_seconds"],
                "solver": found["result"]["solver"],
                "bound": found["result"]["subspace_error_bound"],
            }
            for way, found in (("whole", whole), ("blocks", blocks))
        },
        "rows_in_table": len(whole["table"]),
        "same_hashes": whole["result"]["base_hash"] == blocks["result"]["base_hash"],
        "largest_difference": {name: float(np.nanmax(np.abs(found))) for name, found in differences.items()},
    }


def run(shape: tuple[int, int], budget: str | None) -> dict[str, Any]:
    """Write a pair, compare it in a process of its own, and say what that took."""
    with tempfile.TemporaryDirectory() as folder:
        base, tuned = (write_matrix(Path(folder) / f"{name}.safetensors", shape) for name in ("base", "tuned"))
        found = measure("benchmarks.large_matrices:comparison", str(base), str(tuned), budget or "", folder)
        return found | {"table": pd.read_parquet(Path(folder) / "comparison.parquet")}


def comparison(base: str, tuned: str, budget: str, output: str) -> Callable[[], dict[str, Any]]:
    """The tool that is measured."""
    import spectralbasis

    def work() -> dict[str, Any]:
        started = time.process_time()
        limit = budget or 10**15
        found = spectralbasis.compare(base, [tuned], leading=K, draws=DRAWS, memory_budget=limit, output=output)
        seconds = time.process_time() - started
        return {"processor_seconds": seconds, "rows": len(found.table), **certificate()}

    return work


def certificate() -> dict[str, Any]:
    """What is known of the base's triplets, from the cache of this process."""
    (file,) = (Path(os.environ["SPECTRALBASIS_CACHE"]) / "triplets").rglob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        facts = json.loads(opened.metadata()["triplets"])
    return {name: facts[name] for name in ("solver", "subspace_error_bound", "base_hash")}


def write_matrix(path: Path, shape: tuple[int, int]) -> Path:
    """Independent entries and a head of 128 directions; a finetuned one has an update of independent entries."""
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(side, 128, generator=generator) for side in shape)
    head = left * 3 * torch.arange(1, 129) ** -0.7
    W = torch.randn(m, n, generator=generator).addmm_(head, right.T)
    if path.stem == "tuned":
        W += STEP * torch.randn(m, n, generator=generator)
    save_file({"layer.0.dense.weight": W.bfloat16()}, path)
    return path


if __name__ == "__main__":
    main()
