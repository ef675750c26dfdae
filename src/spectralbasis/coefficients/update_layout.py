"""Which part of an adapter carries what finetuning changed: factors, whole modules, biases, or nothing.

Weights of layers that PEFT adapts get factors. Norms, task heads, tied tables and layers that PEFT does not adapt are
saved whole (`modules_to_save`), biases by `bias="all"`. What belongs to no layer is left out, with a reason.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from spectralbasis.checkpoints import Checkpoint, Matrix, match_matrices, matrix_name, open_checkpoint
from spectralbasis.checkpoints.adapters import AdapterCheckpoint, is_output_head, ties_head, vocabulary_table
from spectralbasis.checkpoints.matrices import is_embedding_table, left_out_by_default
from spectralbasis.checkpoints.names import conversions_of, model_of, same_names
from spectralbasis.checkpoints.opening import Source
from spectralbasis.coefficients.architectures import adapted_architecture
from spectralbasis.errors import InputError
from spectralbasis.tuner.layer import Convolutions, Layers

_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
"""End of a class of transformers → PEFT's name of its task."""
_HEADS_OF_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Task → the modules that PEFT saves whole without being asked, and so expects in the file."""
_NOT_IN_MAMBA = ("out_proj", "conv1d")
"""Layers that PEFT refuses to adapt in a Mamba, whose kernels read their weights."""
_EXPERTS = (
    "it holds the matrices of several experts, for which this command writes no factors; export a merged model, or "
    "leave it out"
)


class Layer(NamedTuple):
    """A layer whose weight gets factors.

    Attributes:
        before: the base's weight as one matrix (out, in), named as the module.
        after: the finetuned one.
        shape: of the weight as it is stored.
        embedding: whether its rows are looked up.
    """

    before: Matrix
    after: Matrix
    shape: tuple[int, ...]
    embedding: bool


@dataclass
class Layout:
    """What goes where.

    Attributes:
        base: the pretrained checkpoint.
        tuned: the finetuned one.
        architecture: class of transformers that the adapter is for; empty where it is not known.
        layers: module → the layer that gets factors, if it turns out that it changed.
        biases: parameter → tensor of the finetuned checkpoint.
        whole: parameter → tensor of the finetuned checkpoint, of modules that are saved whole.
        modules_to_save: these modules.
        exclude_modules: modules that PEFT would take for one of `layers`, by the end of their names.
        left_out: name → why the adapter lacks it, though it changed or may have.
        notes: sentences for a person.
    """

    base: Checkpoint
    tuned: Checkpoint
    architecture: str = ""
    layers: dict[str, Layer] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)
    exclude_modules: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def task_type(self) -> str | None:
        """PEFT's name of the task."""
        return next((task for end, task in _TASK_TYPES.items() if self.architecture.endswith(end)), None)


def lay_out(base: Source, tuned: Source, include: Sequence[str], exclude: Sequence[str], *, partial: bool) -> Layout:
    """Open both checkpoints and decide what goes where; small tensors and tables are compared, no weight is decomposed.

    Raises:
        InputError: a checkpoint cannot be opened, the two have no matrix in common, or `include` names nothing.
    """
    opened = open_checkpoint(base)
    if isinstance(opened, AdapterCheckpoint):
        raise InputError(
            f"{opened.source} is an adapter, and BASE must be a model; give the base first and the finetuned "
            "checkpoint second"
        )
    after = open_checkpoint(tuned, base=opened, partial=partial)
    module = next((one for one in (tuned, base) if isinstance(one, nn.Module)), None)
    return _Planner(opened, after, module, include, exclude).layout()


