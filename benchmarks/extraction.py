"""How fast is the extraction of a LoRA from one large matrix, how much memory does it take, and how near to the best?

Run with `python -m benchmarks.extraction`: writes a base and a finetuned matrix in bfloat16 to a temporary folder and
extracts a LoRA of each rank, each in a process of its own: `extract`, a script of `torch.linalg.svd`, and the
decomposition of `mergekit-extract-lora`, for which mergekit must be installed (`--mergekit no` leaves it out). What the
extraction of a small matrix takes is the floor of memory. The updates are *finetuned* (256 directions that fall as
i^-0.7, and noise), *small* (the same, a fifth as large) and *noise* (no direction stands
out). A part (`--updates noise --ranks 64`) replaces its own.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.processes import ToolFailed, measure
from benchmarks.results import earlier, environment, parse_arguments, write

NAME = "extraction"
TOOLS = {"extract": "benchmarks.extraction:ours", "torch": "benchmarks.extraction:by_torch"}
MERGEKIT = "benchmarks.extraction:by_mergekit"
TENSOR = "layers.0.mlp.up_proj.weight"
Work = Callable[[], dict[str, float]]


def main() -> None:
    arguments = parse_arguments(__doc__, side=4096, updates="finetuned,small,noise", ranks="16,64", mergekit="yes")
    found = earlier(NAME) or {"rows": [], **environment()}
    found["side"] = arguments.side
    with tempfile.TemporaryDirectory() as folder:
        if "floor" not in found:
            found["floor"] = run("extract", Path(folder), "finetuned", 128, 16)["peak_bytes"]
        for update in arguments.updates.split(","):
            for rank in map(int, arguments.ranks.split(",")):
                tools = ["extract", "torch", *(["mergekit"] if arguments.mergekit == "yes" else [])]
                row = {
                    "update": update,
                    "rank": rank,
                    "tools": {tool: run(tool, Path(folder), update, arguments.side, rank) for tool in tools},
                }
                others = [one for one in found["rows"] if (one["update"], one["rank"]) != (update, rank)]
                found["rows"] = sorted([*others, row], key=lambda one: (one["update"], one["rank"]))
                write(NAME, found)


def run(tool: str, folder: Path, update: str, side: int, rank: int) -> dict[str, Any]:
    """One tool on one pair; what it took, and what its LoRA holds."""
    files = [folder / f"{name}-{update}-{side}.safetensors" for name in ("base", "tuned")]
    if not files[0].exists():
        write_pair(files, update, side)
    output = folder / f"out-{tool}-{update}-{side}-{rank}"
    measured = measure(TOOLS.get(tool, MERGEKIT), *map(str, files), str(output), str(rank))
    return {
        "seconds": measured["seconds"],
        "peak_bytes": measured["peak_anonymous_bytes"],
        **measured["result"],
    }


def write_pair(files: list[Path], update: str, side: int) -> None:
    """A base of normal numbers, and the sum of it and an update of 5 % of its norm, or 1 %, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(side, side, generator=generator) / side**0.5
    delta = torch.randn(side, side, generator=generator) / side**0.5
    if update in ("finetuned", "small"):
        count = min(256, side // 2)
        U, V = (torch.linalg.qr(torch.randn(side, count, generator=generator))[0] for _ in range(2))
        delta = 0.1 * delta + 4 * (U * torch.arange(1, count + 1).float().pow(-0.7)) @ V.T
    delta *= (0.01 if update == "small" else 0.05) * W.norm() / delta.norm()
    for file, one in zip(files, (W, W + delta), strict=True):
        save_file({TENSOR: one.bfloat16()}, file)


def ours(base: str, tuned: str, output: str, rank: str) -> Work:
    """`spectralbasis.extract`."""
    from spectralbasis.coefficients import extract

    def work() -> dict[str, float]:
        found = extract(base, tuned, output, rank=int(rank))
        return {"energy": found.energy, "error_bound": found.error_bound}

    return work


def by_torch(base: str, tuned: str, output: str, rank: str) -> Work:
    """A script of `torch.linalg.svd`, as people write it."""
    import peft  # noqa: F401  # so that all start with the same imports

    def work() -> dict[str, float]:
        delta = load_file(tuned)[TENSOR].float() - load_file(base)[TENSOR].float()
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        k = int(rank)
        return saved((S[:k].sqrt()[:, None] * Vh[:k]), U[:, :k] * S[:k].sqrt(), delta, output)

    return work


def by_mergekit(base: str, tuned: str, output: str, rank: str) -> Work:
    """The task of `mergekit-extract-lora` that decomposes an update, on the same files."""
    import peft  # noqa: F401

    try:
        from mergekit.scripts import extract_lora
    except ImportError as error:
        raise ToolFailed(f"mergekit is not installed ({error}); leave it out with --mergekit no") from error

    def work() -> dict[str, float]:
        delta = load_file(tuned)[TENSOR].float() - load_file(base)[TENSOR].float()
        task = extract_lora.TaskVectorDecompositionTask.model_construct(max_rank=int(rank))
        A, B = task.execute(task_vector=delta)
        return saved(A, B, delta, output)

    return work


def saved(A: torch.Tensor, B: torch.Tensor, delta: torch.Tensor, output: str) -> dict[str, float]:
    """Write the factors, and the share of the energy that they hold."""
    os.mkdir(output)  # noqa: PTH102
    save_file({"A": A.contiguous(), "B": B.contiguous()}, f"{output}/adapter_model.safetensors")
    held = ((B.T @ B).double() * (A @ A.T).double()).sum()
    return {"energy": float(held / delta.double().square().sum())}


if __name__ == "__main__":
    main()
