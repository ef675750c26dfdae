"""`Checkpoint`, the interface of every source of weights, and the sources in memory: a `state_dict`, an `nn.Module`.

Each file format is a subclass in its own file. A checkpoint that reads the tensors of another is a subclass of `View`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from spectralbasis.errors import InputError

FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz})
INTEGERS = frozenset(
    {torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64}
)
PARTS_ONLY = frozenset({torch.float8_e8m0fnu, torch.float4_e2m1fn_x2})
"""Never a weight by themselves: powers of two are scales, and pairs of 4-bit floats need them."""
NUMBERS = INTEGERS | FLOAT8 | PARTS_ONLY
"""What quantized weights are stored as."""


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

        Empty where no file holds it.

        Raises:
            InputError: there is no such file here.
        """
        return ""

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


class View(Checkpoint):
    """A checkpoint whose tensors are those of other checkpoints, perhaps under other names.

    A subclass says in `names` what it holds and in `_place` where each tensor is; it overrides what it computes itself.
    """

    @abstractmethod
    def _place(self, name: str) -> tuple[Checkpoint, str]:
        """The checkpoint that stores a tensor, and the tensor's name there."""

    def shape(self, name: str) -> tuple[int, ...]:
        stored, own = self._place(name)
        return stored.shape(own)

    def dtype(self, name: str) -> torch.dtype:
        stored, own = self._place(name)
        return stored.dtype(own)

    def read(self, name: str) -> Tensor:
        stored, own = self._place(name)
        return stored.read(own)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        stored, own = self._place(name)
        return stored.read_rows(own, start, stop)

    def take_rows(self, name: str, rows: Tensor, width: int) -> Tensor:
        stored, own = self._place(name)
        return stored.take_rows(own, rows, width)

    def holds_rows(self, name: str) -> bool:
        stored, own = self._place(name)
        return stored.holds_rows(own)

    def alone(self, name: str) -> Checkpoint | None:
        stored, own = self._place(name)
        return stored.alone(own) if own == name else None

    def unreadable(self, name: str) -> str | None:
        stored, own = self._place(name)
        return stored.unreadable(own)


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
_PARAMETRIZED = ("_u", "_v", "_mask")  # buffers of spectral normalisation and of pruning
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
        if _is_encoded(tensor):
            try:
                tensor = tensor.dequantize()
            except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
                raise InputError(
                    f"{name} of {self.source} is a {type(tensor).__name__}, which its library cannot turn into plain "
                    f"numbers here ({error}); compare the checkpoint that it was made from"
                ) from error
        return tensor.cpu().resolve_conj().resolve_neg()

    def unreadable(self, name: str) -> str | None:
        tensor = self._tensors[name]
        if tensor.is_nested:
            return "a nested tensor, whose rows have several lengths: save its parts one by one"
        claimed = tensor.numel() * tensor.element_size()
        # A sparse tensor stores few of its numbers, so it counts as storing none.
        held = tensor.untyped_storage().nbytes() if tensor.layout == torch.strided else 0
        if _is_encoded(tensor) or tensor.is_meta or claimed <= max(_LARGEST_REPEATED, held):
            return None
        return f"it expands a few stored numbers to {claimed} bytes: save it with .contiguous(), or leave it out"

    def holds_rows(self, name: str) -> bool:
        tensor = self._tensors[name]
        plain = tensor.layout == torch.strided and not _is_encoded(tensor)
        return plain and tensor.is_contiguous() and tensor.device.type == "cpu"

    def tied(self) -> Mapping[str, str]:
        """Names that share storage, offset, shape and strides with an earlier name, mapped to that name."""
        first: dict[tuple[Any, ...], str] = {}
        tied = {}
        for name, tensor in self._tensors.items():
            plain = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta or is_wrapper(tensor))
            if not plain or tensor.numel() == 0:
                continue
            identity = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if first.setdefault(identity, name) != name:
                tied[name] = first[identity]
        return tied


