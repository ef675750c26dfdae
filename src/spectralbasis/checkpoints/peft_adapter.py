"""PEFT adapters read over their base: each adapted tensor is computed when it is read."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.matrices import Matrix, is_embedding_table, take_inventory
from spectralbasis.checkpoints.names import (
    Conversions,
    conversions_of,
    kind_of,
    layer_number,
    matrix_name,
    same_names,
    unambiguous,
)
from spectralbasis.errors import InputError

Edit = Callable[[Tensor], Tensor]
PEFT_PREFIX = "base_model.model."
_OUTPUT_HEADS = frozenset(
    {"lm_head", "embed_out", "proj_out", "decoder", "output", "output_layer", "output_projection"}
)


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

    def find_matrices(self, names: Collection[str]) -> dict[str, Matrix]:
        """Those of the named matrices that the base has, as tensors of their own or as parts of others."""
        table = conversions_of(self.base.config)
        found = same_names(names, self._matrices, lambda: (table, table))
        return {name: self._matrices[found[name]] for name in names if name in found}

    @cached_property
    def _matrices(self) -> dict[str, Matrix]:
        return take_inventory(self.base).matrices

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
            result has the same shape and at least the precision of float32. A function that has a method
            `within(start, stop)` changes experts of a stack one by one: the method gives what is done to these.
        inside: tells whether a parameter that no tensor of the base is named after may be a part of one, or several.
    """

    prefix: str
    edits: Callable[[Adapter], Mapping[str, Edit]]
    inside: Callable[[Adapter, str], bool] = lambda adapter, parameter: False


class RenamedCheckpoint(Checkpoint):
    """Some tensors of a checkpoint under other names.

    Args:
        stored: the checkpoint.
        names: new name → name in `stored`.
    """

    def __init__(self, stored: Checkpoint, names: Mapping[str, str]) -> None:
        self.source = stored.source
        self.config = stored.config
        self._stored = stored
        self._names = dict(names)

    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._stored.dtype(self._names[name])

    def read(self, name: str) -> Tensor:
        return self._stored.read(self._names[name])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._stored.read_rows(self._names[name], start, stop)

    def take_rows(self, name: str, rows: Tensor, width: int) -> Tensor:
        return self._stored.take_rows(self._names[name], rows, width)

    def holds_rows(self, name: str) -> bool:
        return self._stored.holds_rows(self._names[name])

    def unreadable(self, name: str) -> str | None:
        return self._stored.unreadable(self._names[name])


class AdaptedBase(Checkpoint):
    """The base as the updates of an adapter meet it.

    What the adapter stores whole stands in place of the base's: retrained modules, trained biases, and the tables that
    PEFT saves beside their own update (`embed_tokens.base_layer.weight`). A head that the base does not store, because
    it is tied to a table, has a name of its own here.

    Attributes:
        stored: name → what the adapter stores for it.
        aliases: name of a tied head → the table that the base stores.
    """

    def __init__(
        self, base: Checkpoint, tensors: Checkpoint, stored: Mapping[str, str], aliases: Mapping[str, str]
    ) -> None:
        self.source = base.source
        self.config = base.config
        self.stored = dict(stored)
        self.aliases = dict(aliases)
        self._base = base
        self._tensors = tensors

    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._base.names(), *self.stored, *self.aliases)))

    def shape(self, name: str) -> tuple[int, ...]:
        holder, own = self._holder(name)
        return holder.shape(own)

    def dtype(self, name: str) -> torch.dtype:
        holder, own = self._holder(name)
        return holder.dtype(own)

    def read(self, name: str) -> Tensor:
        holder, own = self._holder(name)
        return holder.read(own)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        holder, own = self._holder(name)
        return holder.read_rows(own, start, stop)

    def take_rows(self, name: str, rows: Tensor, width: int) -> Tensor:
        holder, own = self._holder(name)
        return holder.take_rows(own, rows, width)

    def holds_rows(self, name: str) -> bool:
        holder, own = self._holder(name)
        return holder.holds_rows(own)

    def alone(self, name: str) -> Checkpoint | None:
        return None if name in self.stored or name in self.aliases else self._base.alone(name)

    def tied(self) -> Mapping[str, str]:
        return self._base.tied()

    def module_type(self, name: str) -> type[nn.Module] | None:
        return self._base.module_type(name) if name in self._base_names else None

    def unreadable(self, name: str) -> str | None:
        holder, own = self._holder(name)
        return holder.unreadable(own)

    def _holder(self, name: str) -> tuple[Checkpoint, str]:
        if name in self.stored:
            return self._tensors, self.stored[name]
        return self._base, self.aliases.get(name, name)

    @cached_property
    def _base_names(self) -> frozenset[str]:
        return frozenset(self._base.names())


