"""What every source of weights can do, whatever its format."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Checkpoint(ABC):
    """Named tensors that are read one at a time; opening one reads names and shapes, never the data.

    Attributes:
        source: how a person names it: a path, a hub id, a class name.
        config: the model's `config.json`; empty where there is none.
    """

    source: str
    config: Mapping[str, Any]

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Tensor names as stored, in the order of the file."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor; `KeyError` where the name is unknown, here and below."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of one tensor."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in its stored dtype; not to be written to, as it may share memory with a model."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """`read(name)[start:stop]` along the first dimension; formats that can do so read only these rows."""
        return self.read(name)[start:stop]

    def take_rows(self, name: str, rows: Tensor, width: int) -> Tensor:
        """`read(name).reshape(-1, width)[rows]`, (count, width); see `holds_rows`.

        Args:
            name: of the tensor.
            rows: their numbers, (count,) int64, in any order.
            width: entries of a row.
        """
        return self.read(name).reshape(-1, width)[rows]

    def holds_rows(self, name: str) -> bool:
        """Whether `take_rows` reads no more than it gives, so that a tensor need not fit into memory as a whole."""
        return False

    def alone(self, name: str) -> "Checkpoint | None":
        """A checkpoint of this tensor only, which reads it from its file and is small enough to be sent elsewhere.

        None where the tensor is in memory or is computed when it is read.
        """
        return None

    def evidence(self, name: str) -> str:
        """What tells the stored tensor from another of the same name in a file of the same name on another machine.

        Raises:
            InputError: there is no such file here.
        """
        raise NotImplementedError(f"{type(self).__name__} has no file to look at")

    def tied(self) -> Mapping[str, str]:
        """Names whose storage is that of an earlier name, mapped to it; empty where the format cannot tell."""
        return {}

    def module_type(self, name: str) -> type[nn.Module] | None:
        """Class of the module that owns the tensor; None where only tensors are known."""
        return None

    def unreadable(self, name: str) -> str | None:
        """Why the tensor has no real weight to read; None where it has one."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, {len(self.names())} tensors)"
