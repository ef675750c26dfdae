"""What every source of weights can do, whatever its format.

Checkpoints that are already in memory (or mapped into it): a `state_dict`, a loaded torch pickle.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from spectralbasis.errors import InputError


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


# In order of preference: training scripts nest the state under one of these. DINO keeps a teacher and a student, JEPA
# a target encoder, its average an encoder, and a predictor.
_STATE_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "model_ema",
    "teacher",
    "student",
    "target_encoder",
    "params",
    "weights",
    "encoder",
)
_NOT_STATE = "_extra_state"  # what a layer of torch saves beside its tensors
_DEEPEST = 4  # a pickle may contain itself, so there is a limit
_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_IN_PIECES = frozenset({"DTensor", "ShardedTensor"})
_LARGEST_REPEATED = 1 << 30
"""Bytes of a tensor that claims more numbers than are stored (expanded, or sparse), at most."""


class TensorCheckpoint(Checkpoint):
    """A mapping of names to tensors, shared and not copied.

    Raises:
        InputError: a tensor is spread over processes, so that this one has a part of it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], source: str, config: Mapping[str, Any]) -> None:
        pieces = next((name for name, tensor in tensors.items() if type(tensor).__name__ in _IN_PIECES), None)
        if pieces is not None:
            raise InputError(
                f"{pieces} of {source} is a {type(tensors[pieces]).__name__}, which is spread over processes; gather "
                f"the state first (torch.distributed.checkpoint.state_dict.get_model_state_dict with "
                f"StateDictOptions(full_state_dict=True)) and pass that"
            )
        self.source = source
        self.config = config
        self._tensors = {name: _bare(tensor) for name, tensor in tensors.items()}

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        tensor = self._tensors[name]
        return (tensor.numel(),) if tensor.is_nested else tuple(tensor.shape)

    def dtype(self, name: str) -> torch.dtype:
        tensor = self._tensors[name]
        return torch.float32 if tensor.is_quantized else tensor.dtype

    def read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if tensor.is_meta:
            raise InputError(
                f"{name} of {self.source} is on the meta device and has no values; load the weights before comparing"
            )
        if (reason := self.unreadable(name)) is not None:
            raise InputError(f"{name} of {self.source} cannot be read: {reason}")
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        return (_real(tensor, name, self.source) if _is_encoded(tensor) else tensor).cpu().resolve_conj().resolve_neg()

    def unreadable(self, name: str) -> str | None:
        tensor = self._tensors[name]
        if tensor.is_nested:
            return "a nested tensor, whose rows have several lengths: save its parts one by one"
        claimed = tensor.numel() * tensor.element_size()
        if _is_encoded(tensor) or tensor.is_meta or claimed <= max(_LARGEST_REPEATED, _held_bytes(tensor)):
            return None
        return f"it repeats few stored numbers to {claimed} bytes: save it with .contiguous(), or leave it out"

    def holds_rows(self, name: str) -> bool:
        tensor = self._tensors[name]
        plain = tensor.layout == torch.strided and not _is_encoded(tensor)
        return plain and tensor.is_contiguous() and tensor.device.type == "cpu"

    def tied(self) -> Mapping[str, str]:
        return tied_names(self._tensors)


def _bare(tensor: Tensor) -> Tensor:
    """The tensor without what else was put on the object, such as an attribute in place of a method."""
    try:
        return torch.Tensor.detach(tensor)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return tensor


def _held_bytes(tensor: Tensor) -> int:
    """Bytes of the storage of a plain tensor; 0 for a sparse one, which stores few of its numbers."""
    return tensor.untyped_storage().nbytes() if tensor.layout == torch.strided else 0


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the tensor only wraps others, as quantized ones of torchao and quanto do; a sharded one does not."""
    return is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "full_tensor")


def _is_encoded(tensor: Tensor) -> bool:
    return tensor.is_quantized or is_wrapper(tensor)


def _real(tensor: Tensor, name: str, source: str) -> Tensor:
    """What a quantized tensor stands for, as its library computes it."""
    try:
        return tensor.dequantize()
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{name} of {source} is a {type(tensor).__name__}, which its library cannot turn into plain numbers here "
            f"({error}); compare the checkpoint that it was made from"
        ) from error


def tied_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names that share storage, offset and shape with an earlier name, mapped to that name."""
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta or is_wrapper(tensor))
        if not plain or tensor.numel() == 0:
            continue
        identity = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if identity in first:
            tied[name] = first[identity]
        else:
            first[identity] = name
    return tied


