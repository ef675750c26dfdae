"""Serve thousands of tasks on one base model, with any mix of them in a batch.

`CoefficientBank` holds the numbers of the tasks. `RowUpdates` applies to each row of a batch the update of its task.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectralbasis.checkpoints import matrix_name
from spectralbasis.coefficients.bank_file import (
    DTYPES,
    BankLayout,
    BankRows,
    HeadShape,
    head_shapes,
    map_rows,
    read_bank,
    write_bank,
)
from spectralbasis.coefficients.spectral_adapters import (
    difference,
    difference_of_numbers,
    other_shapes,
    read_spectral_adapter,
    split_tensors,
    with_names_of,
)
from spectralbasis.errors import InputError
from spectralbasis.tuner.autograd import Route, cheapest_route
from spectralbasis.tuner.config import SpectralConfig
from spectralbasis.tuner.forms import Parametrisation
from spectralbasis.tuner.preparation import align_record, find_targets, prepare


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
                f"{name} got {len(x)} rows but {len(rows)} tasks: name one task for each row of the batch; a model "
                "that flattens its batch cannot be served by a bank"
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
        C = parametrisation(self._layout.part(rows, name, "coefficients").to(target.device))
        return route.add(source, target, C, parametrisation.form)

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
    _, prepared = prepare(layout.config, targets, 0)
    matrices = {}
    for target in targets:
        U, V = (factor.to(target.W) for factor in prepared[target.key].directions)
        module = found[target.key]
        matrices[target.name] = module, cheapest_route(target.W, U, V, getattr(module, "bias", None))
    return matrices


def _head(model: nn.Module, layout: BankLayout, name: str) -> nn.Linear:
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, nn.Linear) or module.in_features != layout.heads[name].inputs:
        found = "nothing" if module is None else f"a {type(module).__name__}"
        raise InputError(
            f"the tasks have the linear head {name} with {layout.heads[name].inputs} inputs, but "
            f"{type(model).__name__} has {found} there instead; a bank serves only linear heads"
        )
    return module


class CoefficientBank:
    """Coefficients and heads of many tasks, stacked, over one frozen base: one pass, a task for each row of the batch.

    A task takes a row of numbers, its coefficients and its heads, and nothing else. A batch gathers the rows of its
    tasks once; each layer then multiplies by the C of each row, all rows at once. Made by `from_adapters` or `open`.

    Tasks are added and removed while other threads run batches: a batch has the numbers that were there when it began.

    The model must be in evaluation mode; it is left as it is, but for hooks that do nothing outside of the bank's
    passes, until `close`. Heads are linear layers; tasks of different label counts share a batch, in which the logits
    of labels that a row's task does not have are -inf.

    Examples:
        >>> import copy, tempfile
        >>> from pathlib import Path
        >>> import peft, torch
        >>> import spectralbasis as sb
        >>> folder, base = Path(tempfile.mkdtemp()), torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> config = sb.SpectralConfig(target_modules=["0"], leading=3, init_weights=False)
        >>> peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(folder / "task")
        >>> bank = sb.CoefficientBank.from_adapters(base.eval(), {"task": folder / "task"})
        >>> bank(torch.randn(2, 8), tasks=["task", "task"]).shape
        torch.Size([2, 6])
    """

    def __init__(self, model: nn.Module, layout: BankLayout, rows: BankRows, tasks: Sequence[str]) -> None:
        self.model = model
        self.layout = layout
        self._rows = rows
        self._slots = {task: slot for slot, task in enumerate(tasks)}
        self._free = list(range(len(rows) - 1, len(tasks) - 1, -1))
        self._lock = threading.Lock()
        self._updates = RowUpdates(model, layout)

    @classmethod
    def from_adapters(
        cls,
        model: nn.Module,
        adapters: Mapping[str, str | Path],
        *,
        labels: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "CoefficientBank":
        """A bank of the adapters in folders.

        Args:
            model: the base that they were trained on, of the class that they were trained in, without adapters.
            adapters: task → folder of a spectral adapter; the first says which matrices the tasks of the bank train.
            labels: outputs to leave room for in every head; None takes the largest head of these adapters.
            dtype: of the numbers: torch.float32, float16 or bfloat16.

        Raises:
            InputError: the adapters are not of one base, basis and form, or have something else than linear heads.
            BaseMismatchError: the model is not the base that they were trained on.
        """
        if dtype not in DTYPES.values():
            raise InputError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
        if not adapters:
            raise InputError("a bank needs an adapter to know what its tasks train; pass one or more")
        heads = head_shapes([other_shapes(Path(folder)) for folder in adapters.values()], labels)
        config = read_spectral_adapter(Path(next(iter(adapters.values())))).config
        layout = _on(model, config, heads)
        bank = cls(model, layout, BankRows(torch.empty(len(adapters), layout.width, dtype=dtype)), ())
        for task, folder in adapters.items():
            bank.add(task, folder)
        return bank

    @classmethod
    def open(cls, path: str | Path, model: nn.Module) -> "CoefficientBank":
        """A bank that `save` wrote: its file is mapped, so that numbers are read when they are used.

        Processes that open one file share its memory. Changes stay in this process until they are saved.

        Raises:
            InputError: the file is damaged, or the model lacks what its tasks change.
            BaseMismatchError: the model is not the base that the tasks were trained on.
        """
        file = read_bank(Path(path))
        layout = _on(model, file.layout.config, file.layout.heads)
        if not file.tasks:
            return cls(model, layout, BankRows(torch.empty(0, layout.width, dtype=file.dtype)), ())
        rows = map_rows(Path(path), file.offset, (len(file.tasks), layout.width), file.dtype)
        return cls(model, layout, BankRows(rows), file.tasks)

    def save(self, path: str | Path) -> None:
        """Write all tasks into one file, which appears when it is complete: also over the one that the bank maps."""
        with self._lock:
            slots = list(self._slots.values())
            write_bank(
                Path(path), self.layout, list(self._slots), self._rows.dtype, lambda file: self._rows.save(slots, file)
            )

    def add(self, task: str, adapter: str | Path | Mapping[str, Tensor] | Tensor) -> None:
        """Add a task, or put another in its place.

        Args:
            task: its name.
            adapter: folder of a spectral adapter; or tensors as `peft.get_peft_model_state_dict` gives them, which
                are taken to be trained on this base and basis; or a row that `pack` gave.

        Raises:
            InputError: the adapter is not of the base, basis, form and heads of this bank.
        """
        self._put(task, adapter if isinstance(adapter, Tensor) else self.pack(task, adapter))

    def pack(self, task: str, adapter: str | Path | Mapping[str, Tensor]) -> Tensor:
        """The row of numbers, (width,), that `add` would enter; another bank of the same file takes it as it is.

        Raises:
            InputError: as `add`.
        """
        if isinstance(adapter, Mapping):
            stored, others = split_tensors(adapter, self.layout.shapes, task)
        else:
            stored, others = self._read(Path(adapter), task)
        return self.layout.pack(stored, others, task, self._rows.dtype)

    def remove(self, task: str) -> None:
        """Forget a task; the next that is added takes its room.

        Raises:
            InputError: the bank has no such task.
        """
        with self._lock:
            self._free.append(self._slot(task))
            del self._slots[task]

    def __call__(self, *args: Any, tasks: Sequence[str], **batch: Any) -> Any:
        """The model's output, where row i of the batch is computed with the coefficients and heads of `tasks[i]`.

        Raises:
            InputError: a task is unknown, their number is not that of the rows, the model is in training mode, or the
                batch has labels: a bank computes no loss.
        """
        if "labels" in batch:
            raise InputError("a bank computes no loss; leave labels out and compare them with the logits")
        with self.serving(tasks):
            return self.model(*args, **batch)

    @contextmanager
    def serving(self, tasks: Sequence[str]) -> Iterator[None]:
        """Within this context, calls of the model in this thread belong to one task for each row: see `__call__`."""
        if self.model.training:
            raise InputError("the model is in training mode, but a bank only runs inference; call model.eval() first")
        with self._lock:
            rows = self._rows.read([self._slot(task) for task in tasks])
        with torch.inference_mode(), self._updates.serving(rows):
            yield

    def labels(self, task: str) -> dict[str, int]:
        """How many labels a task has in each head."""
        with self._lock:
            return self.layout.labels(self._rows.read([self._slot(task)])[0])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of all tasks."""
        with self._lock:
            return tuple(self._slots)

    @property
    def dtype(self) -> torch.dtype:
        """In which numbers are held."""
        return self._rows.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers of all tasks."""
        return len(self._slots) * self.layout.width * self._rows.dtype.itemsize

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, task: object) -> bool:
        return task in self._slots

    def close(self) -> None:
        """Leave the model as it was; the bank serves no longer."""
        self._updates.remove()

    def __repr__(self) -> str:
        return f"CoefficientBank({len(self)} tasks of {self.layout.width} numbers on {type(self.model).__name__})"

    def _read(self, folder: Path, task: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What an adapter of this bank's kind stores, and its other tensors."""
        adapter = with_names_of(self.layout.config, read_spectral_adapter(folder))
        ours, theirs = self.layout.config, adapter.config
        found = difference(ours, theirs) or difference_of_numbers(ours, theirs)
        strangers = sorted(adapter.stored.keys() - self.layout.shapes.keys())
        if strangers and not found:
            found = f"it trains {strangers[0]}, which the first task of the bank does not"
        if found:
            raise InputError(f"{task} ({folder}) does not match the other tasks of this bank: {found}")
        return adapter.stored, adapter.others

    def _put(self, task: str, row: Tensor) -> None:
        with self._lock:
            slot = self._slots.get(task)
            if slot is None and not self._free:
                start = len(self._rows)
                self._rows.grow()
                self._free.extend(range(len(self._rows) - 1, start - 1, -1))
            slot = self._free.pop() if slot is None else slot
            self._rows.write(slot, row)
            self._slots[task] = slot

    def _slot(self, task: str) -> int:
        try:
            return self._slots[task]
        except KeyError:
            raise InputError(f"the bank has no task {task!r} among its {len(self._slots)}; add it first") from None


def _on(model: nn.Module, config: SpectralConfig, heads: Mapping[str, HeadShape]) -> BankLayout:
    """The layout of a bank whose matrices have the names that this model gives them."""
    config = align_record(config, model)
    if config.target_parameters:
        raise InputError(
            f"{type(model).__name__} keeps what the tasks train in stacks of experts, "
            f"{sorted(config.target_parameters)}, but a bank serves only linear layers; load the adapters with PEFT"
        )
    return BankLayout(config, heads)
