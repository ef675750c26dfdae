"""PEFT adapters read as checkpoints: their folder, their tensors under PEFT's names, and the weights over a base.

An adapted tensor is computed when it is read. An `AdapterMethod` says how one type of adapter changes its base, and
`register_adapter_method` registers it: LoRA in `lora.py`, the method of this package in `tuner/reading.py`.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectralbasis.checkpoints.checkpoint import Checkpoint, View
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
from spectralbasis.checkpoints.weight_files import inside
from spectralbasis.errors import InputError
from spectralbasis.peft_import import register_now
from spectralbasis.records import read_record

Edit = Callable[[Tensor], Tensor]
PEFT_PREFIX = "base_model.model."
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = ("adapter_model.safetensors", "adapter_model.bin")
_TRAINED = re.compile(
    r"(?P<module>.+\.(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)|spectral_coefficients))"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?P<leaf>\.weight|\.bias)?"
)
"""What PEFT trains: in a file without the adapter's name, in a running model with it (`lora_A.default.weight`)."""
_RETRAINED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<inner>.+)")
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_FRONTS = (PEFT_PREFIX, "module.")
_KOHYA = re.compile(r"(^|[._])lora[._](up|down)([._]|$)|^lora_(unet|te\d?|transformer)_|lora_linear_layer")
_OUTPUT_HEADS = frozenset(
    {"lm_head", "embed_out", "proj_out", "decoder", "output", "output_layer", "output_projection"}
)


def open_adapter(
    folder: Path,
    source: str,
    open_tensors: Callable[[Path], Checkpoint],
    open_source: Callable[[str], Checkpoint],
    base: Checkpoint | None = None,
    file: str | None = None,
    *,
    partial: bool = False,
) -> "AdapterCheckpoint":
    """Open an adapter over a base.

    Args:
        folder: holds `adapter_config.json`.
        source: how a person named it.
        open_tensors: opens the adapter's own tensors.
        open_source: opens the base that the adapter names.
        base: None opens the adapter's `base_model_name_or_path`, which may be absolute, relative to the working
            directory or to the adapter, or a hub id.
        file: name of the adapter's own tensors; None takes safetensors before a pickle.
        partial: read the adapter also where the base lacks some of what it adapts; see `AdapterCheckpoint.missing`.

    Raises:
        InputError: the base is not found or is an adapter itself, tensors are missing, or the type is not readable.
    """
    config = read_record(inside(folder, ADAPTER_CONFIG), dict[str, Any])
    method = _method(folder, config.get("peft_type"))
    tensors = adapter_tensors(folder, open_tensors, file)
    if base is None:
        base = _open_named_base(folder, config.get("base_model_name_or_path"), open_source)
    return AdapterCheckpoint(Adapter(folder, config, tensors, base), method, source, partial=partial)


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
        if (found := self._by_stable_name.get(matrix_name(parameter))) is not None:
            return found
        conversions, tensors = self._conversions
        canonical = None if conversions is None else conversions.canonical(parameter)
        return None if canonical is None else tensors.get(canonical)

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


_METHODS: dict[str, AdapterMethod] = {}


def register_adapter_method(peft_type: str, method: AdapterMethod) -> None:
    """Make the adapters of a PEFT type readable as checkpoints."""
    _METHODS[peft_type] = method


def _method(folder: Path, peft_type: object) -> AdapterMethod:
    name = peft_type if isinstance(peft_type, str) else ""
    if name not in _METHODS:
        register_now()
    if name not in _METHODS:
        raise InputError(
            f"{folder} is an adapter of type {peft_type}, and only {', '.join(sorted(_METHODS))} can be read over a "
            f"base; merge it with PEFT (model.merge_and_unload()), save the model and pass that folder"
        )
    return _METHODS[name]


def adapter_tensors(folder: Path, open_tensors: Callable[[Path], Checkpoint], file: str | None = None) -> Checkpoint:
    """The tensors of an adapter, under the names that PEFT's `save_pretrained` gives them.

    Read as well: names with the adapter's name in them, with or without `base_model.model.` (once or more), or with
    what compilers and sharding put in front. Copies of a retrained module that is there under its own name are left
    out, and so is the original that it replaced.

    Raises:
        InputError: there is no such file, it holds several adapters, two tensors of one name, or those of another tool.
    """
    file = file or next((name for name in ADAPTER_TENSORS if (folder / name).exists()), None)
    if file is None:
        raise InputError(f"{folder} has {ADAPTER_CONFIG} but no adapter_model.safetensors; save the adapter again")
    stored = open_tensors(inside(folder, file))
    plain = {name: _plain(name) for name in stored.names()}
    foreign = next((name for name in plain if _KOHYA.search(name)), None)
    if foreign is not None:
        raise InputError(
            f"the file of the adapter {folder} holds {foreign}, a name of kohya's trainers or diffusers, not of PEFT "
            f"(lora_A, lora_B); convert the adapter to PEFT's format first"
        )
    named = _peft_names(plain, folder)
    read = frozenset(named.values())
    for name, short in plain.items():  # a copy of a retrained tensor is left out if it holds the same numbers
        match = _RETRAINED.fullmatch(short) if name not in read else None
        own = match and f"{PEFT_PREFIX}{match['module']}.{match['inner'].partition('.')[2] or match['inner']}"
        kept = named.get(own or "")
        if kept is not None and not torch.equal(stored.read(name), stored.read(kept)):
            raise InputError(
                f"the file of the adapter {folder} holds {kept} and {name}, which are two names of one tensor and hold "
                f"different numbers; remove one of them"
            )
    return RenamedCheckpoint(stored, named)