class AdapterCheckpoint(Checkpoint):
    """The base with adapted tensors computed on reading, and what the adapter stores whole in place of the base's.

    The weights are those of PEFT's `merge_and_unload()`: where an embedding table and a head are tied, an update of
    either changes both, and the updates of both add up. Adapted tensors have at least the precision of float32, so that
    a small update of a bfloat16 base is not rounded.

    Attributes:
        adapter: what was saved.
        start: what the updates are added to: the base, with what the adapter stores whole in its place.
        updates: parameter that the adapter updates, by its name in `start` → what the adapter does to it.
        edits: tensor of this checkpoint → the sum of the updates of all parameters that are tied to it.
        retrained: tensor that the adapter stores whole, and that is no base of an update → its name in the adapter.
        missing: parameters that the adapter adapts and the base lacks; empty unless `partial`.

    Args:
        adapter: see there.
        method: its type.
        source: how a person named it.
        partial: read the adapter without the parameters that the base lacks, instead of refusing it.

    Raises:
        InputError: the adapter does not fit the base.
    """

    def __init__(self, adapter: Adapter, method: AdapterMethod, source: str, *, partial: bool = False) -> None:
        self.source = source
        self.config = adapter.base.config
        self.adapter = adapter
        fit = _Fit(adapter, method)
        self.start = AdaptedBase(adapter.base, adapter.tensors, fit.stored, fit.aliases)
        kept = RenamedCheckpoint(adapter.tensors, {name: name for name in fit.kept})
        self.updates = method.edits(replace(adapter, tensors=kept, base=self.start))
        if fit.missing and not (partial and self.updates):
            raise InputError(_do_not_fit(adapter, fit))
        self.missing = tuple(fit.missing)
        self.retrained = {name: stored for name, stored in fit.stored.items() if name not in fit.tables}
        untied = [name for name, table in fit.aliases.items() if table in self.retrained]
        others = [name for name in fit.stored if name not in fit.aliases]
        self._names = tuple(dict.fromkeys((*adapter.base.names(), *others, *untied)))
        self.edits = self._edits(fit.tied)

    @property
    def base(self) -> Checkpoint:
        """What the adapter is read over."""
        return self.adapter.base

    def _edits(self, tied: Mapping[str, str]) -> dict[str, Edit]:
        """By tensor; the updates of parameters that are tied to each other act on all of them."""
        groups: dict[str, list[Edit]] = {}
        for name in self.start.names():
            if name in self.updates and name not in self.retrained:
                groups.setdefault(tied.get(name, name), []).append(self.updates[name])
        sums = {name: found[0] if len(found) == 1 else self._sum(name, found) for name, found in groups.items()}
        names = [name for name in self._names if name not in self.retrained]
        return {name: sums[group] for name in names if (group := tied.get(name, name)) in sums}

    def _sum(self, name: str, edits: list[Edit]) -> Edit:
        """The edits of parameters that are tied to one tensor; those that rescale it (DoRA) do not add up."""
        if any(getattr(edit, "magnitude", None) or getattr(edit, "start", None) for edit in edits):
            raise InputError(
                f"the adapter in {self.adapter.folder} updates {name} and what is tied to it in ways that do not add "
                f"up; merge it with PEFT (model.merge_and_unload()), save the model and pass that folder"
            )
        return _Sum(tuple(edits))

    def names(self) -> tuple[str, ...]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.start.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        stored = self.start.dtype(name)
        return edited_dtype(stored) if name in self.edits else stored

    def read(self, name: str) -> Tensor:
        tensor = self.start.read(name)
        return self.edits[name](tensor) if name in self.edits else tensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        edit = self.edits.get(name)
        if edit is None:
            return self.start.read_rows(name, start, stop)
        within = getattr(edit, "within", None)
        if within is None:
            return self.read(name)[start:stop]
        return within(start, stop)(self.start.read_rows(name, start, stop))

    def take_rows(self, name: str, rows: Tensor, width: int) -> Tensor:
        return super().take_rows(name, rows, width) if name in self.edits else self.start.take_rows(name, rows, width)

    def holds_rows(self, name: str) -> bool:
        return name not in self.edits and self.start.holds_rows(name)

    def alone(self, name: str) -> Checkpoint | None:
        return None if name in self.edits else self.start.alone(name)

    def unreadable(self, name: str) -> str | None:
        return self.start.unreadable(name)

    def tied(self) -> Mapping[str, str]:
        ties = self.base.tied()
        return {name: first for name, first in ties.items() if not {name, first} & self.retrained.keys()}


