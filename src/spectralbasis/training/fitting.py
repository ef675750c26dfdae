"""The training loop: the Trainer of transformers with two learning rates, a warm-up and a progress bar."""

import math
import os
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from spectralbasis.errors import InputError
from spectralbasis.execution import native_bf16
from spectralbasis.printable import track, warn
from spectralbasis.training.models import LoadedModel
from spectralbasis.tuner.calibration import parameter_groups

WARM_UP = 0.1
EPOCHS = 3.0
_PRECISION = "ACCELERATE_MIXED_PRECISION"
_LARGEST = 10**9
"""Largest number of steps, epochs or examples: with more, counters overflow before training begins."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train: AdamW, without weight decay, with a linear schedule whose first tenth is warm-up.

    Args:
        learning_rate: of the backbone's trained parameters, above 0.
        head_learning_rate: of the head, above 0.
        steps: optimizer steps; not together with `epochs`.
        epochs: passes over the training examples; three where neither is given.
        batch_size: examples in each step.
        max_length: tokens at which texts are cut.
        seed: of the head, the order of examples and dropout, from 0.
        train_examples: use only so many; None uses all.
        bf16: train under bfloat16 autocast, where that is native.

    Raises:
        InputError: a value is out of range.
    """

    learning_rate: float
    head_learning_rate: float
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    max_length: int = 64
    seed: int = 0
    train_examples: int | None = None
    bf16: bool = False

    @property
    def precision(self) -> str:
        """Of the products in training: "bf16" where it was asked for and is native, else "float32"."""
        return "bf16" if self.bf16 and native_bf16() else "float32"

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise InputError(f"both steps={self.steps} and epochs={self.epochs:g} were given; give one of them")
        for name in ("learning_rate", "head_learning_rate"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("steps", "epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= _LARGEST:
                raise InputError(f"{name} must be above 0 and at most {_LARGEST}, got {value}")
        if not 0 <= self.seed < 1 << 32:  # what NumPy can be seeded with
            raise InputError(f"seed must be a whole number from 0 to {(1 << 32) - 1}, got {self.seed}")

    def total_steps(self, examples: int) -> int:
        """Number of optimizer steps for so many training examples."""
        if self.steps is not None:
            return self.steps
        return math.ceil((self.epochs or EPOCHS) * math.ceil(examples / self.batch_size))


def fit(
    model: nn.Module,
    loaded: LoadedModel,
    settings: TrainingSettings,
    *,
    description: str,
    progress: bool,
    callbacks: Sequence[TrainerCallback] = (),
) -> float:
    """Train what is trainable in `model`, which a method made from `loaded`, in place; returns the seconds it took.

    Raises:
        InputError: the loss became infinite or NaN.
    """
    if settings.bf16 and settings.precision != "bf16":
        warn(
            "bf16 was asked for, but this processor would have to emulate it, which is slower; training in float32",
            stacklevel=2,
        )
    examples = loaded.task.train
    steps = settings.total_steps(len(examples))
    groups = parameter_groups(
        model,
        learning_rate=settings.learning_rate,
        head_learning_rate=settings.head_learning_rate,
        head=loaded.head,
    )
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(WARM_UP * steps), steps)
    bar = cast(Generator[int, None, None], track(range(steps), description, total=steps, enabled=progress))
    with tempfile.TemporaryDirectory() as scratch, closing(bar), _own_precision():
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            seed=settings.seed,
            bf16=settings.precision == "bf16",
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            label_names=["labels"],
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=loaded.collator,
            optimizers=(optimizer, schedule),
            callbacks=[*callbacks, _Ticks(bar)],
        )
        trainer.remove_callback(PrinterCallback)
        measured = trainer.train().metrics
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else `model` would go on in bf16
    if not math.isfinite(measured["train_loss"]):
        raise InputError(
            f"training diverged: the loss is {measured['train_loss']}; "
            f"pass a learning rate below {settings.learning_rate:g}"
        )
    return float(measured["train_runtime"])


@contextmanager
def _own_precision() -> Iterator[None]:
    """Without the precision of an earlier training in this process, which transformers leaves in the environment."""
    kept = os.environ.pop(_PRECISION, None)
    try:
        yield
    finally:
        os.environ.pop(_PRECISION, None)
        if kept is not None:
            os.environ[_PRECISION] = kept


class _Ticks(TrainerCallback):
    """Advances a progress bar with every step."""

    def __init__(self, bar: Iterator[int]) -> None:
        self.bar = bar

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        next(self.bar)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        next(self.bar, None)
