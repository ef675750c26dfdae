"""What the faults are tried on: two checkpoints, a small model, and the results of undisturbed runs."""

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.faults.commands import Ended, run

MATRICES = 8
Before = Callable[[], None]


class Bench:
    """A folder with all that the commands read; every try gets a new folder in it to write to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tries = 0

    @contextmanager
    def room(self) -> Iterator[Path]:
        """A new, empty folder, removed afterwards."""
        place = Path(tempfile.mkdtemp(prefix="try-", dir=self.folder))
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    @cached_property
    def pair(self) -> tuple[Path, Path]:
        """A base and a finetuned checkpoint of `MATRICES` matrices, each one file."""
        generator = torch.Generator().manual_seed(0)
        base = {f"layer.{i}.dense.weight": torch.randn(24, 20, generator=generator) for i in range(MATRICES)}
        tuned = {name: W + 0.1 * torch.randn(24, 20, generator=generator) for name, W in base.items()}
        files = self.folder / "base.safetensors", self.folder / "tuned.safetensors"
        for file, state in zip(files, (base, tuned), strict=True):
            save_file(state, file)
        return files

    @cached_property
    def model(self) -> Path:
        """A vision transformer for digits, as random weights leave it."""
        torch.manual_seed(0)
        config = ViTConfig(
            image_size=8, patch_size=4, num_channels=1, hidden_size=16, intermediate_size=24,
            num_hidden_layers=1, num_attention_heads=2,
        )  # fmt: skip
        ViTForImageClassification(config).save_pretrained(self.folder / "model")
        return self.folder / "model"

    def compare(self, output: Path, *options: str | Path, pair: tuple[Path, Path] | None = None, **how: Any) -> Ended:
        """`compare` into a folder; `how` is for `run`."""
        files = pair or self.pair
        return run(["compare", *files, "-o", output, "--leading", "4", "--draws", "2", *options], **_apart(output, how))

    def tune(self, output: Path, *options: str | Path, **how: Any) -> Ended:
        """`tune` into a folder, a few steps on the digits that scikit-learn brings."""
        steps = ("--steps", "3", "--train-examples", "64", "--leading", "2", *options)
        return run(["tune", self.model, "--task", "digits", "-o", output, *steps], **_apart(output, how))

    def study(self, output: Path, *options: str | Path, **how: Any) -> Ended:
        """The smallest experiment into a folder."""
        return run(["study", "stability", "--preset", "quick", "-o", output, *options], **_apart(output, how))

    @cached_property
    def compared(self) -> Path:
        """The folder of an undisturbed comparison."""
        return self._undisturbed("compared", self.compare)

    @cached_property
    def tuned(self) -> Path:
        """The folder of an undisturbed tuning."""
        return self._undisturbed("tuned", self.tune)

    @cached_property
    def studied(self) -> Path:
        """The folder of an undisturbed study."""
        return self._undisturbed("studied", self.study)

    def _undisturbed(self, name: str, command: Callable[[Path], Ended]) -> Path:
        place = self.folder / name / "out"
        ended = command(place)
        if ended.code:
            raise RuntimeError(f"the undisturbed run failed: {ended.stderr}")
        return place

    def is_compared(self, output: Path, skipped: Collection[str] = ()) -> bool:
        """Whether a folder holds the table, findings and page of the undisturbed comparison, with so much skipped."""
        files = ("comparison.parquet", "summary.json", "index.html")
        if not all((output / file).is_file() for file in files):
            return False
        tables = [pd.read_parquet(folder / files[0]) for folder in (output, self.compared)]
        findings = [json.loads((folder / files[1]).read_text()) for folder in (output, self.compared)]
        same = all(findings[0][claim] == findings[1][claim] for claim in ("stability", "coverage"))
        return tables[0].equals(tables[1]) and same and set(findings[0]["skipped"]) == set(skipped)

    def is_tuned(self, output: Path) -> bool:
        """Whether a folder holds the coefficients and the score of the undisturbed tuning."""
        files = ("adapter_model.safetensors", "adapter_config.json", "tuning.json")
        if not all((output / file).is_file() for file in files):
            return False
        numbers = [(folder / files[0]).read_bytes() for folder in (output, self.tuned)]
        scores = [json.loads((folder / files[2]).read_text())["metrics"] for folder in (output, self.tuned)]
        return numbers[0] == numbers[1] and scores[0] == scores[1]

    def is_studied(self, output: Path) -> bool:
        """Whether a folder holds the claims and tables of the undisturbed study."""
        if not all((output / file).is_file() for file in ("results.json", "index.html", "runs.parquet")):
            return False
        found = [json.loads((folder / "results.json").read_text()) for folder in (output, self.studied)]
        return all(
            parts[0][field] == parts[1][field]
            for parts in [[content["experiments"]["stability"] for content in found]]
            for field in ("claims", "tables", "planned", "finished", "failed")
        )


def _apart(output: Path, how: dict[str, Any]) -> dict[str, Any]:
    """With a cache of its own beside the output, so that no try profits from another."""
    environment = {"SPECTRALBASIS_CACHE": str(output.parent / "cache"), **how.pop("environment", {})}
    return {**how, "environment": environment}
