"""What is adapted in a model: the targeted matrices, with their stable names and their original weights."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from spectralbasis.basis import SpectralBasis
from spectralbasis.checkpoints import matrix_name
from spectralbasis.errors import InputError
from spectralbasis.triplets import Triplets, matrix_hash
from spectralbasis.tuner.factors import BASES
from spectralbasis.tuner.layer import SpectralLayer
from spectralbasis.tuner.matrices import Convolutions, Layers, to_matrix
from spectralbasis.tuner.quantization import backend_of, dequantized

DENSE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """A matrix to adapt.

    Attributes:
        key: of its module in the model.
        name: the stable name of the matrix.
        module: that holds it.
        W: the original weight, (m, n); of a quantized one, what can be had of it.
        known_hash: of the weight before it was quantized, where a basis file tells it.
        also: other keys by which patterns may name it.
        basis_name: how the basis file calls it; empty where it has the same name there.
    """

    key: str
    name: str
    module: nn.Module
    W: Tensor
    known_hash: str | None = None
    also: tuple[str, ...] = ()
    basis_name: str = ""

    @property
    def name_in_basis(self) -> str:
        """How a basis calls the matrix."""
        return self.basis_name or self.name

    @cached_property
    def hash(self) -> str:
        """What identifies the base: the hash of the weight, of a quantized one that of its original where known."""
        return self.known_hash or matrix_hash(self.W)


def find_targets(modules: Mapping[str, nn.Module], basis: str = "pretrained") -> list[Target]:
    """Name the modules and read their weights, as they were before any merge.

    Args:
        modules: key in the model → module.
        basis: as in `SpectralConfig`; a file says what quantized weights were before.

    Raises:
        InputError: a module has no matrix that coefficients can be put on.
    """
    names = unique_names(list(modules))
    file = None if basis in BASES else SpectralBasis.load(basis)
    return [_target(key, names[key], module, file) for key, module in modules.items()]


def unique_names(keys: Sequence[str]) -> dict[str, str]:
    """Stable matrix names; modules that would share one keep their full keys."""
    names = {key: matrix_name(key) for key in keys}
    count = Counter(names.values())
    return {key: name if count[name] == 1 else key for key, name in names.items()}


def check_dense(key: str, weight: Tensor) -> None:
    """Raise InputError unless a weight is at hand, whole and in a dtype that has singular vectors."""
    if hasattr(weight, "full_tensor") or not weight.numel():
        raise InputError(
            f"{key} is sharded over processes, so its singular vectors cannot be found; add the adapter before the "
            "model is sharded (FSDP: before prepare; DeepSpeed: ZeRO stage 2, as stage 3 shards while it loads)"
        )
    if weight.is_meta or weight.dtype not in DENSE_DTYPES:
        raise InputError(
            f"{key} has no dense weight here ({weight.dtype} on {weight.device}), so its singular vectors cannot be "
            "found; load the base unquantized and not on the meta device"
        )


def _target(key: str, name: str, module: nn.Module, file: SpectralBasis | None) -> Target:
    layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    backend = backend_of(layer)
    if backend is not None:
        return _quantized_target(key, name, module, backend, file)
    _check_layer(key, layer)
    weight = module.original_weight if isinstance(module, SpectralLayer) else layer.weight.detach()
    check_dense(key, weight)
    return Target(key, name, module, to_matrix(weight, layer))


def _quantized_target(
    key: str, name: str, module: nn.Module, backend: QuantizationBackend, file: SpectralBasis | None
) -> Target:
    original = file[name] if file is not None and name in file else None
    try:
        # On the CPU, since the dequantized weights of all targets are held at once and may not fit on the device.
        W = (module.original_weight if isinstance(module, SpectralLayer) else dequantized(module, backend)).cpu()
    except InputError as error:
        if original is None:
            raise InputError(f"{key}: {error}") from error
        return Target(key, name, module, (original.U * original.S) @ original.Vh, original.base_hash)
    if original is None or file is None:
        return Target(key, name, module, W)
    _check_quantized_from(original, name, W, file.source)
    return Target(key, name, module, W, original.base_hash)


def _check_quantized_from(original: Triplets, name: str, W: Tensor, source: str) -> None:
    """Raise InputError if the triplets are far from those of W: rounding W moves `u_iᵀ W v_i` by far less than this."""
    found = ((W.float() @ original.Vh.T) * original.U).sum(0) if original.shape == tuple(W.shape) else None
    if found is None or torch.linalg.norm(found - original.S) > torch.linalg.norm(original.S) / 2:
        raise InputError(
            f"the basis file is of {source or 'a model'}, whose weights are not those that {name} was quantized from; "
            "compute it from the checkpoint that was quantized: spectralbasis basis MODEL -o FILE"
        )


def _check_layer(key: str, layer: nn.Module) -> None:
    if not isinstance(layer, Layers):
        raise InputError(
            f"Target module {key} is not supported: it is {type(layer).__name__}, and spectral coefficients take "
            "torch.nn.Linear, Conv1d, Conv2d, Conv3d and Embedding and transformers Conv1D; leave it out of "
            "target_modules"
        )
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise InputError(
            f"{key} belongs to torch.nn.MultiheadAttention, which reads its weight and never calls it, so coefficients "
            "there would change nothing; leave it out with exclude_modules"
        )
    if isinstance(layer, Convolutions) and layer.groups != 1:
        raise InputError(
            f"{key} is a convolution of {layer.groups} groups: each output sees a part of the input, so its weight is "
            "no one matrix; leave it out with exclude_modules"
        )
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise InputError(
            f"{key} has max_norm={layer.max_norm:g}, with which looking up changes the table that the directions are "
            "of; leave it out with exclude_modules"
        )
