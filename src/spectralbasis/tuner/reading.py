"""Read spectral adapters as checkpoints: `W + U C Vᵀ`, with the directions that the tuner finds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from spectralbasis.checkpoints import Adapter, AdapterMethod, Checkpoint, matrix_name, register_adapter_method
from spectralbasis.checkpoints.adapters import Edit, adapted_name
from spectralbasis.checkpoints.matrices import Cut
from spectralbasis.checkpoints.names import conversions_of, part_number
from spectralbasis.errors import InputError
from spectralbasis.peft_import import METHOD
from spectralbasis.triplets import matrix_hash
from spectralbasis.tuner.config import SpectralConfig, read_config
from spectralbasis.tuner.factors import names_in_basis
from spectralbasis.tuner.forms import FORMS
from spectralbasis.tuner.layer import COEFFICIENTS_OF, DENSE_DTYPES, dense_update
from spectralbasis.tuner.preparation import Preparation, Target, prepare


class UpdateFactors(NamedTuple):
    """`ΔW = U C Vᵀ`: U (m, k), C (k, k) and V (n, k), m being the outputs, in float32 or wider.

    `transposed` says whether the base stores the weight as (n, m).
    """

    U: Tensor
    C: Tensor
    V: Tensor
    transposed: bool


@dataclass(frozen=True)
class SpectralEdit:
    """Adds `U C Vᵀ` to one tensor of the base, which is hashed and decomposed when called.

    Attributes:
        tensors: the adapter's.
        coefficients: name of C among them.
        config: the adapter's, with the record of this matrix only.
        matrix: name of the matrix in the config.
        span: where its numbers are in the stored tensor; None where they are all of it.
        basis_name: how the basis file calls the matrix; empty where it has the same name there.
    """

    tensors: Checkpoint
    coefficients: str
    config: SpectralConfig
    matrix: str
    span: tuple[int, int] | None = None
    basis_name: str = ""

    @property
    def module(self) -> str:
        """The module, as the adapter's file names it."""
        return adapted_name(self.coefficients).partition(COEFFICIENTS_OF)[0]

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
        expected = self.config.matrix(self.matrix).base_hash
        return weight.ndim == 2 and matrix_hash(weight) != expected and matrix_hash(weight.T) == expected

    def _tuned(self, W: Tensor) -> Tensor:
        C, U, V, form = self._terms(W)
        return W.to(C.dtype) + dense_update(C, U, V, form)

    def factors(self, weight: Tensor) -> UpdateFactors:
        """The factors of the update of this weight.

        Raises:
            BaseMismatchError: see `__call__`.
        """
        transposed = self.transposed(weight)
        C, U, V, form = self._terms(weight.T if transposed else weight.flatten(1))
        return UpdateFactors(U, FORMS[form].left_factor(torch.eye(U.shape[1], dtype=U.dtype), C), V, transposed)

    def _terms(self, W: Tensor) -> tuple[Tensor, Tensor, Tensor, str]:
        """C, U (m, k), V (n, k) and the form of C, all in float32 or wider."""
        prepared = self._prepare(W)
        parametrisation, dtype = prepared.parametrisation, torch.promote_types(W.dtype, torch.float32)
        numbers = self.tensors.read(self.coefficients).to(dtype).flatten()
        numbers = numbers if self.span is None else numbers[slice(*self.span)]
        C = parametrisation(numbers.reshape(parametrisation.shape))
        U, V = prepared.directions
        return C, U.to(dtype), V.to(dtype), parametrisation.form

    def _prepare(self, W: Tensor) -> Preparation:
        target = Target(self.matrix, self.matrix, W, basis_name=self.basis_name)
        _, prepared = prepare(self.config, [target], W.numel())
        return prepared[self.matrix]


@dataclass(frozen=True)
class StackEdit:
    """Adds `U C Vᵀ` to matrices within one tensor of the base, such as the experts of a stack.

    Attributes:
        pieces: where each matrix is in the tensor, and what is done to it.
    """

    pieces: tuple[tuple[Cut, SpectralEdit], ...]

    def __call__(self, weight: Tensor) -> Tensor:
        """The tuned tensor in the layout of the base's, in float32 or wider; see `SpectralEdit`."""
        return self.within(0, len(weight))(weight)

    def within(self, start: int, stop: int) -> Edit:
        """What is done to the experts from `start` to `stop` alone, given these of the stack."""
        return lambda weight: self._changed(weight, start, stop)

    def check(self, weight: Tensor) -> None:
        """Raise BaseMismatchError unless the first matrix is the one that the adapter was trained on."""
        cut, edit = self.pieces[0]
        edit.check(cut.of(weight))

    def _changed(self, weight: Tensor, start: int, stop: int) -> Tensor:
        tuned = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for cut, edit in self.pieces:
            if cut.expert is None or start <= cut.expert < stop:
                here = cut if cut.expert is None else replace(cut, expert=cut.expert - start)
                here.put(tuned, edit(here.of(weight)))
        return tuned