class _Planner:
    """What is known of both sides while a layout is made."""

    def __init__(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        module: nn.Module | None,
        include: Sequence[str],
        exclude: Sequence[str],
    ) -> None:
        self.base, self.tuned, self.include, self.exclude = base, tuned, include, exclude
        config = dict(tuned.config or base.config)
        if isinstance(tuned, AdapterCheckpoint):
            named = adapted_architecture(config, tuned.adapter.config)
            config |= {"architectures": [named]} if named else {}
        self.model = module if module is not None else model_of(config)
        self.config = config
        named = (
            type(self.model).__name__ if self.model is not None else next(iter(config.get("architectures") or []), "")
        )
        self.found = Layout(base, tuned, str(named))
        self.modules = {} if self.model is None else dict(self.model.named_modules(remove_duplicate=False))
        table = conversions_of(config)
        self.parameter_of = {} if table is None else {name: table.parameter(name) for name in tuned.names()}
        tables = conversions_of(tuned.config or base.config), conversions_of(base.config or tuned.config)
        self.partner = same_names(tuned.names(), base.names(), lambda: tables)
        self.tied = {**tuned.tied()}

    def layout(self) -> Layout:
        """See `lay_out`."""
        found = self.found
        matching = match_matrices(self.base, self.tuned, include=("*",))
        pairs: dict[str, list[tuple[Matrix, Matrix]]] = {}
        for before, after in matching.pairs:
            pairs.setdefault(after.cut.tensor, []).append((before, after))
        parameters = {tensor: self._parameter(tensor) for tensor in self.tuned.names() if tensor not in self.tied}
        if self.include and not any(self._wanted(tensor) for tensor in parameters):
            raise InputError(f"include={list(self.include)} matches no tensor of {self.tuned.source}")
        stored = {name: tensor for tensor, name in parameters.items() if name is not None}
        whole: set[str] = set()
        grouped = self._tied_groups(stored, whole)
        for tensor, name in parameters.items():
            if name not in grouped:
                self._place(tensor, name, pairs.get(tensor, []), matching.skipped, whole)
        self._save_whole(whole, stored)
        self._note_order()
        found.exclude_modules = self._collisions()
        return found

    def _parameter(self, tensor: str) -> str | None:
        """What the adapter's model calls a tensor; None where it has none that is this tensor alone."""
        if not self.modules:
            return tensor
        for name in (tensor, self.parameter_of.get(tensor) or tensor):
            owner = name.rpartition(".")[0]
            if owner in self.modules:
                return name
        owner, _, leaf = tensor.rpartition(".")
        ends = [name for name in self.modules if owner and name.endswith(f".{owner}")]
        ends = ends or [name for name in self.modules if name and owner.endswith(f".{name}") and "." in name]
        return f"{ends[0]}.{leaf}" if len(ends) == 1 else None

    def _wanted(self, tensor: str) -> bool:
        names = (tensor, matrix_name(tensor))
        asked = not self.include or any(fnmatchcase(name, one) for name in names for one in self.include)
        return asked and not any(fnmatchcase(name, one) for name in names for one in self.exclude)

    def _tied_groups(self, stored: Mapping[str, str], whole: set[str]) -> set[str]:
        """Parameters that base or finetuned model holds as one tensor; those that changed are saved whole, each."""
        done: set[str] = set()
        for group in self._ties():
            holders = [stored[name] for name in group if name in stored]
            befores = [self.partner[tensor] for tensor in holders if tensor in self.partner]
            if not holders or not befores:
                continue
            done |= set(group)
            sizes = {self.tuned.shape(tensor) for tensor in holders} | {self.base.shape(tensor) for tensor in befores}
            values = [(self.tuned, tensor) for tensor in holders] + [(self.base, tensor) for tensor in befores]
            if len(sizes) > 1:
                self._leave_out_rows(holders[0], befores[0])
            elif all(_same(*values[0], *other) for other in values[1:]):
                continue
            elif not all(map(self._wanted, holders)):
                self.found.left_out[holders[0]] = "left out by include or exclude"
            else:
                whole |= {name.rpartition(".")[0] for name in group}
                self.found.notes.append(
                    f"{' and '.join(sorted(group))} are one tensor, which changed: PEFT would add an update of a tied "
                    "table twice when it merges, so the adapter holds each of them whole."
                )
        return done

    def _ties(self) -> list[list[str]]:
        """Groups of parameters that are one tensor in the finetuned or in the base model."""
        if self.model is None:
            return []
        models = [self.model]
        other = self.base.config
        if self.config and other and ties_head(other) != ties_head(self.config):
            models += [one] if (one := model_of({**self.config, "tie_word_embeddings": ties_head(other)})) else []
        groups: list[list[str]] = []
        for model in models:
            tie = getattr(model, "tie_weights", None)
            if (callable(tie) and model is not self.model) or (callable(tie) and _on_meta(model)):
                tie()
            named: dict[int, list[str]] = {}
            for name, parameter in model.named_parameters(remove_duplicate=False):
                named.setdefault(id(parameter), []).append(name)
            groups += [group for group in named.values() if len(group) > 1 and group not in groups]
        return groups

    def _leave_out_rows(self, tensor: str, before: str) -> None:
        rows, fewer = self.tuned.shape(tensor)[0], self.base.shape(before)[0]
        self.found.left_out[tensor] = (
            f"it has {rows} rows, and {fewer} in the base: an adapter adds no rows to a table; give the base the same "
            f"vocabulary first: model.resize_token_embeddings({rows}), then model.save_pretrained(FOLDER)"
        )

    def _place(
        self,
        tensor: str,
        name: str | None,
        pairs: Sequence[tuple[Matrix, Matrix]],
        skipped: Mapping[str, str],
        whole: set[str],
    ) -> None:
        """Decide what carries one tensor."""
        if (reason := self.tuned.unreadable(tensor)) is not None:
            self.found.left_out[tensor] = reason
            return
        dtype = self.tuned.dtype(tensor)
        if not dtype.is_floating_point and not pairs:
            return  # a buffer of numbers, such as positions
        module, _, leaf = (name or tensor).rpartition(".")
        layer, reason = self._layer(tensor, module, leaf, pairs) if pairs and name else (None, "")
        if layer is not None and self._wanted(tensor):
            self.found.layers[module] = layer
            return
        before = self.partner.get(tensor)
        resized = before is not None and self.base.shape(before) != self.tuned.shape(tensor)
        if before is not None and (unread := self.base.unreadable(before)) is not None:
            self.found.left_out[tensor] = unread
        elif not resized and self._unchanged(tensor, before, pairs):
            pass
        elif not self._wanted(tensor):
            self.found.left_out[tensor] = "left out by include or exclude"
        elif name is None:
            self.found.left_out[tensor] = (
                _EXPERTS if "experts" in tensor else f"{self.found.architecture} has no module of this name"
            )
        elif resized and before is not None and (self._is_table(tensor) or is_output_head(tensor)):
            self._leave_out_rows(tensor, before)
        elif reason:
            self.found.left_out[tensor] = reason
        elif leaf == "bias" and before is not None and not resized:
            self.found.biases[name] = tensor
        elif self._is_module_alone(module):
            whole.add(module)
        else:
            self.found.left_out[tensor] = "it is a parameter of no layer of its own, which PEFT cannot save"

    def _unchanged(self, tensor: str, before: str | None, pairs: Sequence[tuple[Matrix, Matrix]]) -> bool:
        """Whether the base has the same numbers, in one tensor or in the parts that were paired."""
        if before is not None:
            return _same(self.tuned, tensor, self.base, before)
        return bool(pairs) and all(_same_matrix(*pair) for pair in pairs)

    def _layer(
        self, tensor: str, module: str, leaf: str, pairs: Sequence[tuple[Matrix, Matrix]]
    ) -> tuple[Layer | None, str]:
        """The layer that gets factors; or None, with the reason where nothing else can carry the tensor either."""
        before, after = pairs[0]
        if after.cut.expert is not None or before.cut.expert is not None:
            return None, _EXPERTS
        size = prod(self.tuned.shape(tensor))
        alike = all(
            a.cut.rows == b.cut.rows and a.cut.transposed == b.cut.transposed and a.cut.tensor == before.cut.tensor
            for a, b in pairs
        )
        if (
            not alike
            or sum(prod(b.shape) for _, b in pairs) != size
            or prod(self.base.shape(before.cut.tensor)) != size
        ):
            return None, "base and finetuned checkpoint divide it among different tensors; save both in one layout"
        owner = self.modules.get(module)
        head = (left_out_by_default(self.tuned, tensor, after.name) or "").startswith("task head")
        if leaf != "weight" or (head and not is_output_head(tensor)) or not _adaptable(owner, bool(self.modules)):
            return None, ""
        if "mamba" in str(self.config.get("model_type")) and module.rpartition(".")[2] in _NOT_IN_MAMBA:
            return None, ""
        embedding = isinstance(owner, nn.Embedding) if self.modules else self._is_table(tensor)
        if embedding and tensor != vocabulary_table(self.tuned):
            return None, ""  # a table of positions, which some models read without calling the layer that holds it
        shape = (size // after.shape[1], after.shape[1])
        one, other = (
            replace(matrix, name=module, shape=shape, cut=replace(matrix.cut, rows=None)) for matrix in (before, after)
        )
        return Layer(one, other, self.tuned.shape(tensor), embedding), ""

    def _is_table(self, tensor: str) -> bool:
        return is_embedding_table(self.tuned, tensor) and not is_output_head(tensor)

    def _is_module_alone(self, module: str) -> bool:
        """Whether a module has no modules in it, so that saving it whole saves nothing else."""
        if not module:
            return False
        names: Collection[str] = self.modules or {name.rpartition(".")[0] for name in self.tuned.names()}
        return not any(name.startswith(f"{module}.") for name in names)

    def _save_whole(self, whole: set[str], stored: Mapping[str, str]) -> None:
        """Name the modules to save, and all tensors that PEFT then expects, also of modules of the same ending."""
        found = self.found
        names = set(self.modules or {name.rpartition(".")[0] for name in stored}) - {""}
        heads = _HEADS_OF_TASK.get(found.task_type or "", ())
        entries = {module for module in whole if module.split(".")[0] not in heads}
        if heads:
            entries |= {head for head in heads if any(name.endswith(head) for name in names)}
        saved = {name for name in names if any(name.endswith(entry) for entry in entries)}
        saved = {name for name in saved if not any(name.startswith(f"{other}.") for other in saved)}
        found.modules_to_save = sorted(entry for entry in entries if any(name.endswith(entry) for name in saved))
        expected = {} if self.model is None else self.model.state_dict()
        for module in sorted(saved):
            inside = [name for name in (expected or stored) if name.startswith(f"{module}.")]
            for name in inside:
                tensor = stored.get(name) or self._tied_holder(name, stored)
                if tensor is None:
                    raise InputError(
                        f"{self.tuned.source} lacks {name}, which belongs to {module}, a module that the adapter saves "
                        "whole; save the finetuned model again"
                    )
                found.whole[name] = tensor
            for name in [name for name in found.layers if name == module or name.startswith(f"{module}.")]:
                del found.layers[name]
            for name in [name for name in found.biases if name.startswith(f"{module}.")]:
                del found.biases[name]

    def _tied_holder(self, name: str, stored: Mapping[str, str]) -> str | None:
        """The tensor that the finetuned checkpoint stores for a parameter that is tied to another."""
        groups = (group for group in self._ties() if name in group)
        return next((stored[other] for group in groups for other in group if other in stored), None)

    def _note_order(self) -> None:
        """Say that the base has a head which the finetuned checkpoint lacks, as when both are in the wrong order."""
        matched = set(self.partner.values())
        heads = [
            name
            for name in self.base.names()
            if name not in matched
            and name.endswith(".weight")
            and (left_out_by_default(self.base, name, matrix_name(name)) or "").startswith("task head")
            and not is_output_head(name)
        ]
        if heads and all(tensor in self.partner for tensor in self.found.whole.values()):
            self.found.notes.append(
                f"The base has {heads[0]}, which the finetuned checkpoint lacks. Check that the base was given first."
            )

    def _collisions(self) -> list[str]:
        """Modules that PEFT would adapt besides the layers, since their names end as a layer's name does."""
        layers = self.found.layers
        return sorted(
            name
            for name, module in self.modules.items()
            if name not in layers and isinstance(module, Layers) and any(name.endswith(f".{one}") for one in layers)
        )


def _on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _adaptable(owner: nn.Module | None, known: bool) -> bool:
    """Whether PEFT's LoRA adapts this layer; where no module is known, a tensor named weight counts as one."""
    if owner is None:
        return not known
    if not isinstance(owner, Layers | Conv1D) or isinstance(owner, NonDynamicallyQuantizableLinear):
        return False
    if isinstance(owner, nn.Embedding):
        return owner.max_norm is None
    if isinstance(owner, Convolutions):
        return (owner.groups, owner.padding_mode, set(owner.dilation)) == (1, "zeros", {1})
    return True


def _same(one: Checkpoint, name: str, other: Checkpoint, its_name: str) -> bool:
    """Whether two tensors hold the same numbers, or the same but for the dtype that one of them was rounded to."""
    A, B = one.read(name), other.read(its_name)
    if A.shape != B.shape:
        return False
    wide: Any = torch.promote_types(A.dtype, B.dtype)
    if torch.equal(A.to(wide), B.to(wide)):
        return True
    return A.dtype != B.dtype and (torch.equal(A.to(B.dtype), B) or torch.equal(B.to(A.dtype), A))


def _same_matrix(before: Matrix, after: Matrix) -> bool:
    return torch.equal(before.read().float(), after.read().float())
