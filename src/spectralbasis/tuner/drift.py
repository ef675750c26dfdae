"""`SpectralDriftCallback`: log how far the leading singular directions move while a Trainer trains."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from spectralbasis.basis import SpectralBasis
from spectralbasis.checkpoints import matrix_name
from spectralbasis.errors import InputError
from spectralbasis.linalg import leading_svd, subspace_overlap
from spectralbasis.triplets import Triplets, compute_triplets
from spectralbasis.tuner.layer import Layers, SpectralLayer, check_dense, to_matrix
from spectralbasis.tuner.parameters import ParamWrapper

_AVERAGED = ("overlap_left", "overlap_right", "singular_values", "coefficients")


@dataclass(frozen=True)
class _Tracked:
    """A layer that is watched, with the leading triplets of its matrix before training."""

    name: str
    layer: nn.Module
    base: Triplets


class SpectralDriftCallback(TrainerCallback):
    """Logs how stable the leading singular directions are during training, to wherever the Trainer reports.

    Watches the same few matrices, evenly chosen over the model, of linear layers and convolutions that are trained in
    full or by spectral adapters and have more than `leading` directions. An event costs one decomposition of each; the
    base's triplets come from the disk cache when training begins. Logged:

    - `drift/overlap_left`, `drift/overlap_right`: `φ_k` of the current with the base's leading subspaces, averaged over
      the matrices; `drift/overlap_min`, the smallest of both; `drift/overlap/NAME`, the mean of the two sides;
    - `drift/singular_values`: `‖σ − σ⁰‖ / ‖σ⁰‖` of the leading k, averaged;
    - `drift/coefficients`, of spectral adapters: `‖C‖_F / ‖σ⁰‖`, averaged, the size of the update.

    Examples:
        >>> from spectralbasis import SpectralDriftCallback
        >>> callback = SpectralDriftCallback(leading=8, steps=50)  # for Trainer(callbacks=[callback])
        >>> callback.steps
        50

    Args:
        leading: k, the number of directions whose subspace is compared.
        steps: between two events.
        matrices: how many are watched at most.
        basis: of the model before training, or its file, where training goes on from a checkpoint; None takes the
            weights that the model has when training begins.

    Raises:
        InputError: a value is not positive; when training begins, there is nothing to watch or a weight is not dense.
    """

    def __init__(
        self, *, leading: int = 16, steps: int = 100, matrices: int = 8, basis: SpectralBasis | str | Path | None = None
    ) -> None:
        for name, value in (("leading", leading), ("steps", steps), ("matrices", matrices)):
            if value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, got {value}")
        self.leading, self.steps, self.matrices = leading, steps, matrices
        self.basis = basis if basis is None or isinstance(basis, SpectralBasis) else SpectralBasis.load(str(basis))
        self._tracked: list[_Tracked] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Choose the matrices and find their triplets."""
        if not state.is_world_process_zero:
            return
        found = [(name, layer) for name, layer in _watchable(model) if self._is_wide(name, layer)]
        if not found:
            raise InputError(
                f"no matrix of {type(model).__name__} is trained and has more than leading={self.leading} directions; "
                "pass a smaller leading, or leave out SpectralDriftCallback"
            )
        chosen = torch.linspace(0, len(found) - 1, min(self.matrices, len(found))).round().long().unique().tolist()
        self._tracked = [
            _Tracked(name, layer, self._triplets(name, layer)) for name, layer in (found[i] for i in chosen)
        ]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure and log, every `steps` steps."""
        if not self._tracked or state.global_step % self.steps:
            return
        logs = self.measure()
        if not logs:
            return
        state.log_history.append({**logs, "epoch": state.epoch, "step": state.global_step})
        should_log = control.should_log  # on_log takes it back, and the Trainer's own entry is still to come
        _calling_handler().on_log(args, state, control, logs)
        control.should_log = should_log

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """What is logged, for the weights as they are; matrices that are no longer finite are left out."""
        drifts = {one.name: _drift(one) for one in self._tracked if _current_matrix(one.layer).isfinite().all()}
        if not drifts:
            return {}
        found = {key: [drift[key] for drift in drifts.values() if key in drift] for key in _AVERAGED}
        logs = {f"drift/{key}": sum(values) / len(values) for key, values in found.items() if values}
        logs["drift/overlap_min"] = min(found["overlap_left"] + found["overlap_right"])
        sides = {name: (drift["overlap_left"], drift["overlap_right"]) for name, drift in drifts.items()}
        return logs | {f"drift/overlap/{name}": sum(pair) / 2 for name, pair in sides.items()}

    def _is_wide(self, name: str, layer: nn.Module) -> bool:
        if self.basis is not None:
            return name in self.basis and self.basis[name].k >= self.leading
        weight = _original(layer)
        return min(weight.shape[0], weight[0].numel()) > self.leading

    def _triplets(self, name: str, layer: nn.Module) -> Triplets:
        if self.basis is not None:
            return self.basis[name].leading(self.leading)
        check_dense(name, _original(layer))
        return compute_triplets(to_matrix(_original(layer), _innermost(layer)), self.leading)


def _watchable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers whose matrices training changes; no embedding tables, and no modules that are trained anew."""
    inside: tuple[str, ...] = ()
    for key, module in model.named_modules():
        if key.startswith(inside) and inside:
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside += (f"{key}.",)
        if isinstance(module, SpectralLayer) and not isinstance(module, ParamWrapper):
            watched = not isinstance(module.get_base_layer(), nn.Embedding)
        else:
            watched = isinstance(module, Layers) and not isinstance(module, nn.Embedding)
            watched = watched and module.weight.requires_grad
        if watched:
            yield matrix_name(key), module


def _innermost(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, SpectralLayer) else layer


def _original(layer: Any) -> Tensor:
    return layer.original_weight if isinstance(layer, SpectralLayer) else layer.weight.detach()


def _update(layer: SpectralLayer) -> Tensor:
    """ΔW of the active adapters, in the layout of the weight."""
    return sum((layer.get_delta_weight(name) for name in layer.held_adapters()), torch.zeros(()))


def _current_matrix(layer: nn.Module) -> Tensor:
    weight = _original(layer).float()
    if isinstance(layer, SpectralLayer):
        weight = weight + _update(layer).to(weight.device)
    return to_matrix(weight, _innermost(layer))


def _drift(one: _Tracked) -> dict[str, float]:
    now = leading_svd(_current_matrix(one.layer), one.base.k)
    scale = torch.linalg.norm(one.base.S)
    drift = {
        "overlap_left": subspace_overlap(one.base.U, now.U.cpu()),
        "overlap_right": subspace_overlap(one.base.Vh.T, now.Vh.T.cpu()),
        "singular_values": float(torch.linalg.norm(now.S.cpu() - one.base.S) / scale),
    }
    if isinstance(one.layer, SpectralLayer):
        drift["coefficients"] = float(_update(one.layer).norm() / scale)
    return drift


def _calling_handler() -> CallbackHandler:
    """The handler that is calling a callback: transformers hands callbacks no way to log to the others."""
    frame: Any = sys._getframe(1)
    while not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    return frame.f_locals["self"]
