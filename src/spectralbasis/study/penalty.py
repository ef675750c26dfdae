"""Finetuning with a penalty on a part of weight space: the leading core, or everything outside it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from spectralbasis.errors import InputError
from spectralbasis.linalg import leading_svd
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
            raise InputError(
                f"strength must be at least 0 and leading at least 1, got strength={strength} and leading={leading}"
            )
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
        """Release the copies."""
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
