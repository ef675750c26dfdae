"""How many times faster is `compare` than a script of full decompositions, by the width of the model?

Run with `python -m benchmarks.pairs`, or some widths with `--widths 384,768`: they replace their own entries of
benchmarks/results/pairs.json. The matrices are random, with the singular values of a query matrix of the MiniLM of the
extra `minilm`, stretched to their size; the update is 3 % of their norm. Each tool has a process of its own with
nothing cached; the tools take turns, and the least time of each counts. Processor time is measured, on one thread
(OMP_NUM_THREADS=1), because it is the same on a busy machine.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.matrices import stretched
from benchmarks.processes import measure
from benchmarks.results import earlier, environment, parse_arguments, write
from benchmarks.whole_pair import updated
from spectralbasis.checkpoints.opening import installed_folder

NAME = "pairs"
K = 64
SHAPES = {
    384: [(384, 384)] * 8 + [(1536, 384), (384, 1536)] * 2,
    768: [(768, 768)] * 4 + [(3072, 768), (768, 3072)],
    2048: [(2048, 2048)] * 2,
    4096: [(4096, 4096)],
}
"""Width → its matrices: whole layers of a transformer where that is quick, else square ones."""
SPECTRUM_OF = "encoder.layer.2.attention.self.query.weight"
TOOLS = {"without": ("ours", "0"), "null": ("ours", "default"), "script": ("script", "0")}


def main() -> None:
    arguments = parse_arguments(__doc__, widths=",".join(map(str, SHAPES)), repeats=3, tools=",".join(TOOLS))
    done: list[dict[str, Any]] = earlier(NAME).get("rows", [])
    values = spectrum()
    for width in map(int, arguments.widths.split(",")):
        with TemporaryDirectory() as folder:
            base, tuned = write_pair(Path(folder), SHAPES[width], values)
            row: dict[str, Any] = {"width": width, "matrices": len(SHAPES[width]), "seconds": {}}
            repeats = min(arguments.repeats, 2) if width > 2048 else arguments.repeats
            for _ in range(repeats):
                for tool in arguments.tools.split(","):
                    name, draws = TOOLS[tool]
                    seconds = measure(f"benchmarks.tools:{name}", str(base), str(tuned), draws)["processor_seconds"]
                    row["seconds"][tool] = min(seconds, row["seconds"].get(tool, seconds))
        done = sorted([one for one in done if one["width"] != width] + [row], key=lambda one: int(one["width"]))
        write(NAME, {"settings": {"k": K, "repeats": repeats}, "rows": done, **environment()})
        print(row, flush=True)


def spectrum() -> Tensor:
    """All singular values of a matrix of MiniLM, (384,), float64."""
    with safe_open(f"{installed_folder('minilm')}/model.safetensors", "pt") as weights:
        return torch.linalg.svdvals(weights.get_tensor(SPECTRUM_OF).double())


def write_pair(folder: Path, shapes: list[tuple[int, int]], values: Tensor) -> tuple[Path, Path]:
    """Two folders with a checkpoint of these matrices before and after an update."""
    generator = torch.Generator().manual_seed(0)
    base = {
        f"encoder.layer.{number}.dense.weight": stretched(m, n, values, seed=number)
        for number, (m, n) in enumerate(shapes)
    }
    tuned = {name: updated(W, generator) for name, W in base.items()}
    for name, state in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder / "base", folder / "tuned"


if __name__ == "__main__":
    main()
