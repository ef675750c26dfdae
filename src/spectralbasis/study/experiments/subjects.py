"""What experiments are made on: a pretrained model, the tasks that it is tuned to, and how long."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from spectralbasis.study.runs import Run


@dataclass(frozen=True)
class Subject:
    """A pretrained model and the tasks that it is tuned to.

    Args:
        name: of the model, in tables.
        model: what `load_model` opens, or the run that makes it.
        tasks: names of tasks.
        settings: of every tuning of it: steps, batch size and the like.
        learning_rates: of full finetuning, from small to large steps.
    """

    name: str
    model: str | Run
    tasks: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = (1e-4,)

    def needs(self) -> dict[str, Run]:
        """What a run on this model needs first."""
        return {"model": self.model} if isinstance(self.model, Run) else {}

    def named(self) -> dict[str, Any]:
        """The setting `model` of a run on it, where no run makes it."""
        return {} if isinstance(self.model, Run) else {"model": self.model}

    def tune(self, task: str, seed: int, *, needs: Mapping[str, Run] | None = None, **settings: Any) -> Run:
        """The run that tunes it to a task; `settings` win over its own."""
        wanted = {**self.named(), "task": task, **self.settings, **settings}
        return Run("tune", wanted, seed, {**self.needs(), **(needs or {})})


def pretrained(architecture: str, task: str, seed: int = 0, **settings: Any) -> Run:
    """The run that trains an architecture from random weights, in full, on a task."""
    untrained = Run("initialise", {"architecture": architecture}, seed)
    return Run("tune", {"task": task, "method": "full", **settings}, seed, {"model": untrained})


GLUE = ("RTE", "MRPC", "CoLA", "STS-B", "SST-2")
_TEXT = {"batch_size": 32, "max_length": 64}

MINILM = Subject(
    "MiniLM", "minilm", GLUE, {**_TEXT, "steps": 120, "train_examples": 2048, "bf16": True}, (3e-5, 2e-4, 1e-3)
)
MINILM_LONGER = replace(MINILM, settings={**MINILM.settings, "batch_size": 16, "steps": 360, "train_examples": 2400})
"""Where scores are compared: in 120 steps no method gets beyond chance on RTE and MRPC. About 3 minutes on a core."""
SMALL_VIT = Subject(
    "ViT (Fashion-MNIST)",
    pretrained("vit-small", "Fashion-MNIST", steps=800, batch_size=64, learning_rate=1e-3),
    ("MNIST", "USPS", "CIFAR-10"),
    {"steps": 200, "batch_size": 64, "train_examples": 4000},
    (1e-4, 5e-4, 3e-3),
)
SMALL_BERT = Subject(
    "BERT (novels)",
    pretrained(
        "bert-small", "novels", steps=1000, batch_size=16, max_length=48, learning_rate=2e-3, train_examples=16000
    ),
    ("Shakespeare", "WikiText-2", "SST-2"),
    {"steps": 120, "batch_size": 16, "max_length": 48, "train_examples": 4000},
    (1e-4, 5e-4, 3e-3),
)
LIMU_BERT = Subject(
    "LIMU-BERT-X",
    Run("initialise", {"architecture": "limu-bert-x"}),
    ("MotionSense",),
    {"steps": 150, "batch_size": 32, "train_examples": 2048},
    (1e-4, 5e-4, 3e-3),
)
"""A pretrained model of motion sensors: one block of six matrices, applied four times."""
ROBERTA = Subject(
    "RoBERTa-base", "FacebookAI/roberta-base", GLUE, {**_TEXT, "max_length": 128, "steps": 2000, "bf16": True},
    (1e-5, 1e-4, 5e-4),
)  # fmt: skip
ROBERTA_LARGE = replace(
    ROBERTA, name="RoBERTa-large", model="FacebookAI/roberta-large", learning_rates=(5e-6, 5e-5, 2e-4)
)
DEBERTA = replace(ROBERTA, name="DeBERTa-v3-base", model="microsoft/deberta-v3-base")
MULTIBERTS = tuple(
    replace(ROBERTA, name=f"MultiBERT {seed}", model=f"google/multiberts-seed_{seed}", tasks=("RTE", "MRPC", "SST-2"))
    for seed in range(5)
)
"""One architecture, pretrained five times on the same text from other weights (Sellam et al., arXiv 2106.16163)."""
VIT_B16 = Subject(
    "ViT-B/16 (ImageNet-21k)", "google/vit-base-patch16-224-in21k", ("CIFAR-100", "SVHN", "DTD", "EuroSAT", "Pets"),
    {"batch_size": 64, "steps": 2000, "bf16": True}, (1e-5, 1e-4, 5e-4),
)  # fmt: skip
DEIT = replace(VIT_B16, name="DeiT-B/16", model="facebook/deit-base-distilled-patch16-224")
CLIP = replace(VIT_B16, name="CLIP ViT-B/32", model="openai/clip-vit-base-patch32")
"""Its image part alone."""
LARGE = (ROBERTA, ROBERTA_LARGE, DEBERTA, *MULTIBERTS, VIT_B16, DEIT, CLIP)
"""From the hub; they want a GPU."""
TINY_VIT = Subject(
    "tiny ViT (digits)",
    pretrained("vit-tiny", "digits", steps=60, batch_size=64, learning_rate=3e-3),
    ("digits-parity", "digits-larger-than-four", "digits-rotated"),
    {"steps": 12, "batch_size": 32},
    (3e-4, 3e-3),
)
"""The smallest that shows something, from built-in data."""