def spectral_edits(adapter: Adapter) -> Mapping[str, Edit]:
    """The edits of a spectral adapter, by tensor of the base.

    The smallest adapted tensor is checked here, so that a wrong base is found before anything is computed.

    Raises:
        BaseMismatchError: the base is not the one that the adapter was trained on.
        InputError: the config is damaged, or does not fit the coefficients or the base.
    """
    config = read_config(adapter.folder)
    edits: dict[str, SpectralEdit | StackEdit] = {}
    inside: dict[str, tuple[str, tuple[int, int] | None]] = {}
    for stored in adapter.tensors.names():
        module, found, _ = adapted_name(stored).partition(COEFFICIENTS_OF)
        if not found:
            continue
        tensor = adapter.find_base_tensor(f"{module}.weight")
        if tensor is not None:
            edits[tensor] = _edit(adapter, config, module, stored, tensor)
        else:
            inside |= {name: (stored, span) for name, span in _matrices(adapter, config, module, stored).items()}
    edits |= _edits_inside(adapter, config, inside)
    _check_complete(adapter, config, edits)
    if edits:
        smallest = min(edits, key=lambda tensor: prod(adapter.base.shape(tensor)))
        edits[smallest].check(adapter.base.read(smallest))
    return edits


def _check_complete(adapter: Adapter, config: SpectralConfig, edits: Mapping[str, SpectralEdit | StackEdit]) -> None:
    """Raise InputError if the adapter's file lacks the coefficients of a recorded matrix that the base has."""
    pieces = [one.pieces if isinstance(one, StackEdit) else ((None, one),) for one in edits.values()]
    held = {edit.matrix for found in pieces for _, edit in found}
    lost = [name for name in config.ranks or {} if name not in held and adapter.find_base_tensor(f"{name}.weight")]
    if lost:
        raise InputError(lacking(adapter.folder, lost, len(config.ranks or {})))


def lacking(folder: Path, lost: Sequence[str], count: int) -> str:
    """What is wrong where an adapter's file lacks matrices of its record."""
    return (
        f"the file of the adapter {folder} holds no coefficients of {lost[0]} ({len(lost)} of {count} matrices that "
        "its adapter_config.json records); it was cut short, so restore it, or save the adapter again"
    )


def check_layers_alone(config: SpectralConfig, folder: Path) -> None:
    """Raise InputError for an adapter of parameters, whose numbers are of several matrices in one tensor."""
    if config.target_parameters:
        raise InputError(
            f"{folder} adapts stacks of experts, target_parameters={sorted(config.target_parameters)}, whose "
            "coefficients can only be read together with the model; compare updates instead (of='updates', --of "
            "updates), or merge it: spectralbasis export ADAPTER --to merged"
        )


def _edit(adapter: Adapter, config: SpectralConfig, module: str, stored: str, tensor: str) -> SpectralEdit:
    name = module if module in (config.base_hashes or {}) else matrix_name(module)
    found = _edit_of(adapter, config, name, stored)
    k, weight = config.matrix(name).k, adapter.base.shape(tensor)
    if adapter.base.dtype(tensor) not in DENSE_DTYPES or len(weight) < 2 or k > min(weight[0], prod(weight[1:])):
        raise InputError(
            f"{adapter.folder}: {name} cannot have {k} singular directions in {adapter.base.source}, where it is "
            f"{'×'.join(map(str, weight))} of {adapter.base.dtype(tensor)}; give the base that it was trained on"
        )
    shape, expected = adapter.tensors.shape(stored), config.stored_shape(config.matrix(name))
    if shape not in (expected, (prod(expected),)):
        raise InputError(
            f"{adapter.folder}: {name} has coefficients of shape {shape}, but adapter_config.json says "
            f"{config.coefficients} with k={k}; the two files belong to different adapters"
        )
    return found