def _plain(name: str) -> str:
    """The name of the tensor in the model, whatever wrappers the model was saved in."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while name.startswith(_FRONTS):
        name = next(name.removeprefix(front) for front in _FRONTS if name.startswith(front))
    return name


def _peft_names(plain: Mapping[str, str], folder: Path) -> dict[str, str]:
    """PEFT's name → the stored one, from the stored name → the one in the model."""
    adapters = sorted({match["adapter"] for name in plain.values() if (match := _TRAINED.fullmatch(name))} - {None})
    if len(adapters) > 1:
        raise InputError(
            f"the file of the adapter {folder} holds several adapters ({', '.join(adapters)}); save each one into its "
            "own folder (model.save_pretrained(folder, selected_adapters=[...]))"
        )
    every = set(plain.values())
    named: dict[str, str] = {}
    for name, short in plain.items():
        new = _without_adapter(short, {*adapters, "default"}, every)
        if new is not None and named.setdefault(f"{PEFT_PREFIX}{new}", name) != name:
            raise InputError(
                f"the file of the adapter {folder} holds {named[PEFT_PREFIX + new]} and {name}, which are two names of "
                f"one tensor; remove one of them"
            )
    return named


def _without_adapter(name: str, adapters: set[str], all_names: set[str]) -> str | None:
    """PEFT's name of a tensor; None for a copy that says nothing."""
    if ".original_module." in name:
        return None
    if match := _TRAINED.fullmatch(name):
        return f"{match['module']}{match['leaf'] or ''}"
    if match := _RETRAINED.fullmatch(name):
        first, _, rest = match["inner"].partition(".")
        own = f"{match['module']}.{rest if rest and first in adapters else match['inner']}"
        return None if own in all_names else own
    return name


def _open_named_base(folder: Path, named: object, open_source: Callable[[str], Checkpoint]) -> Checkpoint:
    if not isinstance(named, str) or not named:
        raise InputError(
            f"{folder / ADAPTER_CONFIG} does not name its base; set base_model_name_or_path to the model's folder or "
            "hub id"
        )
    path = named if Path(named).exists() or not (folder / named).exists() else str(folder / named)
    if (Path(path) / ADAPTER_CONFIG).exists():
        raise InputError(
            f"the adapter in {folder} has an adapter as its base ({path}); merge that one into its model first"
        )
    try:
        return open_source(path)
    except InputError as error:
        raise InputError(
            f"the base of the adapter in {folder} cannot be opened: {error}. "
            f"Its adapter_config.json names it under base_model_name_or_path; correct that, or give the base yourself"
        ) from error


class RenamedCheckpoint(View):
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

    def _place(self, name: str) -> tuple[Checkpoint, str]:
        return self._stored, self._names[name]


class AdaptedBase(View):
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
        self._base_names = frozenset(base.names())
        self._tensors = tensors

    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._base.names(), *self.stored, *self.aliases)))

    def _place(self, name: str) -> tuple[Checkpoint, str]:
        if name in self.stored:
            return self._tensors, self.stored[name]
        return self._base, self.aliases.get(name, name)

    def tied(self) -> Mapping[str, str]:
        return self._base.tied()

    def module_type(self, name: str) -> type[nn.Module] | None:
        return self._base.module_type(name) if name in self._base_names else None


class AdapterCheckpoint(View):
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
            raise InputError(_misfit(adapter, fit))
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

    def _place(self, name: str) -> tuple[Checkpoint, str]:
        return self.start, name

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
        if name in self.edits:
            return self.read(name).reshape(-1, width)[rows]
        return self.start.take_rows(name, rows, width)

    def holds_rows(self, name: str) -> bool:
        return name not in self.edits and self.start.holds_rows(name)

    def alone(self, name: str) -> Checkpoint | None:
        return None if name in self.edits else self.start.alone(name)

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
        for names in (updates, whole):  # of two parameters that are one tensor of the base, one would hide the other
            first: dict[str, str] = {}
            for name in names:
                place = places[name]
                if place is not None and first.setdefault(place, name) != name:
                    raise InputError(
                        f"the adapter in {adapter.folder} adapts {first[place]} and {name}, which are both {place} of "
                        f"its base {adapter.base.source}; remove one of them"
                    )
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
        for table in sorted(self.tables & self.tied.keys()):  # the base of an update is that of all tied to it
            for name, group in self.tied.items():
                if group == self.tied[table] and name not in self.stored:
                    self.stored[name] = self.stored[table]
                    self.tables = self.tables | {name}

    def _is_piece(self, parameter: str) -> bool:
        """Whether the base has others of the kind, or the rest of the layer: then it is no head of the adapter's."""
        module, _, leaf = parameter.rpartition(".")
        if leaf == "bias" and matrix_name(f"{module}.weight") in self._of_base:
            return True
        return layer_number(parameter) >= 0 and kind_of(matrix_name(parameter)) in set(map(kind_of, self._of_base))

    @cached_property
    def _of_base(self) -> frozenset[str]:
        return frozenset(matrix_name(name) for name in self._base.names())


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
    if table is not None:
        size = base.shape(table)
        alike = [n for n in base.names() if n != table and layer_number(n) < 0 and base.shape(n) == size]
        if {table, *alike} & set(places.values()) - ties.keys():
            kind = base.dtype(table)
            ties |= {
                name: table
                for name in alike
                if name not in ties and base.dtype(name) == kind and torch.equal(base.read(name), base.read(table))
            }
    return aliases, ties | {first: first for first in ties.values()}


def _misfit(adapter: Adapter, fit: _Fit) -> str:
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
