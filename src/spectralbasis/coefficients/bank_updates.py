"""Makes the layers of a plain model give every row of a batch what its task has trained."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectralbasis.checkpoints import matrix_name
from spectralbasis.coefficients.bank_layout import BankLayout
from spectralbasis.coefficients.bank_routes import Route, cheapest_route
from spectralbasis.errors import InputError
from spectralbasis.tuner.forms import FORMS
from spectralbasis.tuner.originals import Target, find_targets
from spectralbasis.tuner.parametrisation import Parametrisation
from spectralbasis.tuner.preparation import Preparation, prepare


class RowUpdates:
    """Hooks on a model's layers that do nothing, except in a thread that is within `serving`.

    Args:
        model: the base, without adapters.
        layout: what the numbers of a row are.

    Raises:
        BaseMismatchError: the weights of the model are not those that the coefficients were trained on.
        InputError: the model lacks a matrix or a head.
    """

    def __init__(self, model: nn.Module, layout: BankLayout) -> None:
        _check_plain(model)
        self._layout = layout
        self._serving = threading.local()
        self._handles = []
        for name, (module, route) in _matrices(model, layout).items():
            parametrisation = layout.parametrisations[name].to(module.weight.device)
            register = module.register_forward_pre_hook if route.on_input else module.register_forward_hook
            change = self._change_input if route.on_input else self._change_output
            self._handles.append(register(partial(change, name, parametrisation, route)))
        for name in layout.heads:
            self._handles.append(_head(model, layout, name).register_forward_hook(partial(self._apply_head, name)))

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def serving(self, rows: Tensor) -> Iterator[None]:
        """Within this context, passes of this thread belong to `rows`, the numbers of each row's task."""
        self._serving.rows = rows
        try:
            yield
        finally:
            del self._serving.rows

    def _rows(self, name: str, x: Tensor) -> Tensor | None:
        rows = getattr(self._serving, "rows", None)
        if rows is not None and len(x) != len(rows):
            raise InputError(
                f"{name} sees {len(x)} rows where {len(rows)} tasks were named: name one task for each row of the "
                "batch; a model that flattens its batch cannot be served by a bank"
            )
        return rows

    def _change_input(
        self, name: str, parametrisation: Parametrisation, route: Route, module: nn.Module, inputs: Any
    ) -> Any:
        rows = self._rows(name, inputs[0])
        if rows is None:
            return None
        copy = inputs[0].clone(memory_format=torch.contiguous_format)  # other layers read the same input
        return self._add(rows, name, parametrisation, route, inputs[0], copy), *inputs[1:]

    def _change_output(
        self, name: str, parametrisation: Parametrisation, route: Route, module: nn.Module, inputs: Any, output: Tensor
    ) -> Tensor:
        rows = self._rows(name, inputs[0])
        if rows is None:
            return output
        source = output if route.from_output else inputs[0].to(output.dtype)
        return self._add(rows, name, parametrisation, route, source, output.contiguous())

    def _add(
        self, rows: Tensor, name: str, parametrisation: Parametrisation, route: Route, source: Tensor, target: Tensor
    ) -> Tensor:
        """The target, changed in place by the update of each row's C."""
        A, B = route.A.to(target.dtype), route.B.to(target.dtype)
        Z = source.reshape(len(rows), -1, source.shape[-1]) @ A.T
        if route.offset is not None:
            Z -= route.offset.to(target.dtype)
        C = parametrisation(self._layout.part(rows, name, "coefficients").to(target.device)).to(target.dtype)
        target.view(-1, target.shape[-1]).addmm_(FORMS[parametrisation.form].multiply(Z, C).flatten(0, 1), B)
        return target

    def _apply_head(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        rows = self._rows(name, inputs[0])
        if rows is None:
            return output
        weight, bias = (self._layout.part(rows, name, part).to(output) for part in ("weight", "bias"))
        x = inputs[0].to(output.dtype).reshape(len(rows), -1, inputs[0].shape[-1])
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT).reshape(*inputs[0].shape[:-1], -1)


def _check_plain(model: nn.Module) -> None:
    adapted = next((key for key, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if adapted is not None:
        raise InputError(f"{adapted} of the model has adapters; give the bank the plain base that they were trained on")


def _matrices(model: nn.Module, layout: BankLayout) -> dict[str, tuple[Any, Route]]:
    """Matrix name → its module and the route of its updates, all of them checked against the record."""
    hashes = layout.config.base_hashes or {}
    linear = {key: one for key, one in model.named_modules() if isinstance(one, nn.Linear | Conv1D)}
    found = {key: one for key, one in linear.items() if key in hashes or matrix_name(key) in hashes}
    targets = find_targets(found)
    absent = sorted(hashes.keys() - {target.name for target in targets})
    if absent:
        raise InputError(
            f"{type(model).__name__} has no linear layer {absent[0]}, which the tasks change; "
            "give the bank the base that they were trained on"
        )
    prepared = prepare(layout.config, targets, 0)
    return {target.name: (target.module, _route(target, prepared[target.key])) for target in targets}


def _route(target: Target, prepared: Preparation) -> Route:
    U, V = (factor.to(target.W) for factor in prepared.directions)
    return cheapest_route(target.W, U, V, getattr(target.module, "bias", None))


def _head(model: nn.Module, layout: BankLayout, name: str) -> nn.Linear:
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, nn.Linear) or module.in_features != layout.heads[name].inputs:
        found = "nothing" if module is None else f"a {type(module).__name__}"
        raise InputError(
            f"the tasks bring the linear head {name} of {layout.heads[name].inputs} inputs, and "
            f"{type(model).__name__} has {found} of that kind there; a bank serves linear heads alone"
        )
    return module
