"""Which numbers of a bank's row belong to which matrix and which head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod

import torch
from torch import Tensor

from spectralbasis.errors import InputError
from spectralbasis.tuner.config import SpectralConfig

_PARAMETERS = ("weight", "bias")


@dataclass(frozen=True)
class HeadShape:
    """A linear layer of which every task has its own: outputs of the largest task, and inputs."""

    outputs: int
    inputs: int


class BankLayout:
    """The row of numbers that stands for one task: the coefficients of every matrix, then its heads.

    A head has the outputs of the task that has most; those that a task has not are -inf, so that no softmax and no
    argmax finds them. A head without bias is given one of zero, since that is where the -inf stands.

    Args:
        config: what the coefficients are.
        heads: module name → shape.

    Attributes:
        parametrisations: matrix name → what makes C of its numbers.
        shapes: matrix name → shape of its numbers.
        width: how many numbers a task has.
    """

    def __init__(self, config: SpectralConfig, heads: Mapping[str, HeadShape]) -> None:
        self.config = config
        self.heads = dict(heads)
        self.parametrisations = {name: config.parametrisation(name) for name in config.ranks or {}}
        self.shapes = {name: one.shape for name, one in self.parametrisations.items()}
        shapes: dict[tuple[str, str], tuple[int, ...]] = {
            (name, "coefficients"): shape for name, shape in self.shapes.items()
        }
        for name, head in heads.items():
            shapes |= {(name, "weight"): (head.outputs, head.inputs), (name, "bias"): (head.outputs,)}
        self._places: dict[tuple[str, str], tuple[int, tuple[int, ...]]] = {}
        self.width = 0
        for key, shape in shapes.items():
            self._places[key] = (self.width, shape)
            self.width += prod(shape)

    def part(self, rows: Tensor, name: str, parameter: str) -> Tensor:
        """A view of one matrix's `coefficients`, or of a head's `weight` or `bias`, in rows of shape (..., width)."""
        start, shape = self._places[name, parameter]
        return rows[..., start : start + prod(shape)].unflatten(-1, shape)

    def pack(self, stored: Mapping[str, Tensor], others: Mapping[str, Tensor], task: str, dtype: torch.dtype) -> Tensor:
        """The row of a task, (width,).

        Args:
            stored: matrix name → numbers as an adapter stores them; a matrix that is absent is not changed.
            others: parameter name → tensor of a head.
            task: how a person names it.
            dtype: of the row.

        Raises:
            InputError: the heads are not those of this bank, or a number is not finite in this dtype.
        """
        row = torch.zeros(self.width, dtype=dtype)
        for name, numbers in stored.items():
            self.part(row, name, "coefficients").copy_(numbers)
        given = dict(others)
        labels = {
            name: self._pack_head(row, name, given.pop(f"{name}.weight", None), given.pop(f"{name}.bias", None), task)
            for name in self.heads
        }
        if given:
            raise InputError(f"{task} brings {next(iter(given))}, which other tasks of the bank do not; leave it out")
        if not bool(torch.isfinite(row).all()):
            raise InputError(f"{task} holds numbers that are not finite in {dtype}, so it cannot be served")
        for name, count in labels.items():
            self.part(row, name, "bias")[count:] = -inf
        return row

    def _pack_head(self, row: Tensor, name: str, weight: Tensor | None, bias: Tensor | None, task: str) -> int:
        """Enter a head into a row; gives its number of labels."""
        head = self.heads[name]
        if weight is None or weight.ndim != 2 or weight.shape[1] != head.inputs:
            raise InputError(
                f"{task} brings no head {name} of {head.inputs} inputs, and every task of the bank has one"
            )
        labels = len(weight)
        if labels > head.outputs or (bias is not None and bias.shape != (labels,)):
            raise InputError(
                f"{task} has {labels} labels in {name} where the bank holds {head.outputs} at most; "
                f"make the bank with labels={labels}"
            )
        self.part(row, name, "weight")[:labels] = weight
        if bias is not None:
            self.part(row, name, "bias")[:labels] = bias
        return labels

    def defect(self, rows: Tensor) -> tuple[int, str] | None:
        """The first of these rows, (rows, width), that no adapter can have given, and what is wrong with it."""
        for (name, parameter), (start, shape) in self._places.items():
            part = rows[:, start : start + prod(shape)]
            sound = torch.isfinite(part)
            if parameter == "bias":
                absent = part == -inf
                sound |= absent
                # Labels come first, and there is one or more.
                sound[:, 0] &= ~absent[:, 0]
                sound[:, 1:] &= absent[:, 1:] | ~absent[:, :-1]
            wrong = (~sound.all(1)).nonzero()
            if len(wrong):
                kind = "no label, a gap between labels or a number" if parameter == "bias" else "a number"
                return int(wrong[0]), f"has {kind} that is not finite among the {parameter} of {name}"
        return None

    def labels(self, row: Tensor) -> dict[str, int]:
        """How many outputs each head has in a task's row."""
        return {name: int((self.part(row, name, "bias") != -inf).sum()) for name in self.heads}


def head_shapes(others: Sequence[Mapping[str, Sequence[int]]], labels: int | None = None) -> dict[str, HeadShape]:
    """The heads that can hold those of several tasks.

    Args:
        others: of each task, parameter name → shape.
        labels: outputs to leave room for.

    Raises:
        InputError: a parameter is no weight or bias, or is one of a layer that is not linear.
    """
    found: dict[str, HeadShape] = {}
    for task in others:
        for parameter, shape in task.items():
            name, _, kind = parameter.rpartition(".")
            if kind not in _PARAMETERS or len(task.get(f"{name}.weight", ())) != 2:
                raise InputError(
                    f"an adapter brings {parameter}, and a bank serves linear heads alone; "
                    "train with bias='none' and modules_to_save of linear layers, or serve this task by itself"
                )
            if kind == "weight":
                known = found.get(name, HeadShape(labels or 1, shape[1]))
                found[name] = HeadShape(max(known.outputs, shape[0]), shape[1])
    return found