def _edit_of(
    adapter: Adapter, config: SpectralConfig, name: str, stored: str, span: tuple[int, int] | None = None
) -> SpectralEdit:
    """What is done to one matrix, with the record of this matrix only."""
    if name not in (config.base_hashes or {}):
        raise InputError(
            f"{adapter.folder}: adapter_config.json has no base_hashes, ranks and probes for {name}, so it is unknown "
            "which weights the coefficients belong to; save the adapter again"
        )
    others = names_in_basis(config.basis, [name], lambda: conversions_of(adapter.base.config))
    return SpectralEdit(
        adapter.tensors,
        stored,
        config.with_record({name: config.matrix(name)}),
        name,
        span,
        others.get(name, ""),
    )


def _matrices(adapter: Adapter, config: SpectralConfig, module: str, stored: str) -> dict[str, tuple[int, int] | None]:
    """Matrix → where its numbers are in a stored tensor; None where they are all of it.

    The numbers of all matrices in one parameter are stored in a row, by expert and then by part. Which parameter of
    the module it is, only the length of the row tells.
    """
    plain = matrix_name(module)
    if plain in (config.base_hashes or {}):
        return {plain: None}
    groups: dict[str, dict[tuple[int, ...], str]] = {}
    for name in config.base_hashes or {}:
        if name.startswith(f"{plain}."):
            parameter, order = _place_in_stack(name.removeprefix(f"{plain}."))
            groups.setdefault(parameter, {})[order] = name
    length = prod(adapter.tensors.shape(stored))
    rows = [[names[order] for order in sorted(names)] for names in groups.values()]
    fitting = [row for row in rows if sum(prod(config.stored_shape(config.matrix(name))) for name in row) == length]
    if len(fitting) != 1:
        raise InputError(
            f"{adapter.folder}: {stored} holds {length} coefficients, and adapter_config.json does not say which "
            "matrices they belong to; load the adapter with PEFT and merge it: model.merge_and_unload()"
        )
    spans: dict[str, tuple[int, int] | None] = {}
    start = 0
    for name in fitting[0]:
        stop = start + prod(config.stored_shape(config.matrix(name)))
        spans[name] = start, stop
        start = stop
    return spans


def _place_in_stack(rest: str) -> tuple[str, tuple[int, ...]]:
    """The parameter, and the numbers of expert and part, of `3.gate_up_proj.up` or `input_linear.3.up`."""
    numbers = [int(part) for part in rest.split(".") if part.isdigit()]
    words = [part for part in rest.split(".") if not part.isdigit()]
    part = part_number(words[-1]) if len(words) > 1 else -1
    return words[0], (*numbers, part)


def _edits_inside(
    adapter: Adapter, config: SpectralConfig, wanted: Mapping[str, tuple[str, tuple[int, int] | None]]
) -> dict[str, SpectralEdit | StackEdit]:
    """The edits of matrices that are parts of tensors of the base, or that the base has one by one."""
    if not wanted:
        return {}
    held = adapter.find_matrices(list(wanted))
    absent = [name for name in wanted if name not in held]
    if absent:
        raise InputError(
            f"the adapter in {adapter.folder} adapts {absent[0]} ({len(absent)} of {len(wanted)} matrices of its "
            f"stacks), which its base {adapter.base.source} does not have; give the model that it was trained on"
        )
    pieces: dict[str, list[tuple[Cut, SpectralEdit]]] = {}
    for name, (stored, span) in wanted.items():
        cut = held[name].cut
        pieces.setdefault(cut.tensor, []).append((cut, _edit_of(adapter, config, name, stored, span)))
    return {tensor: StackEdit(tuple(sorted(found, key=_order))) for tensor, found in pieces.items()}


def _order(piece: tuple[Cut, SpectralEdit]) -> tuple[int, int]:
    cut = piece[0]
    return cut.expert or 0, cut.rows.start if cut.rows else 0


def may_be_inside(adapter: Adapter, parameter: str) -> bool:
    """Whether a parameter that the base does not name is a matrix, or several, that the base has within a tensor."""
    plain = matrix_name(parameter)
    recorded = [
        name for name in adapter.config.get("base_hashes") or {} if name == plain or name.startswith(f"{plain}.")
    ]
    return bool(recorded) and len(adapter.find_matrices(recorded)) == len(recorded)


register_adapter_method(METHOD, AdapterMethod(prefix="spectral_", edits=spectral_edits, inside=may_be_inside))
