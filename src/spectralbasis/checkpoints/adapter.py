"""PEFT adapters read over their base: each adapted tensor is computed when it is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.names import Conversions, conversions_of, matrix_name, unambiguous
from spectralbasis.errors import InputError

Edit = Callable[[Tensor], Tensor]
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """An adapter as saved, and the base that it adapts."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Checkpoint
    base: Checkpoint

    def base_tensor(self, parameter: str) -> str:
        """Name in the base of the parameter that the adapter's model calls `parameter`.

        Raises:
            InputError: the base has no such tensor.
        """
        found = self.find_base_tensor(parameter)
        if found is None:
            raise InputError(
                f"the adapter in {self.folder} adapts {parameter}, which its base {self.base.source} does not have; "
                f"give the model that it was trained on, or set base_model_name_or_path in its adapter_config.json"
            )
        return found

    def find_base_tensor(self, parameter: str) -> str | None:
        """As `base_tensor`, but None where the base has none under this name or another that means the same."""
        if parameter in self._base_names:
            return parameter
        return self._by_stable_name.get(matrix_name(parameter)) or self._by_canonical_name(parameter)

    @cached_property
    def _base_names(self) -> frozenset[str]:
        return frozenset(self.base.names())

    @cached_property
    def _by_stable_name(self) -> dict[str, str]:
        return unambiguous({name: matrix_name(name) for name in self.base.names()})

    def _by_canonical_name(self, parameter: str) -> str | None:
        conversions, tensors = self._conversions
        canonical = None if conversions is None else conversions.canonical(parameter)
        return None if canonical is None else tensors.get(canonical)

    @cached_property
    def _conversions(self) -> tuple[Conversions | None, dict[str, str]]:
        """The table of the base's architecture, and canonical name → tensor of the base."""
        found = conversions_of(self.base.config)
        if found is None:
            return None, {}
        return found, unambiguous({name: found.canonical(name) for name in self.base.names()})


@dataclass(frozen=True)
class AdapterMethod:
    """How one type of adapter changes the tensors of its base.

    Attributes:
        prefix: part of the name of each parameter that the method trains (`lora_`).
        edits: maps each adapted tensor of the base to the function that makes the tuned tensor of the base's; the
            result has the same shape and at least the precision of float32.
    """

    prefix: str
    edits: Callable[[Adapter], Mapping[str, Edit]]


class AdapterCheckpoint(Checkpoint):
    """The base with adapted tensors computed on reading, and `modules_to_save` in place of the base's.

    Adapted tensors have at least the precision of float32, so that a small update of a bfloat16 base is not rounded.

    Attributes:
        adapter: what was saved.
        edits: tensor of the base → what the adapter does to it.

    Raises:
        InputError: the adapter does not fit the base.
    """

    def __init__(self, adapter: Adapter, method: AdapterMethod, source: str) -> None:
        self.source = source
        self.config = adapter.base.config
        self.adapter = adapter
        self.edits = method.edits(adapter)
        self._base = adapter.base
        self._tensors = adapter.tensors
        self._replaced = {
            adapter.find_base_tensor(plain) or plain: stored
            for stored in adapter.tensors.names()
            if method.prefix not in (plain := adapted_name(stored))
        }

    @property
    def base(self) -> Checkpoint:
        """What the adapter is read over."""
        return self._base

    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._base.names(), *self._replaced)))

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._replaced:
            return self._tensors.shape(self._replaced[name])
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        if name in self._replaced:
            return self._tensors.dtype(self._replaced[name])
        stored = self._base.dtype(name)
        return edited_dtype(stored) if name in self.edits else stored

    def read(self, name: str) -> Tensor:
        if name in self._replaced:
            return self._tensors.read(self._replaced[name])
        tensor = self._base.read(name)
        return self.edits[name](tensor) if name in self.edits else tensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self.edits or name in self._replaced:
            return self.read(name)[start:stop]
        return self._base.read_rows(name, start, stop)

    def take_rows(self, name: str, rows: Tensor, width: int) -> Tensor:
        if name in self._replaced:
            return self._tensors.take_rows(self._replaced[name], rows, width)
        if name in self.edits:
            return super().take_rows(name, rows, width)
        return self._base.take_rows(name, rows, width)

    def holds_rows(self, name: str) -> bool:
        if name in self._replaced:
            return self._tensors.holds_rows(self._replaced[name])
        return name not in self.edits and self._base.holds_rows(name)

    def alone(self, name: str) -> Checkpoint | None:
        return None if name in self.edits or name in self._replaced else self._base.alone(name)

    def tied(self) -> Mapping[str, str]:
        return self._base.tied()

    def unreadable(self, name: str) -> str | None:
        return None if name in self._replaced else self._base.unreadable(name)


def edited_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype of a tensor that an adapter changes; a quantized one keeps its own, by which it is known."""
    quantized = stored.itemsize == 1 or not stored.is_floating_point
    return stored if quantized else torch.promote_types(stored, torch.float32)


def adapted_name(stored: str) -> str:
    """Name of an adapter's tensor without what PEFT puts in front of it."""
    return stored.removeprefix(_PEFT_PREFIX)
