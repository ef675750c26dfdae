"""Weights that hold an adapter, `W + U C Vᵀ`, kept between calls that need no gradients.

A kept weight is used only while nothing that it was formed from has changed. Each call checks that: see `Snapshot` for
W; the numbers of the adapter are compared with a copy of them, which takes less time than a product.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from spectralbasis.sizes import parse_size
from spectralbasis.tuner.factors import Snapshot

DEFAULT_LIMIT = "1GB"
FEW = 8
"""How many times more entries W has to have than numbers are compared with a copy, for a weight to be kept."""

_lock = threading.Lock()
_limit = parse_size(DEFAULT_LIMIT)
_accelerators = False
_entries: "weakref.WeakSet[_Entry]" = weakref.WeakSet()
_held = 0
_released: deque[int] = deque()
"""Bytes of dropped weights that `_held` still counts: a weight may be dropped where no lock can be taken."""


def keep_weights(limit: int | str | None = DEFAULT_LIMIT, *, accelerators: bool = False) -> None:
    """Say how much memory this process may use for weights that hold an adapter; what is kept so far is dropped.

    In evaluation mode and under `torch.no_grad` or `torch.inference_mode`, the first call forms `W + U C Vᵀ` of each
    plain linear layer, and later calls use it until something changes. They then cost the base's product and the check
    for changes, which reads entries all over W (docs/performance.md has the times). The base is not changed. Layers for
    which there is no more memory multiply with the factors at each call. So do layers whose weights have 16 bits, since
    a small `U C Vᵀ` would be rounded away there, and processes of a distributed group.

    A change of C is found by comparing all of its numbers. A change of W is found by its address, its version and some
    entries of each row and column: a write through `.data` or NumPy that misses these entries is not found; call
    `model.train()` and `model.eval()` after it. On an accelerator a comparison of numbers would wait for the device,
    so nothing is kept there by default. With `accelerators=True` only addresses and versions are compared, so that no
    write through `.data` and no replay of a CUDA graph is found.

    Args:
        limit: bytes, or text such as "500MB"; None or 0 keeps nothing. Choose this if C changes at each call.
        accelerators: whether weights are kept on accelerators too.

    Raises:
        InputError: the limit is not an amount of memory.

    Examples:
        >>> import spectralbasis as sb
        >>> sb.keep_weights("4GB")
        >>> sb.keep_weights(None)
        >>> sb.keep_weights()
    """
    global _limit, _accelerators
    size = 0 if limit in (None, 0, "0") else parse_size(limit)
    with _lock:
        _limit, _accelerators = size, accelerators
        for entry in list(_entries):
            entry.drop()


class _Entry:
    """A kept weight and what it was formed from; without a weight once it is dropped."""

    def __init__(self, weight: Tensor, base: Snapshot, copies: list[Tensor], states: list[Snapshot] | None) -> None:
        self.weight: Tensor | None = weight
        self.base = base
        self.copies = copies
        self.states = states
        self._release = weakref.finalize(self, _released.append, weight.nbytes)
        self._release.atexit = False

    def drop(self) -> None:
        """Give the memory back."""
        self.weight = None
        self._release()

    def holds(self, W: Tensor, numbers: tuple[Tensor, ...]) -> bool:
        """Whether the weight would be formed the same way now."""
        if not self.base.holds(W):
            return False
        if self.states is not None:
            return all(state.holds(now) for state, now in zip(self.states, numbers, strict=True))
        for then, now in zip(self.copies, numbers, strict=True):
            if then.dtype is not now.dtype or now.device != then.device or not torch.equal(then, now):
                return False
        return True


class KeptWeights:
    """What one layer keeps, by key."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}

    def get(
        self, key: Hashable, W: Tensor, numbers: tuple[Tensor, ...], dtype: torch.dtype, form: Callable[[], Tensor]
    ) -> Tensor | None:
        """The weight of this key, formed now unless it is kept; None where none may be kept.

        Args:
            key: tells apart what one layer keeps.
            W: the weight of the base.
            numbers: what the adapters store.
            dtype: of the weight.
            form: makes the weight, in the shape of W.
        """
        if _is_traced():
            return None
        entry = self._entries.get(key)
        if entry is not None:
            weight = entry.weight
            if weight is not None and entry.holds(W, numbers):
                return weight
            self._entries.pop(key, None)
            entry.drop()  # before another weight takes its room
        return self._form(key, W, numbers, dtype, form) if _may_keep(W, numbers) else None

    def clear(self) -> None:
        """Drop all."""
        self._entries.clear()

    def __len__(self) -> int:
        return sum(entry.weight is not None for entry in self._entries.values())

    def _form(
        self, key: Hashable, W: Tensor, numbers: tuple[Tensor, ...], dtype: torch.dtype, form: Callable[[], Tensor]
    ) -> Tensor | None:
        size = W.numel() * dtype.itemsize
        if not _take_room(size):
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():  # so that calls outside of inference mode may use it
                base = Snapshot(W)
                copies = [one.detach().clone() for one in numbers]
                states = None if W.device.type == "cpu" else [Snapshot(one) for one in numbers]
                entry = _Entry(form(), base, copies, states)
        except BaseException:
            _released.append(size)
            raise
        if not entry.holds(W, numbers):  # another thread has written meanwhile, or an entry is no number
            return None
        with _lock:
            _entries.add(entry)
        self._entries[key] = entry
        return entry.weight


def _take_room(size: int) -> bool:
    """Whether there is memory for another weight, which is counted then."""
    global _held
    with _lock:
        while _released:
            _held -= _released.popleft()
        if _held + size > _limit:
            return False
        _held += size
        return True


def _is_traced() -> bool:
    """Whether operations are recorded, where a kept weight would become a constant that no longer depends on C."""
    if torch._C._get_tracing_state() is not None:
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(getattr(mode, "_mode_key", None) is not None for mode in _get_current_dispatch_mode_stack())


def _may_keep(W: Tensor, numbers: tuple[Tensor, ...]) -> bool:
    if not _limit or (W.device.type != "cpu" and not _accelerators):
        return False
    if W.is_meta or not W.is_contiguous() or any(one.is_inference() for one in (W, *numbers)):
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False  # sharded parameters are gathered and freed behind the same object and version
    if W.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return sum(one.numel() for one in numbers) * FEW <= W.numel()
