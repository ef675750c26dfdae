"""How much memory does a comparison need, and does it depend on the size of the checkpoints?

Run with `python -m benchmarks.memory --gigabytes 6`: writes a base and a finetuned checkpoint of that size and of a
third of it, shards of bfloat16 with the shapes of a Llama of 7B parameters, to a temporary folder that is removed
afterwards, and compares a subset of their matrices in a process of its own. What a comparison of one tiny matrix needs
is the floor.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.processes import measure
from benchmarks.results import environment, parse_arguments, write

STEP = 0.03
DRAWS = 2
BYTES = torch.bfloat16.itemsize


def main() -> None:
    arguments = parse_arguments(
        __doc__, gigabytes=6.0, width=4096, include="*layers.0.self_attn.q_proj,*layers.0.mlp.gate_proj"
    )
    floor = run(layers=1, width=64, include="*q_proj")
    rows = []
    for gigabytes in (arguments.gigabytes / 3, arguments.gigabytes):
        layers = max(1, round(gigabytes * 1e9 / layer_bytes(arguments.width)))
        rows.append(run(layers, arguments.width, arguments.include))
    settings = {"draws": DRAWS, "width": arguments.width, "include": arguments.include}
    write("memory", {"settings": settings, "floor": floor, "rows": rows, **environment()})


def run(layers: int, width: int, include: str) -> dict[str, Any]:
    """Write a pair of checkpoints, compare the included matrices, and say what that took."""
    with tempfile.TemporaryDirectory() as folder:
        base, tuned = (write_checkpoint(Path(folder) / name, layers, width) for name in ("base", "tuned"))
        size = sum(path.stat().st_size for path in base.iterdir())
        found = measure("benchmarks.memory:comparison", str(base), str(tuned), include)
    return {
        "checkpoint_bytes": size,
        "layers": layers,
        "matrices": found["result"]["matrices"],
        "largest_elements": found["result"]["largest_elements"],
        "seconds": found["seconds"],
        "peak_bytes": found["peak_bytes"],
        "peak_anonymous_bytes": found["peak_anonymous_bytes"],
    }


def comparison(base: str, tuned: str, include: str) -> Callable[[], dict[str, int]]:
    """The tool that is measured."""
    import spectralbasis

    def work() -> dict[str, int]:
        table = spectralbasis.compare(base, [tuned], draws=DRAWS, include=include.split(",")).table
        return {"matrices": int(table["matrix"].nunique()), "largest_elements": int((table["m"] * table["n"]).max())}

    return work


def write_checkpoint(folder: Path, layers: int, width: int) -> Path:
    """A checkpoint with a shard for each layer; the first layer's weights again in all others, which are not read."""
    folder.mkdir()
    located: dict[str, str] = {}
    state = _layer(width, tuned=folder.name == "tuned")
    for layer in range(layers):
        named = {f"model.layers.{layer}.{name}.weight": W for name, W in state.items()}
        shard = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        save_file(named, folder / shard, metadata={"format": "pt"})
        located |= dict.fromkeys(named, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": located}))
    return folder


def layer_bytes(width: int) -> int:
    """Bytes of one layer's weights."""
    return BYTES * sum(m * n for m, n in shapes(width).values())


def _layer(width: int, *, tuned: bool) -> dict[str, Tensor]:
    """One layer's weights, the same at each call; those of the finetuned model have an update."""
    generator = torch.Generator().manual_seed(0)
    return {name: _weights(m, n, tuned, generator) for name, (m, n) in shapes(width).items()}


def _weights(m: int, n: int, tuned: bool, generator: torch.Generator) -> Tensor:
    W = weights(m, n, generator)
    update = torch.randn(m, n, generator=generator)
    return (W + STEP * tuned * update).bfloat16()


def weights(m: int, n: int, generator: torch.Generator) -> Tensor:
    """Independent entries and a head of 128 directions, (m, n)."""
    head = torch.randn(m, 128, generator=generator) * torch.arange(1, 129) ** -0.7
    return torch.randn(m, n, generator=generator) + 3 * head @ torch.randn(128, n, generator=generator)


def shapes(width: int) -> dict[str, tuple[int, int]]:
    """The matrices of one layer of a Llama of this width."""
    inner = width * 43 // 16
    attention = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    return attention | {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}


if __name__ == "__main__":
    main()
