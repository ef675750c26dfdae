"""Spectral adapters as checkpoints: `W + U C Vᵀ`, with the directions found as the tuner finds them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectralbasis.checkpoints import Adapter, AdapterMethod, Checkpoint, matrix_name, register_adapter_method
from spectralbasis.checkpoints.adapter import Edit, adapted_name
from spectralbasis.errors import InputError
from spectralbasis.triplets import matrix_hash
from spectralbasis.tuner.config import SpectralConfig
from spectralbasis.tuner.forms import FORMS
from spectralbasis.tuner.originals import DENSE_DTYPES, Target
from spectralbasis.tuner.preparation import Preparation, prepare
from spectralbasis.tuner.record import RECORD
from spectralbasis.tuner.registration import METHOD

_COEFFICIENTS = ".spectral_coefficients"


@dataclass(frozen=True)
class SpectralEdit:
    """Adds `U C Vᵀ` to one tensor of the base, which is hashed and decomposed when called.

    Attributes:
        tensors: the adapter's.
        coefficients: name of C among them.
        config: the adapter's, with the hash, the rank and the probes of this matrix only.
        matrix: name of the matrix in the config.
    """

    tensors: Checkpoint
    coefficients: str
    config: SpectralConfig
    matrix: str

    def __call__(self, weight: Tensor) -> Tensor:
        """The tuned tensor in the layout of the base's, in float32 or wider.

        Raises:
            BaseMismatchError: the weight, or its directions, are not those that the adapter was trained on.
        """
        if self.transposed(weight):
            return self._tuned(weight.T).T.contiguous()
        return self._tuned(weight.flatten(1)).reshape(weight.shape)

    def check(self, weight: Tensor) -> None:
        """Raise BaseMismatchError unless this is the weight that the adapter was trained on."""
        self._prepare(weight.T if self.transposed(weight) else weight.flatten(1))

    def transposed(self, weight: Tensor) -> bool:
        """Whether the weight is stored as (in, out), as Conv1D does, which only its hash tells for certain."""
        expected = (self.config.base_hashes or {})[self.matrix]
        return weight.ndim == 2 and matrix_hash(weight) != expected and matrix_hash(weight.T) == expected

    def _tuned(self, W: Tensor) -> Tensor:
        C, U, V, form = self._terms(W)
        return W.to(C.dtype) + FORMS[form].left_factor(U, C) @ V.T

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, k), C (k, k) and V (n, k) of `ΔW = U C Vᵀ`, in float32 or wider, m being the outputs.

        Raises:
            BaseMismatchError: see `__call__`.
        """
        C, U, V, form = self._terms(weight.T if self.transposed(weight) else weight.flatten(1))
        return U, FORMS[form].left_factor(torch.eye(U.shape[1], dtype=U.dtype), C), V

    def _terms(self, W: Tensor) -> tuple[Tensor, Tensor, Tensor, str]:
        """C, U (m, k), V (n, k) and the form of C, all in float32 or wider."""
        prepared = self._prepare(W)
        parametrisation, dtype = prepared.parametrisation, torch.promote_types(W.dtype, torch.float32)
        C = parametrisation(self.tensors.read(self.coefficients).to(dtype))
        U, V = prepared.directions
        return C, U.to(dtype), V.to(dtype), parametrisation.form

    def _prepare(self, W: Tensor) -> Preparation:
        target = Target(self.matrix, self.matrix, nn.Module(), W)
        return prepare(self.config, [target], W.numel())[self.matrix]


def spectral_edits(adapter: Adapter) -> Mapping[str, Edit]:
    """The edits of a spectral adapter, by tensor of the base.

    The smallest adapted matrix is checked here, so that a wrong base is found before anything is computed.

    Raises:
        BaseMismatchError: the base is not the one that the adapter was trained on.
        InputError: the config is damaged, or does not fit the coefficients or the base.
    """
    config = _config(adapter)
    edits = {}
    for stored in adapter.tensors.names():
        module, found, _ = adapted_name(stored).partition(_COEFFICIENTS)
        if found:
            tensor = adapter.base_tensor(f"{module}.weight")
            edits[tensor] = _edit(adapter, config, module, stored, tensor)
    if edits:
        smallest = min(edits, key=lambda tensor: prod(adapter.base.shape(tensor)))
        edits[smallest].check(adapter.base.read(smallest))
    return edits


def check_layers_alone(config: SpectralConfig, folder: Path) -> None:
    """Raise InputError for an adapter of parameters, whose numbers are of several matrices in one tensor."""
    if config.target_parameters:
        raise InputError(
            f"{folder} adapts stacks of experts, target_parameters={sorted(config.target_parameters)}, which PEFT "
            "alone reads; for the tuned model's weights: PeftModel.from_pretrained(base, folder).merge_and_unload()"
        )


def _config(adapter: Adapter) -> SpectralConfig:
    try:
        config = SpectralConfig.from_pretrained(str(adapter.folder))
        check_layers_alone(config, adapter.folder)
        return config
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{adapter.folder}: adapter_config.json cannot be used ({error}); restore it") from error


def _edit(adapter: Adapter, config: SpectralConfig, module: str, stored: str, tensor: str) -> SpectralEdit:
    name, own = _own_config(adapter, config, module)
    k, weight = (own.ranks or {})[name], adapter.base.shape(tensor)
    if adapter.base.dtype(tensor) not in DENSE_DTYPES or len(weight) < 2 or k > min(weight[0], prod(weight[1:])):
        raise InputError(
            f"{adapter.folder}: {name} cannot have {k} singular directions in {adapter.base.source}, where it is "
            f"{'×'.join(map(str, weight))} of {adapter.base.dtype(tensor)}; give the base that it was trained on"
        )
    if adapter.tensors.shape(stored) != own.stored_shape(name):
        raise InputError(
            f"{adapter.folder}: {name} has coefficients of shape {adapter.tensors.shape(stored)}, but "
            f"adapter_config.json says {config.coefficients} with k={k}; the two files are not of one adapter"
        )
    return SpectralEdit(adapter.tensors, stored, own, name)


def _own_config(adapter: Adapter, config: SpectralConfig, module: str) -> tuple[str, SpectralConfig]:
    """Name of a module's matrix, and the config with the record of this matrix only."""
    record = {field: getattr(config, field) for field in RECORD if getattr(config, field) is not None}
    hashes = config.base_hashes or {}
    name = module if module in hashes else matrix_name(module)
    if name not in hashes:
        raise InputError(
            f"{adapter.folder}: adapter_config.json has no base_hashes, ranks and probes for {name}, so nothing tells "
            f"which weights the coefficients belong to; save the adapter again"
        )
    own: dict[str, Any] = {field: {name: values[name]} for field, values in record.items()}
    return name, replace(config, **own)


register_adapter_method(METHOD, AdapterMethod(prefix="spectral_", edits=spectral_edits))
