"""The usual call of an adapted layer: one adapter on a plain `nn.Linear`, found once and used at each call.

What a call needs is prepared per adapter and checked by identities and versions, so that little Python runs. Without
gradients the changed weight is kept (`kept.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules.module import _has_any_global_hook

from spectralbasis.tuner.autograd import Route, cheapest_step, make_route
from spectralbasis.tuner.factors import Factors
from spectralbasis.tuner.forms import FORMS, Coefficients, Parametrisation
from spectralbasis.tuner.kept import KeptWeights


class PlainUpdate:
    """What a plain linear layer needs of its base and of one adapter at each call, found once.

    Args:
        name: of the adapter.
        modules: of the layer.
    """

    def __init__(self, name: str, modules: dict[str, Any]) -> None:
        self.name = name
        self.base: nn.Linear = modules["base_layer"]
        self.coefficients, self.factors, self.parametrisation = self.parts = _parts(name, modules)
        self.directions, self.unit = self.factors.directions, self.parametrisation.unit
        self.versions = self._versions()
        self.device = self.directions.device.type
        unit = self.unit
        self.direct = self.parametrisation.direct
        """Whether C is the stored numbers but for its unit, which the routes have."""
        self.route_unit = unit if self.direct and unit is not None and bool((unit != 1).any()) else None
        self.U, self.V = self.factors.first(self.parametrisation.k)
        self.S: Tensor | None = None
        self.routes: dict[str, Route] = {}
        self.kept = KeptWeights()

    @staticmethod
    def fits(name: str, modules: dict[str, Any]) -> bool:
        """Whether an adapter and its base are of the kind that this is for."""
        W = modules["base_layer"]._parameters.get("weight")
        coefficients, factors, parametrisation = _parts(name, modules)
        kinds = (type(coefficients), type(factors)) == (Coefficients, Factors)
        kinds = kinds and isinstance(parametrisation, Parametrisation)
        tensors = [W, *(one for one in (factors.directions, parametrisation.unit) if one is not None)]
        return kinds and is_frozen(W) and not any(one.is_inference() or one.is_meta for one in tensors)

    def is_current(self, modules: dict[str, Any]) -> bool:
        """Whether the layer has the same modules, in the same place and dtype."""
        return (
            modules["base_layer"] is self.base
            and _parts(self.name, modules) == self.parts
            and self.factors._buffers["directions"] is self.directions
            and self.parametrisation._buffers["unit"] is self.unit
            and self._versions() == self.versions
        )

    def _versions(self) -> tuple[int, int]:
        return self.directions._version, 0 if self.unit is None else self.unit._version

    def __call__(self, x: Tensor, *, training: bool) -> Tensor | None:
        """The layer's output; None where tensors, autocast or transforms ask for another way.

        Args:
            x: (..., n).
            training: whether the layer is in training mode, in which no weights are kept.
        """
        parameters = self.base._parameters
        W, bias, c = parameters.get("weight"), parameters.get("bias"), self.coefficients._parameters.get("weight")
        if W is None or c is None or not (type(x) in _USUAL and type(c) in _USUAL and is_frozen(W)):
            return None
        if W.shape[1] != x.shape[-1] or torch._C._are_functorch_transforms_active():
            return None
        dtype, autocast = x.dtype, torch.is_autocast_enabled(self.device)
        if autocast and dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(self.device)
        usual = dtype is W.dtype is c.dtype is self.directions.dtype
        # Not where gradients are on but not needed: a loaded adapter gives the very bits of the one that was trained.
        if not (training or torch.is_grad_enabled()) and (usual or autocast):
            weight = self.kept.get(dtype, W, (c,), dtype, lambda: self._formed(W, c, dtype))
            if weight is not None:
                return linear(x, weight, bias)
        if autocast or not usual:
            return None
        flat = x.reshape(-1, x.shape[-1])
        route = self._route(len(flat), W)
        if route is None:
            return None
        output = route.linear(flat, W, bias, c if self.direct else self.parametrisation(c))
        return output if x.ndim == 2 else output.view(*x.shape[:-1], W.shape[0])

    def _route(self, tokens: int, W: Tensor) -> Route | None:
        """The route for this many tokens; None where W is better formed."""
        way = cheapest_step(tokens, *W.shape, singular=True)
        if way in ("input", "output"):
            S = self.factors.singular_values(W, self.parametrisation.k, bias=self.base.bias)
            if S is None:
                way = cheapest_step(tokens, *W.shape, singular=False)
            elif S is not self.S:
                self.S = S
                self.routes.clear()
        if way == "formed":
            return None
        route = self.routes.get(way)
        if route is None:
            with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode could not be trained with
                route = self.routes[way] = make_route(way, self.U, self.V, self.S, self.route_unit)
        return route

    def _formed(self, W: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
        """`W + U C Vᵀ`, rounded once."""
        with torch.autocast(self.device, enabled=False):
            update = FORMS[self.parametrisation.form].left_factor(self.U, self.parametrisation(c).to(self.U.dtype))
            return torch.addmm(W, update, self.V.T).to(dtype)


_USUAL = (Tensor, nn.Parameter)


def _parts(name: str, modules: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Coefficients, factors and parametrisation of an adapter that a layer has or had."""
    return (
        modules["spectral_coefficients"]._modules.get(name),
        modules["spectral_factors"]._modules.get(name),
        modules["spectral_parametrisations"]._modules.get(name),
    )


def is_frozen(weight: Any) -> bool:
    """Whether this is a parameter of 32 bits or more, and not trained."""
    return type(weight) is nn.Parameter and not weight.requires_grad and weight.dtype in (torch.float32, torch.float64)


def is_bare(base: nn.Module | None) -> bool:
    """Whether a layer is an `nn.Linear` that no hook changes."""
    if type(base) is not nn.Linear or _has_any_global_hook():
        return False
    state = vars(base)
    hooked = (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )
    return not hooked