def _bare(tensor: Tensor) -> Tensor:
    """The tensor without what else was put on the object, such as an attribute in place of a method."""
    try:
        return torch.Tensor.detach(tensor)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return tensor


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the tensor only wraps others, as quantized ones of torchao and quanto do; a sharded one does not."""
    return is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "full_tensor")


def _is_encoded(tensor: Tensor) -> bool:
    return tensor.is_quantized or is_wrapper(tensor)


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
    for key, value in state.items():  # nothing that lies beside the state may be lost
        if isinstance(value, Tensor) and not isinstance(key, str):
            raise InputError(f"{source} names a tensor {key!r}, expected a text; save model.state_dict()")
        beside = isinstance(value, Mapping) and value is not state and "optim" not in str(key)
        if beside and not str(key).endswith(_NOT_STATE) and _holds_tensors(value, _DEEPEST):
            raise InputError(
                f"{source} holds tensors, and more tensors in {key!r}; load it yourself and pass the state_dict that "
                "you mean"
            )
    found = _tensors_of(state)
    # Prefixes that all names have; `matrix_name` leaves out those inside a name.
    while found and (prefix := next((one for one in _WRAPPER_PREFIXES if all(n.startswith(one) for n in found)), None)):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def _descend(loaded: Mapping[Any, Any], source: str, depth: int) -> Mapping[Any, Any]:
    """The mapping that holds the model's tensors, of those that lie in each other."""
    nested = {
        key: value
        for key, value in loaded.items()
        if isinstance(value, Mapping) and _holds_tensors(value, depth - 1) and "optim" not in str(key)
    }
    tensors = _tensors_of(loaded)
    for key in _STATE_KEYS:
        if key in nested and not (key == "encoder" and "decoder" in nested):  # half a model is not the model
            matrix = next((name for name, tensor in tensors.items() if tensor.dim() > 1), None)
            if matrix is not None and nested[key] is not loaded:
                raise InputError(
                    f"{source} holds {matrix}, and also a state_dict in {key!r}; load it yourself and pass the "
                    "state_dict that you mean"
                )
            return _descend(nested[key], source, depth - 1)
    if tensors:
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


class ModuleCheckpoint(TensorCheckpoint):
    """The parameters of a module, which also tells the type of layer that each belongs to.

    Layers that keep a weight in parts (quantized, normalised, pruned) hold some of them in buffers or add them when
    they are saved; these count too.

    Raises:
        InputError: the module has no parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        if not parameters:
            raise InputError(f"{type(module).__name__} has no parameters; expected a model with weights")
        to_dict = getattr(getattr(module, "config", None), "to_dict", None)
        config = to_dict() if callable(to_dict) else {}
        if config:
            config = {**config, "architectures": config.get("architectures") or [type(module).__name__]}
        super().__init__(parameters | _saved_parts(module, parameters), type(module).__name__, config)
        modules = dict(module.named_modules(remove_duplicate=False))
        self._owners = {name: type(modules[name.rpartition(".")[0]]) for name in parameters}

    def module_type(self, name: str) -> type[nn.Module] | None:
        return self._owners.get(name)


def _saved_parts(module: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What layers that keep a weight in parts save beside parameters; not of one that knows its real weight itself."""
    whole = tuple(f"{name}." for name, tensor in parameters.items() if is_wrapper(tensor))
    known = set(map(id, parameters.values()))
    found: dict[str, Any] = {}
    for place, layer in module.named_modules(remove_duplicate=False):
        if _keeps_parts(layer):
            layer.state_dict(destination=found, prefix=f"{place}." if place else "", keep_vars=True)
    return {
        name: tensor
        for name, tensor in found.items()
        if isinstance(tensor, Tensor) and id(tensor) not in known and not name.startswith(whole)
    }


def _keeps_parts(layer: nn.Module) -> bool:
    buffers = dict(layer.named_buffers(recurse=False))
    own = (*layer.parameters(recurse=False), *buffers.values())
    return (
        any(tensor.dtype in NUMBERS and tensor.dtype != torch.int64 for tensor in own)
        or isinstance(getattr(layer, "W_q", None), Tensor)
        or any(name.endswith(_PARAMETRIZED) for name in buffers)
    )