def find_state(loaded: object, source: str) -> dict[str, Tensor]:
    """The `state_dict` inside what a training script saved, without the prefixes of DDP, FSDP and `torch.compile`.

    Raises:
        InputError: no tensors are found, or several mappings hold tensors and none has a usual name.
    """
    if not isinstance(loaded, Mapping):
        raise InputError(
            f"{source} holds a {type(loaded).__name__}, not a mapping of names to tensors; save model.state_dict()"
        )
    state = _descend(loaded, source, _DEEPEST)
    _refuse_nameless(state, source)
    return _without_wrappers(_tensors_of(state))


def _refuse_nameless(state: Mapping[Any, Any], source: str) -> None:
    """Raise InputError if a tensor of a state would be lost: its key is no name, or it lies in a mapping beside."""
    for key, value in state.items():
        if isinstance(value, Tensor) and not isinstance(key, str):
            raise InputError(f"{source} names a tensor {key!r}, expected a text; save model.state_dict()")
        beside = isinstance(value, Mapping) and value is not state and "optim" not in str(key)
        if beside and not str(key).endswith(_NOT_STATE) and _holds_tensors(value, _DEEPEST):
            raise InputError(
                f"{source} holds tensors, and beside them further ones in {key!r}; load it yourself and pass the "
                f"state_dict that you mean"
            )


def _refuse_beside(loaded: Mapping[Any, Any], chosen: str, source: str) -> None:
    """Raise InputError if matrices lie beside the state that is taken for the model's."""
    matrix = next((name for name, tensor in _tensors_of(loaded).items() if tensor.dim() > 1), None)
    if matrix is not None:
        raise InputError(
            f"{source} holds {matrix}, and a state in {chosen!r} beside it; load it yourself and pass the state_dict "
            "that you mean"
        )


def _descend(loaded: Mapping[Any, Any], source: str, depth: int) -> Mapping[Any, Any]:
    nested = {
        key: value
        for key, value in loaded.items()
        if isinstance(value, Mapping) and _holds_tensors(value, depth - 1) and "optim" not in str(key)
    }
    for key in _STATE_KEYS:
        if key in nested and not (key == "encoder" and "decoder" in nested):  # half a model is not the model
            if nested[key] is not loaded:
                _refuse_beside(loaded, key, source)
            return _descend(nested[key], source, depth - 1)
    if _tensors_of(loaded):
        return loaded
    if len(nested) == 1:
        return _descend(next(iter(nested.values())), source, depth - 1)
    if nested:
        raise InputError(
            f"{source} holds several sets of weights ({', '.join(map(repr, nested))}) and none under a usual name; "
            f"load it yourself and pass the state_dict that you mean"
        )
    keys = ", ".join(repr(key) for key in list(loaded)[:5]) or "nothing"
    raise InputError(f"{source} holds no tensors (found {keys}); expected a state_dict of names to tensors")


def _holds_tensors(value: Mapping[Any, Any], depth: int, seen: dict[int, int] | None = None) -> bool:
    """Whether a mapping holds tensors, or one in it does; each is looked into once, for they may hold each other."""
    seen = {} if seen is None else seen
    if depth <= seen.get(id(value), -1):
        return False
    seen[id(value)] = depth
    return bool(_tensors_of(value)) or any(
        isinstance(entry, Mapping) and _holds_tensors(entry, depth - 1, seen) for entry in value.values()
    )


def _tensors_of(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if isinstance(name, str) and isinstance(tensor, Tensor)}


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without prefixes that all names have; `matrix_name` leaves out those inside a name."""
    while state and (prefix := _common_prefix(state)):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _common_prefix(state: Mapping[str, Tensor]) -> str | None:
    return next((prefix for prefix in _WRAPPER_PREFIXES if all(name.startswith(prefix) for name in state)), None)
