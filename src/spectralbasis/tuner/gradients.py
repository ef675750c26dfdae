"""What a few batches say about the loss at a model's weights: its gradient as it passes each layer, observed once."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectralbasis.errors import InputError
from spectralbasis.tuner.originals import Target

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) → the mean loss of the batch's rows, a number."""
Observer = Callable[[str, Tensor, Tensor], None]
"""(matrix name, inputs x (tokens, n), gradients g with respect to the outputs (tokens, m)); `∂L/∂W` is `Σ gᵀ x`."""


def observe_gradients(
    model: nn.Module, batches: Iterable[Batch], targets: Iterable[Target], observer: Observer, loss: Loss | None = None
) -> int:
    """Run the model forward and backward over batches and show inputs and output gradients of the targets.

    Gradients are those of the summed loss of all rows: of the batch's mean loss, times its rows. Tokens that no
    gradient reaches, as padding, are left out, and so are targets that take no part, as experts may. The model stays as
    it is: nothing of it collects a gradient, dropout is off.

    Args:
        model: a module; tensors of the batches are moved to where its parameters are.
        batches: keyword arguments of the model; an iterable that is read once.
        targets: what is observed; linear layers.
        observer: called once for each target, batch and use of the layer.
        loss: None takes `model(**batch).loss`.

    Returns:
        The number of rows.

    Raises:
        InputError: there is no batch, no loss, a target is no linear layer, or no gradient reaches any.
    """
    seen: set[str] = set()
    observed = {target.name: _linear(target) for target in targets}
    rows = 0
    with _at_rest(model), _hooked(observed, partial(_note, seen, observer)), torch.enable_grad():
        for batch in batches:
            size = _rows(batch)
            total = (loss or _model_loss)(model, _moved(batch, model))
            (total * size).backward()
            rows += size
    _check_seen(rows, seen)
    return rows


def _linear(target: Target) -> nn.Module:
    if not isinstance(target.module, nn.Linear | Conv1D):
        raise InputError(
            f"gradients are observed in linear layers of a base without adapters, but {target.key} is a "
            f"{type(target.module).__name__}; leave it out with exclude_modules, or pass the base model"
        )
    return target.module


def _note(seen: set[str], observer: Observer, name: str, x: Tensor, g: Tensor) -> None:
    x, g = x.detach().flatten(0, -2), g.detach().flatten(0, -2)
    reached = g.any(1)
    seen.add(name)
    observer(name, x[reached], g[reached])


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], note: Observer) -> Iterator[None]:
    handles = [module.register_forward_hook(partial(_watch, name, note)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(name: str, note: Observer, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Forward hook: note the gradient of the output when it comes; a graph starts here where none led here."""
    if not output.requires_grad:
        output = output.detach().requires_grad_().clone()  # no leaf, so that it may be changed in place
    output.register_hook(partial(note, name, args[0]))
    return output


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, with frozen parameters."""
    training = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in training.items():
            module.training = mode


def _model_loss(model: nn.Module, batch: Batch) -> Tensor:
    found = getattr(model(**batch), "loss", None)
    if not isinstance(found, Tensor):
        raise InputError(
            f"{type(model).__name__} gave no loss for a batch of {', '.join(batch)}; "
            "put labels into the batches, or pass loss=a function of (model, batch)"
        )
    return found


def _rows(batch: Batch) -> int:
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), 1)


def _moved(batch: Batch, model: nn.Module) -> Batch:
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _check_seen(rows: int, seen: set[str]) -> None:
    if not rows:
        raise InputError("there is no batch to take gradients on; pass an iterable of the model's keyword arguments")
    if not seen:
        raise InputError("no gradient of the loss reaches a target; check that the loss depends on the target modules")
