"""What does an adapter cost where launches and Python count and not arithmetic: small steps and inference, over LoRA's.

Run with `OMP_NUM_THREADS=1 python -m benchmarks.small_steps`, or one model of it with `--sizes tiny`. Methods take
turns in one process; ratios are medians over the rounds. eigentune (`pip install eigentune==0.2.0`) is measured too
where it is installed. Launches are operations that make or read entries, beyond those of the floor, for each adapted
layer.
"""

import gc
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel

from benchmarks.adapters import SHARED, floor, peft
from benchmarks.results import earlier, environment, parse_arguments, write
from spectralbasis import SpectralConfig

RESULTS = "small_steps"
FLOOR, LORA, DIAGONAL, CORE = "floor", "LoRA r=8", "diagonal", "core"
SIZES = {"tiny": (32, 12, 4, 16, 8), "MiniLM": (384, 6, 12, 64, 30)}
"""Width, layers, heads, and the directions of the diagonal and of the core."""
CELLS = {"tiny": ("1x4",), "MiniLM": ("1x16", "8x64")}
VIEWS = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select",
    "split", "detach", "alias", "as_strided", "_reshape_alias", "unbind", "empty", "empty_like", "new_empty",
    "new_empty_strided", "_local_scalar_dense",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def main() -> None:
    arguments = parse_arguments(__doc__, sizes="tiny,MiniLM", repeats=21)
    cells: list[dict[str, Any]] = earlier(RESULTS).get("cells", [])
    for size in arguments.sizes.split(","):
        models = {name: build(_bert(size)) for name, build in methods(*SIZES[size][3:]).items()}
        for shape in CELLS[size]:
            batch = _batch(*map(int, shape.split("x")))
            for kind, make in (("step", _step), ("inference", _inference)):
                cell = {"size": size, "shape": shape, "kind": kind}
                calls = {name: make(model, batch) for name, model in models.items()}
                rows = measure(calls, arguments.repeats, 6 * SIZES[size][1])
                cells = [one for one in cells if {key: one[key] for key in cell} != cell] + [cell | {"methods": rows}]
                write(RESULTS, {"settings": {"repeats": arguments.repeats}, "cells": cells, **environment()})


def methods(diagonal: int, core: int) -> dict[str, Callable[[PreTrainedModel], nn.Module]]:
    """Method by name, with these numbers of directions."""
    found = {
        FLOOR: floor,
        LORA: peft(lambda model: LoraConfig(**SHARED, r=8)),
        DIAGONAL: peft(lambda model: SpectralConfig(**SHARED, coefficients="diagonal", leading=diagonal)),
        CORE: peft(lambda model: SpectralConfig(**SHARED, coefficients="core", leading=core)),
    }
    if find_spec("eigentune") is not None:
        found["eigentune, diagonal"] = _eigentune("diagonal", diagonal)
        found["eigentune, core"] = _eigentune("spectral_core", core)
    return found


def measure(calls: dict[str, Callable[[], None]], repeats: int, layers: int) -> list[dict[str, Any]]:
    """Seconds of each round and launches a layer, for each method."""
    launches = {}
    for name, call in calls.items():
        call()
        call()
        with Launches() as seen:
            call()
        launches[name] = seen.count
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, call in calls.items():
                before = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - before)
    finally:
        gc.enable()
    beyond = {name: (count - launches[FLOOR]) / layers for name, count in launches.items()}
    return [{"method": name, "seconds": times[name], "launches": beyond[name]} for name in calls]


def _bert(size: str) -> PreTrainedModel:
    width, layers, heads, *_ = SIZES[size]
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config).train()


def _eigentune(method: str, rank: int) -> Callable[[PreTrainedModel], nn.Module]:
    def build(model: PreTrainedModel) -> nn.Module:
        peer = import_module("eigentune")
        adapted = peer.get_eigentune_model(
            model, peer.EigenTuneConfig(rank=rank, method=method, exclude_modules=["classifier"])
        )
        model.classifier.requires_grad_(True)
        model.enable_input_require_grads()
        return adapted

    return build


def _batch(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(1000, 30000, (rows, tokens), generator=generator),
        "attention_mask": torch.ones(rows, tokens, dtype=torch.long),
        "labels": torch.randint(0, 2, (rows,), generator=generator),
    }


def _step(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _inference(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    model.eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    @torch.no_grad()
    def call() -> None:
        model(**inputs)

    return call


if __name__ == "__main__":
    main()
