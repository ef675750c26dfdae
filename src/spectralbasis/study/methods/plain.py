"""Methods that add nothing to the model and train some of its own parameters: all, the head, or the biases."""

from collections.abc import Callable

from torch import nn

from spectralbasis.errors import InputError
from spectralbasis.study.methods.method import Setup
from spectralbasis.tuner.optimization import in_modules


def full(setup: Setup) -> nn.Module:
    """Everything is trained."""
    return setup.loaded.model


def head(setup: Setup) -> nn.Module:
    """The head alone is trained."""
    return train_head_and(setup, lambda name: False)


def bitfit(setup: Setup) -> nn.Module:
    """The biases of all layers, layer norms among them, and the head (Ben Zaken et al., arXiv 2106.10199).

    Raises:
        InputError: the backbone has no bias.
    """
    loaded = setup.loaded
    names = [name for name, _ in loaded.model.named_parameters() if not in_modules(name, loaded.head)]
    if not any(_is_bias(name) for name in names):
        raise InputError(
            f"{type(loaded.model).__name__} has no biases, which are all that bitfit trains; use lora or spectral"
        )
    return train_head_and(setup, _is_bias)


def train_head_and(setup: Setup, wanted: Callable[[str], bool]) -> nn.Module:
    """The setup's model, of which only the head and the parameters of wanted names require a gradient."""
    model = setup.loaded.model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name) or in_modules(name, setup.loaded.head))
    return model


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"