@dataclass(frozen=True)
class _Sum:
    """Several updates of one tensor, each of which is made from the tensor as it was, and added to it."""

    edits: tuple[Edit, ...]

    def __call__(self, weight: Tensor) -> Tensor:
        stored = weight.to(edited_dtype(weight.dtype))
        return stored + sum(edit(weight) - stored for edit in self.edits)


class _Fit:
    """Where the parameters of an adapter are in its base.

    Attributes:
        kept: the adapter's tensors without those of updates that the base has no place for.
        stored: name in the base, or in the adapter's model where the base has none → what the adapter stores whole.
        tables: those of `stored` that are the base of an update.
        aliases: name of a head that the base does not store → the table that it is tied to.
        tied: name → the first of those that it shares its values with.
        missing: parameters that the adapter adapts and the base lacks.
        adapted: all that it adapts.
    """

    def __init__(self, adapter: Adapter, method: AdapterMethod) -> None:
        self._base = adapter.base
        updates, whole = _parameters(adapter, method)
        self.adapted = tuple(dict.fromkeys((*updates, *whole)))
        places = {name: adapter.find_base_tensor(name) for name in self.adapted}
        for names in (updates, whole):
            _refuse_two_names(adapter, {name: places[name] for name in names})
        self.aliases, self.tied = _find_ties(adapter.base, {name: places[name] for name in updates})
        lost = {
            name
            for name in updates
            if places[name] is None
            and name not in self.aliases
            and name not in whole
            and not method.inside(adapter, name)
        }
        lost |= {name for name in whole if places[name] is None and name not in updates and self._is_piece(name)}
        self.missing = [name for name in self.adapted if name in lost]
        self.kept = [stored for name, held in updates.items() if name not in lost for stored in held]
        self.stored = {places[name] or name: stored for name, stored in whole.items() if name not in lost}
        self.tables = {places[name] or name for name in updates if name in whole}
        self._share_tables()

    def _is_piece(self, parameter: str) -> bool:
        """Whether the base has others of the kind, or the rest of the layer: then it is no head of the adapter's."""
        module, _, leaf = parameter.rpartition(".")
        if leaf == "bias" and matrix_name(f"{module}.weight") in self._of_base:
            return True
        return layer_number(parameter) >= 0 and kind_of(matrix_name(parameter)) in set(map(kind_of, self._of_base))

    @cached_property
    def _of_base(self) -> frozenset[str]:
        return frozenset(matrix_name(name) for name in self._base.names())

    def _share_tables(self) -> None:
        """The base of an update is that of all that are tied to it; a retrained table is tied to nothing."""
        for table in sorted(self.tables & self.tied.keys()):
            for name, group in self.tied.items():
                if group == self.tied[table] and name not in self.stored:
                    self.stored[name] = self.stored[table]
                    self.tables = self.tables | {name}


def _refuse_two_names(adapter: Adapter, places: Mapping[str, str | None]) -> None:
    """Raise InputError if two parameters of one kind are one tensor of the base, so that one would hide the other."""
    first: dict[str, str] = {}
    for name, place in places.items():
        if place is not None and first.setdefault(place, name) != name:
            raise InputError(
                f"the adapter in {adapter.folder} adapts {first[place]} and {name}, which are both {place} of its base "
                f"{adapter.base.source}; remove one of them"
            )


