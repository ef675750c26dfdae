"""What an optimizer is given: coefficients and heads learn at different rates."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from spectralbasis.errors import InputError


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    head_learning_rate: float | None = None,
    head: Iterable[str] = ("modules_to_save",),
) -> list[dict[str, Any]]:
    """The trainable parameters as groups for any torch optimizer, or for `Trainer(optimizers=(optimizer, None))`.

    Args:
        model: whose parameters are trained where they require a gradient.
        learning_rate: of everything outside of the head, such as spectral coefficients.
        head_learning_rate: of the head; None is `learning_rate`.
        head: names of the modules that make up the head; by default what PEFT retrains as `modules_to_save`.

    Returns:
        One group or two, each with `params` and `lr`.

    Raises:
        InputError: nothing is trainable.
    """
    names = tuple(head)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise InputError(
            f"{type(model).__name__} has no parameter that requires a gradient; add an adapter, or unfreeze"
        )
    rates = {False: learning_rate, True: learning_rate if head_learning_rate is None else head_learning_rate}
    groups = (
        {"params": [parameter for name, parameter in trained if in_modules(name, names) == in_head], "lr": rate}
        for in_head, rate in rates.items()
    )
    return [group for group in groups if group["params"]]


def in_modules(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter belongs to one of the modules, whatever wrapper's prefix stands before its name."""
    return any(f".{module}." in f".{name}" for module in modules)
