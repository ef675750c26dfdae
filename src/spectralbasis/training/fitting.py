"""Finetuning that is held back in a part of weight space: the core of the leading directions, or all outside it.

The training loop: transformers' Trainer with two learning rates, a warm-up and a progress bar.
"""

import math
import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from spectralbasis.errors import InputError
from spectralbasis.execution import native_bf16
from spectralbasis.linalg import leading_svd
from spectralbasis.printable import track, warn
from spectralbasis.training.models import LoadedModel
from spectralbasis.tuner.calibration import parameter_groups
from spectralbasis.tuner.layer import Layers, to_matrix, to_weight

Part = Callable[[Tensor, Tensor, Tensor], Tensor]


def core_part(U: Tensor, Vh: Tensor, update: Tensor) -> Tensor:
    """`U Uᵀ ΔW V Vᵀ`, what of an update (m, n) lies in the core of leading directions U (m, k) and Vh (k, n)."""
    return U @ (U.T @ update @ Vh.T) @ Vh


PARTS: dict[str, Part] = {
    "core": core_part,
    "outside": lambda U, Vh, update: update - core_part(U, Vh, update),
    "whole": lambda U, Vh, update: update,
}
"""What is penalised. The core: the leading block is held, as by RPSFT (arXiv 2605.10973). Outside: the update is
concentrated in it. The whole: the control that only makes the step smaller (L2-SP, arXiv 1802.01483)."""


@dataclass(frozen=True)
class _Held:
    """A layer, its matrix before training, and that matrix's leading directions."""

    layer: nn.Module
    W0: Tensor
    U: Tensor
    Vh: Tensor


class UpdatePenalty(TrainerCallback):
    """Adds `strength · ‖part of ΔW‖_F²`, summed over the backbone's matrices, to what a Trainer minimises.

    Its gradient is added before each optimizer step, after clipping, so that the loss that is logged is the task's own.
    Linear layers and convolutions are held, each as one matrix; embedding tables and task heads are free.

    Args:
        part: of `PARTS`.
        strength: factor, from 0.
        leading: number of directions, at most half of a matrix's smaller side.

    Raises:
        InputError: the part is unknown or a number out of range; when training begins, no layer of the model can be
            held.
    """

    def __init__(self, part: str, *, strength: float, leading: int = 16) -> None:
        if part not in PARTS:
            raise InputError(f"part={part!r} is unknown; pass one of {', '.join(PARTS)}")
        if not strength >= 0 or leading < 1:
            raise InputError(f"strength={strength}, leading={leading}; expected a strength from 0 and leading from 1")
        self.part, self.strength, self.leading = PARTS[part], strength, leading
        self._held: list[_Held] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Copy and decompose what is held."""
        tensors = {matrix.cut.tensor for matrix in logical_matrices(open_checkpoint(model))[0].values()}
        self._held = [
            self._hold(layer)
            for name, layer in model.named_modules()
            if isinstance(layer, Layers) and f"{name}.weight" in tensors and layer.weight.requires_grad
        ]
        if not self._held:
            raise InputError(f"{type(model).__name__} has no trained linear layer to hold; leave the penalty out")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add the penalty's gradient to the loss's."""
        for one in self._held:
            weight: Any = one.layer.weight
            if weight.grad is not None:
                weight.grad.add_(to_weight(self.gradient(one), one.layer).to(weight.grad))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let go of the copies."""
        self._held = []

    def gradient(self, one: _Held) -> Tensor:
        """Of the penalty in one matrix: parts are orthogonal projections, so that it is the part itself, doubled."""
        update = to_matrix(_weight(one.layer), one.layer) - one.W0
        return 2 * self.strength * self.part(one.U, one.Vh, update)

    def _hold(self, layer: nn.Module) -> _Held:
        W0 = to_matrix(_weight(layer), layer).clone()
        found = leading_svd(W0, min(self.leading, max(1, min(W0.shape) // 2)))
        return _Held(layer, W0, found.U, found.Vh)


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.weight.detach()
    return weight


WARM_UP = 0.1
EPOCHS = 3.0
_PRECISION = "ACCELERATE_MIXED_PRECISION"


_LARGEST = 10**9
"""Of the numbers that a person gives: with more, counters overflow before training begins."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train: AdamW, without weight decay, with a linear schedule whose first tenth is warm-up.

    Either `steps` or `epochs` is set, or neither for three epochs. `learning_rate` is for the backbone's trained
    parameters. Raises InputError for values that cannot be.
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
                raise InputError(f"{name}={getattr(self, name)} was given; expected a number above 0")
        for name in ("steps", "epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= _LARGEST:
                raise InputError(f"{name}={value} was given; expected a number above 0 and at most {_LARGEST}")
        if not 0 <= self.seed < 1 << 32:  # what NumPy can be seeded with
            raise InputError(f"seed={self.seed} was given; expected a whole number from 0 to {(1 << 32) - 1}")

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
        trainer = Trainer(
            model=model,
            args=_arguments(scratch, steps, settings),
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


def _arguments(scratch: str, steps: int, settings: TrainingSettings) -> TrainingArguments:
    return TrainingArguments(
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


class _Ticks(TrainerCallback):
    """Moves a progress bar on with every step."""

    def __init__(self, bar: Iterator[int]) -> None:
        self.bar = bar

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        next(self.bar)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        next(self.bar, None)
