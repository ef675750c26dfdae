"""The training loop: the Trainer of transformers with two learning rates, a warm-up and a progress bar."""

import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    EarlyStoppingCallback,
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
from spectralbasis.records import read_json
from spectralbasis.training.collators import CausalCollator
from spectralbasis.training.models import LoadedModel
from spectralbasis.training.outcomes import copy_tensors, read_tensors, save_trained, trained_parameters
from spectralbasis.training.tasks import batches
from spectralbasis.tuner.calibration import parameter_groups

LOGGER = logging.getLogger(__name__)
WARM_UP = 0.1
OTHER_SHARE = 1 / 15
"""Learning rate of biases and norms beside spectral coefficients, over theirs: 0.002 at the default, that of bitfit."""
VALIDATIONS = 10
"""How often a training with patience is validated."""
KEPT_EVERY = 60.0
"""Seconds between two states of training that are kept."""
EPOCHS = 3.0
_PRECISION = "ACCELERATE_MIXED_PRECISION"
_LARGEST = 10**9
"""Largest number of steps, epochs or examples: with more, counters overflow before training begins."""


@dataclass(frozen=True)
class Fitted:
    """What training took: `seconds`, and the `steps` that were done, fewer than planned where it stopped early."""

    seconds: float
    steps: int


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
        gradient_accumulation: parts in which each batch goes through the model, to save memory; divides `batch_size`.
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
        packing: put several texts of a batch into one sequence (running text and instructions alone).
        patience: stop after so many validations in a row without a better score, and keep the best; None trains to the
            end. There are ten validations, evenly spaced.

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
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    packing: bool = False
    patience: int | None = None

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
        for name in ("steps", "epochs", "batch_size", "gradient_accumulation", "patience"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= _LARGEST:
                raise InputError(f"{name} must be above 0 and at most {_LARGEST}, got {value}")
        if self.batch_size % self.gradient_accumulation:
            raise InputError(
                f"gradient_accumulation must divide batch_size={self.batch_size}, got {self.gradient_accumulation}"
            )
        if not 0 <= self.seed < 1 << 32:  # what NumPy can be seeded with
            raise InputError(f"seed must be a whole number from 0 to {(1 << 32) - 1}, got {self.seed}")

    def total_steps(self, examples: int) -> int:
        """Number of optimizer steps for so many training examples."""
        if self.steps is not None:
            return self.steps
        return math.ceil((self.epochs or EPOCHS) * math.ceil(examples / self.batch_size))


class _Trainer(Trainer):
    """The Trainer of transformers, which saves the trained numbers alone and scores as `evaluate` does."""

    control: TrainerControl

    def __init__(self, *args: Any, score: Callable[[], dict[str, float]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._score = score

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {f"eval_{name}": value for name, value in self._score().items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
        save_trained(self.model, Path(str(output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._take(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._take(str(self.state.best_model_checkpoint))

    def _take(self, folder: str) -> None:
        copy_tensors(trained_parameters(self.model), read_tensors(Path(folder)), Path(folder))


def fit(
    model: nn.Module,
    loaded: LoadedModel,
    settings: TrainingSettings,
    *,
    description: str,
    progress: bool,
    callbacks: Sequence[TrainerCallback] = (),
    score: Callable[[], dict[str, float]] | None = None,
    kept: Path | None = None,
) -> Fitted:
    """Train what is trainable in `model`, which a method made from `loaded`, in place.

    Args:
        model: whose trainable parameters are trained.
        loaded: with the task.
        settings: of training.
        description: of the progress bar.
        progress: draw the bar on stderr.
        callbacks: of the Trainer.
        score: the metrics of the model on held-out examples; needed for `settings.patience`.
        kept: folder in which the state of training is kept once a minute, and from which a training that was killed
            goes on; removed at the end. None keeps nothing.

    Raises:
        InputError: the loss became infinite or NaN.
    """
    parts = settings.gradient_accumulation * devices()
    if settings.batch_size % parts:
        raise InputError(
            f"batch_size={settings.batch_size} cannot be divided among {parts} parts ({devices()} devices, "
            f"gradient_accumulation={settings.gradient_accumulation}); pass a multiple of {parts}"
        )
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
        other_learning_rate=settings.learning_rate * OTHER_SHARE,
    )
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(WARM_UP * steps), steps)
    bar = cast(Generator[int, None, None], track(range(steps), description, total=steps, enabled=progress))
    collator = packed(model, loaded) if settings.packing else loaded.collator
    if settings.gradient_checkpointing:
        _checkpoint_activations(loaded)
    with tempfile.TemporaryDirectory() as scratch, closing(bar), _own_precision():
        validates: dict[str, Any] = {}
        if settings.patience is not None and score is not None:
            every = max(1, steps // VALIDATIONS)
            validates = {
                "eval_strategy": "steps", "eval_steps": every, "save_strategy": "steps", "save_steps": every,
                "load_best_model_at_end": True, "metric_for_best_model": f"eval_{loaded.task.headline}",
                "greater_is_better": True,
            }  # fmt: skip
            callbacks = [*callbacks, EarlyStoppingCallback(settings.patience)]
        elif kept is not None:
            validates = {"save_strategy": "steps", "save_steps": _LARGEST}
        arguments = TrainingArguments(
            output_dir=str(kept or scratch),
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size // parts,
            gradient_accumulation_steps=settings.gradient_accumulation,
            seed=settings.seed,
            bf16=settings.precision == "bf16",
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            label_names=["labels"],
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            **{"save_strategy": "no", "save_total_limit": 2, **validates},
        )
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            eval_dataset=loaded.task.evaluation,
            data_collator=collator,
            optimizers=(optimizer, schedule),
            callbacks=[*callbacks, _Ticks(bar), *([_Keeps()] if kept is not None else [])],
            score=score or dict,
        )
        if parts > 1 and not isinstance(collator, CausalCollator):
            # Classifiers take the mean over a part, whatever they are told of the whole batch: the Trainer must divide,
            # and must not multiply by the number of processes.
            trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)
        start = last_complete(kept) if kept is not None else None
        if start is not None:
            LOGGER.info("Training goes on after step %s, where it was stopped.", start.rpartition("-")[2])
        with _without_cache(loaded.model):
            measured = trainer.train(resume_from_checkpoint=start).metrics
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else `model` would go on in bf16
        taken = trainer.state.global_step
    if kept is not None:
        shutil.rmtree(kept, ignore_errors=True)
    if not math.isfinite(measured["train_loss"]):
        raise InputError(
            f"training diverged: the loss is {measured['train_loss']}; "
            f"pass a learning rate below {settings.learning_rate:g}"
        )
    return Fitted(float(measured["train_runtime"]), taken)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Without the cache of keys and values, which is for writing: with it, packed texts would see each other."""
    config: Any = model.config
    kept = getattr(config, "use_cache", None)
    if kept is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if kept is not None:
            config.use_cache = kept


def _checkpoint_activations(loaded: LoadedModel) -> None:
    """Have the model compute its activations again in the backward pass; transformers 5 gives it another name.

    Raises:
        InputError: the model cannot.
    """
    name = next(one for one in ("activation", "gradient") if hasattr(loaded.model, f"{one}_checkpointing_enable"))
    enable = getattr(loaded.model, f"{name}_checkpointing_enable")
    try:
        enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    except ValueError as error:
        raise InputError(
            f"{type(loaded.model).__name__} cannot compute its activations again; leave out gradient_checkpointing"
        ) from error


def devices() -> int:
    """Among how many devices a batch is divided: the processes that `accelerate launch` started, or the GPUs."""
    return int(os.environ.get("WORLD_SIZE", "1")) * max(1, torch.cuda.device_count() if "RANK" not in os.environ else 1)


def is_main_process() -> bool:
    """Whether this process writes results: the only one, or the first of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


@torch.no_grad()
def packed(model: nn.Module, loaded: LoadedModel) -> CausalCollator:
    """The collator of a task that packs, once the model is seen to keep packed texts apart.

    Raises:
        InputError: the task is no running text and no instructions, or texts in one sequence see each other.
    """
    plain = loaded.collator
    if not isinstance(plain, CausalCollator):
        raise InputError(
            f"packing is for running text and instructions of models that write text, and {loaded.task.name} is a "
            f"{loaded.task.kind.replace('_', ' ')} task; leave out packing"
        )
    packing = replace(plain, packing=True)
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    rows = [packing([row])["input_ids"][0].to(device) for row in next(batches(loaded.task.train, 2))]
    places = torch.cat([torch.arange(len(row), device=device) for row in rows])
    together = model(input_ids=torch.cat(rows)[None], position_ids=places[None], use_cache=False).logits[0].float()
    alone = torch.cat([model(input_ids=row[None], use_cache=False).logits[0].float() for row in rows])
    model.train(was_training)
    if not torch.allclose(together, alone, atol=1e-2 * float(alone.abs().max())):
        raise InputError(
            f"texts that share a sequence see each other in a {type(loaded.model).__name__}; leave out packing"
        )
    return packing


def last_complete(kept: Path) -> str | None:
    """The last state of training in a folder that was written to its end, which its last file shows."""
    found = []
    for folder in kept.glob("checkpoint-*"):
        with suppress(InputError, ValueError):
            read_json(folder / "trainer_state.json")
            found.append((int(folder.name.rpartition("-")[2]), str(folder)))
    return max(found)[1] if found else None


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
        for _step in range(state.global_step + 1):
            next(self.bar, None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        next(self.bar, None)


class _Keeps(TrainerCallback):
    """Has the state of training saved once a minute."""

    def __init__(self) -> None:
        self.saved = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if time.monotonic() - self.saved >= KEPT_EVERY and args.eval_strategy == "no":
            control.should_save = True
            self.saved = time.monotonic()