def _parameters(adapter: Adapter, method: AdapterMethod) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Parameter → the tensors of its update, and parameter → the tensor that the adapter stores whole."""
    updates: dict[str, list[str]] = {}
    whole: dict[str, str] = {}
    for stored in adapter.tensors.names():
        name = adapted_name(stored)
        module, found, _ = name.partition(f".{method.prefix}")
        parameter = name.replace(".base_layer.", ".")
        if method.prefix in name:
            updates.setdefault(f"{module}.weight" if found else name, []).append(stored)
        elif ".token_adapter." in name:
            raise InputError(
                f"the adapter in {adapter.folder} holds {stored}, rows of single tokens "
                f"(trainable_token_indices), which are not read; merge it with PEFT (model.merge_and_unload()), "
                f"save the model and pass that folder"
            )
        elif parameter in whole:
            raise InputError(
                f"the adapter in {adapter.folder} holds both {whole[parameter]} and {stored}, two tensors for one "
                f"parameter; save the adapter again"
            )
        else:
            whole[parameter] = stored
    return updates, whole


def vocabulary_table(checkpoint: Checkpoint) -> str | None:
    """The table that tokens are looked up in: the embedding table with a row for each, else with the most rows."""
    names = [name for name in checkpoint.names() if layer_number(name) < 0 and len(checkpoint.shape(name)) == 2]
    tables = [name for name in names if is_embedding_table(checkpoint, name) and not is_output_head(name)]
    sizes = {part.get("vocab_size") for part in text_configs(checkpoint.config)}
    return max(tables, key=lambda name: (checkpoint.shape(name)[0] in sizes, checkpoint.shape(name)[0]), default=None)


def ties_head(config: Mapping[str, Any]) -> bool:
    """Whether a config lets the head be the embedding table; one that does not say so does, as in transformers."""
    said = [part["tie_word_embeddings"] for part in text_configs(config) if "tie_word_embeddings" in part]
    return bool(said[0]) if said else True


def text_configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config, and the part of it that is of the language model."""
    inner = (config.get(name) for name in ("text_config", "language_config", "llm_config"))
    return [config, *(part for part in inner if isinstance(part, Mapping))]


def is_output_head(name: str) -> bool:
    """Whether a parameter is, by its name, the head over the vocabulary that models tie to their embedding table."""
    return layer_number(name) < 0 and matrix_name(name).rpartition(".")[2] in _OUTPUT_HEADS


def _find_ties(base: Checkpoint, places: Mapping[str, str | None]) -> tuple[dict[str, str], dict[str, str]]:
    """Name of a head that the base does not store → its table, and name → the first of those with the same values.

    Args:
        base: a checkpoint.
        places: parameter with an update → its name in the base.
    """
    ties = dict(base.tied())
    table = vocabulary_table(base) if ties_head(base.config) else None
    aliases = {name: table for name, place in places.items() if table and place is None and is_output_head(name)}
    ties.update(aliases)
    alike = [] if table is None else [name for name in base.names() if _may_be_tied(base, name, table)]
    if table is not None and {table, *alike} & set(places.values()) - ties.keys():
        ties |= {name: table for name in alike if name not in ties and _same_values(base, name, table)}
    return aliases, ties | {first: first for first in ties.values()}


def _may_be_tied(base: Checkpoint, name: str, table: str) -> bool:
    return name != table and layer_number(name) < 0 and base.shape(name) == base.shape(table)


def _same_values(base: Checkpoint, one: str, other: str) -> bool:
    return base.dtype(one) == base.dtype(other) and torch.equal(base.read(one), base.read(other))


def _do_not_fit(adapter: Adapter, fit: _Fit) -> str:
    """What the base lacks, by kind."""
    lost = Counter(kind_of(matrix_name(name)) for name in fit.missing)
    adapted = Counter(kind_of(matrix_name(name)) for name in fit.adapted)
    groups = ", ".join(f"{kind} ({count} of {adapted[kind]})" for kind, count in lost.items())
    return (
        f"the adapter in {adapter.folder} adapts {groups}, which its base {adapter.base.source} does not have; "
        f"give the model that it was trained on, set base_model_name_or_path in its adapter_config.json, "
        f"or pass partial=True (--partial) to leave these out"
    )


def edited_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype of a tensor that an adapter changes; a quantized one keeps its own, by which it is known."""
    quantized = stored.itemsize == 1 or not stored.is_floating_point
    return stored if quantized else torch.promote_types(stored, torch.float32)


def adapted_name(stored: str) -> str:
    """Name of an adapter's tensor without what PEFT puts in front of it."""
    return stored.removeprefix(PEFT_PREFIX)
