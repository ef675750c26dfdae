"""How long is a training step, and what does it keep for the backward pass, against LoRA and others?

Run with `python -m benchmarks.steps`, in parts with `--sizes MiniLM --precisions float32 --shapes 32x64`: a part
replaces its own entries of benchmarks/results/steps.json. On a GPU, and into steps_gpu.json:
`python -m benchmarks.steps --device cuda --sizes RoBERTa-base,Llama-1B --precisions bfloat16`. A step is forward pass,
backward pass and AdamW on a model of random weights. Methods take turns, so that what disturbs the machine disturbs all
of them; the least time counts.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from benchmarks.adapters import FLOOR, METHODS, fresh_model, kept_for_backward
from benchmarks.results import earlier, environment, parse_arguments, write

RESULTS = {"cpu": "steps", "cuda": "steps_gpu"}
"""Device → name of the results."""


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        sizes="MiniLM,BERT-base",
        precisions="float32,bfloat16",
        shapes="8x64,8x256,32x64,32x256",
        methods=",".join(METHODS),
        seconds=60.0,
        repeats=15,
        device="cpu",
    )
    device, name = arguments.device, RESULTS[arguments.device]
    cells: list[dict[str, Any]] = earlier(name, device).get("cells", [])
    for size in arguments.sizes.split(","):
        models = {method: METHODS[method](fresh_model(size, device)) for method in arguments.methods.split(",")}
        for precision in arguments.precisions.split(","):
            for shape in arguments.shapes.split(","):
                batch, length = map(int, shape.split("x"))
                cell = {"size": size, "precision": precision, "batch": batch, "length": length}
                rows = measure(models, cell, arguments.repeats, arguments.seconds)
                cells = [one for one in cells if {key: one[key] for key in cell} != cell] + [cell | {"methods": rows}]
                settings = {"repeats": arguments.repeats, "seconds": arguments.seconds}
                write(name, {"settings": settings, "cells": cells, **environment(device)})
                print(size, precision, shape, {r["method"]: round(r["seconds"] / rows[0]["seconds"], 3) for r in rows})


def measure(models: dict[str, nn.Module], cell: dict[str, Any], repeats: int, limit: float) -> list[dict[str, Any]]:
    """Least time of a step and bytes kept, for each method; at least 2 rounds, no more after `limit` seconds."""
    steps = {name: make_step(model, cell) for name, model in models.items()}
    rows = [
        {
            "method": name,
            "trained": sum(p.numel() for p in models[name].parameters() if p.requires_grad),
            "kept_bytes": step(count=True),
        }
        for name, step in steps.items()
    ]
    times: dict[str, list[float]] = {name: [] for name in models}
    started = time.perf_counter()
    while len(times[FLOOR]) < 2 or (len(times[FLOOR]) < repeats and time.perf_counter() - started < limit):
        for name, step in steps.items():
            before = _clock()
            step()
            times[name].append(_clock() - before)
    return [row | {"seconds": min(times[row["method"]]), "rounds": len(times[FLOOR])} for row in rows]


def make_step(model: nn.Module, cell: dict[str, Any]) -> Callable[..., int]:
    """A training step of this batch; with `count` it returns the bytes kept for backward."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(1000, 30000, (cell["batch"], cell["length"]), generator=generator).to(device),
        "attention_mask": torch.ones(cell["batch"], cell["length"], dtype=torch.long, device=device),
        "labels": torch.randint(0, 2, (cell["batch"],), generator=generator).to(device),
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    low = cell["precision"] != "float32"

    def step(count: bool = False) -> int:
        counting = kept_for_backward(model) if count else nullcontext([])
        with counting as kept, torch.autocast(device.type, getattr(torch, cell["precision"]), enabled=low):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return kept[0] if count else 0

    return step


def _clock() -> float:
    """Seconds, once an accelerator has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
