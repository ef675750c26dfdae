"""Plan an adapter from a config and a model, with all checks before the model is changed.

`plan_adapter` finds the matrices of a config (`Target`), sets k for each, finds U and V, and checks or makes the
record.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from spectralbasis.basis import SpectralBasis
from spectralbasis.checkpoints.names import conversions_of, same_names
from spectralbasis.errors import BaseMismatchError, InputError
from spectralbasis.kinds import KINDS
from spectralbasis.linalg import Leading, resolve_leading
from spectralbasis.printable import warn
from spectralbasis.records import pattern_of
from spectralbasis.triplets import matrix_hash
from spectralbasis.tuner.config import MatrixRecord, SpectralConfig, same_weights
from spectralbasis.tuner.factors import (
    BASES,
    Directions,
    Factors,
    directions_of,
    names_in_basis,
    singular_values_in,
    source_of,
)
from spectralbasis.tuner.forms import Parametrisation
from spectralbasis.tuner.layer import SpectralLayer, backend_of, check_dense, dequantized, to_matrix
from spectralbasis.tuner.parameters import ParamWrapper, Slice, held_parameters, is_transposed, slices
from spectralbasis.tuner.targets import (
    check_layer,
    count_parameters,
    is_layer,
    is_matrix,
    kinds_of,
    targeted,
    unique_names,
)

DEFAULT_LEADING = 64
"""Directions of a matrix that are looked at where nothing says how many; for those that are trained see `Kind`."""
PROBE_TOLERANCE = 1e-2
"""Probes are of order 1: below this, directions agree as well as float32 singular vectors of one matrix can."""


@dataclass(frozen=True)
class Target:
    """A named matrix to adapt.

    Attributes:
        key: of its module in the model, or of the matrix in a parameter (`parameters.Slice`).
        name: the stable name of the matrix.
        W: the original weight, (m, n); of a quantized one, what can be had of it.
        known_hash: of the weight before it was quantized, where a basis file tells it.
        also: other keys by which patterns may name it.
        held: the factors that adapters of its layer have already.
        basis_name: how the basis file calls it; empty where it has the same name there.
    """

    key: str
    name: str
    W: Tensor
    known_hash: str | None = None
    also: tuple[str, ...] = ()
    held: tuple[Factors, ...] = ()
    basis_name: str = ""

    @property
    def name_in_basis(self) -> str:
        """How a basis calls the matrix."""
        return self.basis_name or self.name

    @cached_property
    def hash(self) -> str:
        """What identifies the base: the hash of the weight, of a quantized one that of its original where known."""
        return self.known_hash or matrix_hash(self.W)


@dataclass(frozen=True)
class Preparation:
    """What a layer needs of one matrix to take an adapter."""

    parametrisation: Parametrisation
    factors: Factors

    @property
    def directions(self) -> tuple[Tensor, Tensor]:
        """U (m, k) and V (n, k)."""
        return self.factors.first(self.parametrisation.k)


@dataclass(frozen=True)
class Plan:
    """What a config comes to on one model.

    Attributes:
        config: complete: what it names is written out, and it has the record.
        matrices: key of a layer, or of a matrix in a parameter → its preparation.
        stacks: key of each parameter that is adapted → all matrices in it.
    """

    config: SpectralConfig
    matrices: dict[str, Preparation]
    stacks: dict[str, list[Slice]]


def plan_adapter(config: SpectralConfig, model: nn.Module) -> Plan:
    """Find and prepare what a config means in a model; neither is changed.

    Raises:
        BaseMismatchError: weights or directions are not those that the adapter was trained on.
        InputError: a module cannot be adapted, or a budget or a basis file does not fit the model.
    """
    config, targets, stacks = all_targets(config, model)
    config, prepared = prepare(config, targets, count_parameters(model))
    return Plan(config, prepared, stacks)


def all_targets(
    config: SpectralConfig, model: nn.Module
) -> tuple[SpectralConfig, list[Target], dict[str, list[Slice]]]:
    """The matrices that a config means, with their original weights.

    Returns:
        The config as `targeted` writes it out, the matrices, and for each parameter that is adapted all matrices in it.

    Raises:
        InputError: one has no matrix that coefficients can be put on.
    """
    found = targeted(align_record(config, model) if config.bound else config, model)
    stacked = [
        replace(target, also=(*target.also, *(key for keys in found.former.get(target.key, ()) for key in keys)))
        for target in parameter_targets(model, found.parameters)
    ]
    stacks = {one.key: slices(one) for one in held_parameters(model) if one.key in found.parameters}
    basis = found.config.basis
    targets = named_in_basis([*find_targets(found.modules, basis), *stacked], basis, model)
    return found.config, targets, stacks


def find_targets(modules: Mapping[str, nn.Module], basis: str = "pretrained") -> list[Target]:
    """Name the modules and read their weights, as they were before any merge.

    Args:
        modules: key in the model → module.
        basis: as in `SpectralConfig`; a file says what quantized weights were before.

    Raises:
        InputError: a module has no matrix that coefficients can be put on.
    """
    names = unique_names(list(modules))
    file = None if basis in BASES else SpectralBasis.load(basis)
    found = []
    for key, module in modules.items():
        layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        backend = backend_of(layer)
        if backend is None:
            check_layer(key, layer)
            weight = module.original_weight if isinstance(module, SpectralLayer) else layer.weight.detach()
            check_dense(key, weight)
            target = Target(key, names[key], to_matrix(weight, layer))
        else:
            target = _quantized_target(key, names[key], module, backend, file)
        held = (
            tuple(cast(Iterable[Factors], module.spectral_factors.values()))
            if isinstance(module, SpectralLayer)
            else ()
        )
        found.append(replace(target, held=held))
    return found


def _quantized_target(
    key: str, name: str, module: nn.Module, backend: QuantizationBackend, file: SpectralBasis | None
) -> Target:
    original = file[name] if file is not None and name in file else None
    try:
        # On the CPU, since the dequantized weights of all targets are held at once and may not fit on the device.
        W = (module.original_weight if isinstance(module, SpectralLayer) else dequantized(module, backend)).cpu()
    except InputError as error:
        if original is None:
            raise InputError(f"{key}: {error}") from error
        return Target(key, name, (original.U * original.S) @ original.Vh, original.base_hash)
    if original is None or file is None:
        return Target(key, name, W)
    # Rounding W moves `u_iᵀ W v_i` by far less than half of it.
    values = ((W.float() @ original.Vh.T) * original.U).sum(0) if original.shape == tuple(W.shape) else None
    if values is None or torch.linalg.norm(values - original.S) > torch.linalg.norm(original.S) / 2:
        raise InputError(
            f"the basis file is of {file.source or 'a model'}, whose weights are not those that {name} was quantized "
            "from; compute it from the checkpoint that was quantized: spectralbasis basis MODEL -o FILE"
        )
    return Target(key, name, W, original.base_hash)


def parameter_targets(model: nn.Module, wanted: Mapping[str, Sequence[str]]) -> list[Target]:
    """The matrices in parameters, with their original weights.

    Args:
        model: with or without adapters.
        wanted: key of the parameter → keys of its matrices.

    Raises:
        InputError: a parameter has other than two or three dimensions, or no dense weight.
    """
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    originals = {(id(one.get_base_layer()), one.parameter_name): one.original_weight for one in wrappers}
    found = []
    for held in held_parameters(model):
        if held.key not in wanted:
            continue
        weight = originals.get((id(held.module), held.attribute), held.parameter.detach())
        check_dense(held.key, weight)
        turned = weight.mT if is_transposed(held.module, held.attribute) else weight
        for one in slices(held):
            if one.key in wanted[held.key]:
                W = turned if one.expert is None else turned[one.expert]
                W = W if one.rows is None else one.rows.of(W)
                whole = one.key if one.rows is None else one.key.rpartition(".")[0]  # without the part of a fused one
                found.append(Target(one.key, one.key, W, also=(held.key.removesuffix(".weight"), whole)))
    names = unique_names([target.key for target in found])
    return [replace(target, name=names[target.key]) for target in found]


def named_in_basis(targets: Sequence[Target], basis: str | SpectralBasis, model: nn.Module) -> list[Target]:
    """The targets with the names that a basis file has for them; see `factors.names_in_basis`."""
    others = names_in_basis(basis, [target.name for target in targets], lambda: conversions_of(model))
    return [replace(target, basis_name=others.get(target.name, "")) for target in targets]


def align_record(config: SpectralConfig, model: nn.Module) -> SpectralConfig:
    """The config with the names that the matrices of its record have in this model.

    An adapter that was made under another release of transformers, or on another class of model, records other names
    of the same matrices. They are found by the table of the installed release, and by the hashes of the weights where
    that knows nothing of them, as release 4 knows nothing of the names of release 5. Stacks of experts among them
    become `target_parameters`.

    Raises:
        InputError: the adapter keeps in stacks what this model has one by one.
    """
    recorded = config.ranks or {}
    stacks = [(one.key, piece.name) for one in held_parameters(model) if is_matrix(one) for piece in slices(one)]
    layers = unique_names([key for key, module in model.named_modules() if key and is_layer(module)])
    here = {*layers.values(), *(name for _, name in stacks)}
    unknown = [name for name in recorded if name not in here]
    if unknown:
        table = conversions_of(model)
        names = same_names(unknown, [name for name in here if name not in recorded], lambda: (table, table))
        if len(names) < len(unknown):
            names |= _same_weights(config, [name for name in unknown if name not in names], layers, model)
        config = config.with_record({names.get(name, name): one for name, one in config.record.items()}, renamed=names)
    given = tuple(f".{name}" for name in config.target_parameters or ())
    ranks = config.ranks or {}
    parameters = kinds_of(key for key, name in stacks if name in ranks and not f".{key}".endswith(given))
    if parameters:
        config = config.changed(target_parameters=sorted({*(config.target_parameters or ()), *parameters}))
    return config


def _same_weights(
    config: SpectralConfig, unknown: Sequence[str], layers: Mapping[str, str], model: nn.Module
) -> dict[str, str]:
    """Recorded name → name here of the same weight, among layers that the record does not name."""
    recorded, modules = config.base_hashes or {}, dict(model.named_modules())
    found = {}
    for key, name in layers.items():
        if name not in recorded:
            with suppress(InputError):  # what takes no adapter is none of those that were adapted
                found[name] = find_targets({key: modules[key]})[0].hash
    names = same_weights({name: recorded[name] for name in unknown}, found)
    if names and config.target_parameters:
        name = next(iter(names))
        raise InputError(
            f"the adapter keeps the coefficients of {name} in a stack of experts, target_parameters="
            f"{sorted(config.target_parameters)}, and this model has that matrix as a layer, {names[name]}; load it "
            "under the release of transformers that it was made with, or merge it there: spectralbasis export ADAPTER "
            "--to merged"
        )
    return names


def prepare(
    config: SpectralConfig, targets: Sequence[Target], total: int
) -> tuple[SpectralConfig, dict[str, Preparation]]:
    """Resolve ranks, find the factors, check or make the record.

    Args:
        config: with a record, it must fit these matrices.
        targets: the matrices to adapt.
        total: parameters of the model, of which a budget is a fraction.

    Returns:
        The config with the record, and key → preparation.

    Raises:
        BaseMismatchError: weights or directions are not those that the adapter was trained on.
        InputError: a budget or a basis file does not fit the model.
    """
    hashes = {target.name: target.hash for target in targets}
    if config.bound:
        config = _fitted(config, hashes)
        record = config.record
    elif config.coefficients == "sparse":
        raise InputError(
            "coefficients='sparse' needs to know which entries to train; pick them first: "
            "config = spectralbasis.calibrate(model, batches, config)"
        )
    else:
        ranks = resolve_ranks(config, targets, total)
        record = {name: MatrixRecord(base_hash, ranks[name], []) for name, base_hash in hashes.items()}
    directions = directions_of(config.basis, tolerance=config.tolerance, seed=config.basis_seed)
    source = source_of(config.basis, config.basis_seed)
    prepared = {}
    for target in targets:
        one = record[target.name]
        held = (factors for factors in target.held if factors.source == source and factors.k >= one.k)
        factors = next(held, None) or Factors(*_decompose(directions, target, one.k), source)
        if not config.bound:
            values = _singular_values(config, target, factors, one.k)
            one = one._replace(scales=_scales(config, target.W, factors, one.k), values=values)
        preparation = Preparation(config.parametrisation(one), factors)
        probes = factors.probe(preparation.parametrisation.form, one.k)
        if config.bound:
            _check_probes(target.name, probes, one.probes)
        prepared[target.key] = preparation
        record[target.name] = one if config.bound else one._replace(probes=probes)
    return (config if config.bound else config.with_record(record)), prepared


def _fitted(config: SpectralConfig, hashes: Mapping[str, str]) -> SpectralConfig:
    """A bound config without what these matrices lack; they have to be those that it records."""
    expected = config.base_hashes or {}
    absent = [name for name in expected if name not in hashes]
    if absent:
        warn(
            f"the model has no {absent[0]} ({len(absent)} of {len(expected)} matrices are missing); "
            "the adapter's coefficients for it are left out",
            stacklevel=2,
        )
        # or the adapter, saved again, would record what it does not hold
        config = config.with_record({name: one for name, one in config.record.items() if name in hashes})
    unknown = [name for name in hashes if name not in expected]
    if unknown:
        raise InputError(
            f"the adapter has no record of {unknown[0]}; it was made for other modules; pass target_modules as they "
            "were, or make a new SpectralConfig"
        )
    changed = [name for name, found in hashes.items() if expected[name] != found]
    if changed:
        base = config.base_model_name_or_path or "the base that it was trained on"
        raise BaseMismatchError(
            f"{changed[0]} has hash {hashes[changed[0]]}, but the adapter was made on {expected[changed[0]]} "
            f"({len(changed)} of {len(hashes)} matrices differ); load it on {base}, in the same dtype or wider: a base "
            "rounded to 16 bits is another base, so add the adapter before the cast"
        )
    return config


def _decompose(directions: Directions, target: Target, k: int) -> tuple[Tensor, Tensor]:
    try:
        return directions(target.name_in_basis, target.W, k, target.hash)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{target.name}: {error}; leave it out with exclude_modules") from error


def _check_probes(name: str, found: Sequence[float], expected: Sequence[float]) -> None:
    distance = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    if not distance <= PROBE_TOLERANCE:
        raise BaseMismatchError(
            f"the directions found for {name} are not those that its coefficients were trained on (probes "
            f"differ by {distance:.2g}): nearly equal singular values, or another basis file; "
            "where the adapter was trained, write the file with: spectralbasis basis MODEL -o FILE, "
            "put it in the adapter's folder, and set basis to its name in adapter_config.json"
        )


def _scales(config: SpectralConfig, W: Tensor, factors: Factors, k: int) -> list[float] | None:
    """The record of `SpectralConfig.scaling` for one matrix, rounded to what its JSON and float32 hold alike."""
    if config.scaling == "absolute":
        return None
    if config.scaling == "normalized":
        return normalized_scale(KINDS[config.coefficients].fan_in(k, config.size))
    W = W.float()
    U, V = (factor.to(W) for factor in factors.first(k))
    return _recorded((U * (W @ V)).sum(0).abs())


def _recorded(values: Tensor) -> list[float]:
    return [float(f"{value:.7g}") for value in values.tolist()]


def _singular_values(config: SpectralConfig, target: Target, factors: Factors, k: int) -> list[float] | None:
    """Σ of the directions, for kinds of coefficients that need it; rounded as scales are.

    Raises:
        InputError: the directions are no singular vectors of the weight, so they have no Σ.
    """
    if not KINDS[config.coefficients].singular:
        return None
    U, V = factors.first(k)
    S = singular_values_in(config.basis, target.name_in_basis, target.W, U, V, target.hash)
    if S is None:
        raise InputError(
            f"coefficients={config.coefficients!r} turn singular vectors, but the directions of {target.name} are no "
            f"singular vectors of this weight (basis={config.basis!r}); pass basis='pretrained' or 'minor', a basis "
            "file of these very weights, or coefficients='block'"
        )
    return _recorded(S)


def normalized_scale(fan_in: float) -> list[float]:
    """The record of the scaling "normalized", from how many trained numbers meet in one left direction on average."""
    return [float(f"{fan_in**-0.5:.7g}")]


@dataclass(frozen=True)
class Allocation:
    """How many numbers an adapter trains.

    Attributes:
        ranks: matrix name → k.
        trained: coefficients over all matrices; heads and biases are not counted.
        total: parameters of the model without adapters.
    """

    ranks: Mapping[str, int]
    trained: int
    total: int

    @property
    def share(self) -> float:
        """`trained / total`."""
        return self.trained / self.total


def resolve_ranks(config: SpectralConfig, targets: Sequence[Target], total: int) -> dict[str, int]:
    """Matrix name → k, by `leading` or `budget` and `rank_pattern`; a warning names patterns that match nothing.

    Raises:
        InputError: the budget does not pay for k = 1.
    """
    weights = {target.name: target.W for target in targets}
    patterns = config.rank_pattern
    matched = {target.name: _pattern_of(target, patterns) for target in targets}
    fixed = {name: patterns[pattern] for name, pattern in matched.items() if pattern is not None}
    unused = [pattern for pattern in patterns if pattern not in matched.values()]
    if unused:
        warn(
            f"rank_pattern {', '.join(map(repr, unused))} matches no matrix that is adapted and is not used",
            stacklevel=2,
        )
    if config.budget is None:
        return allocate_leading(config.leading, weights, fixed, KINDS[config.coefficients].leading)
    return allocate_budget(config.budget, total, weights, fixed, config.coefficients, config.size)


def _pattern_of(target: Target, patterns: Mapping[str, int]) -> str | None:
    found = (pattern_of(patterns, key) for key in (target.key, *target.also))
    return next((pattern for pattern in found if pattern is not None), None)


def allocate_leading(
    leading: Leading | None, weights: Mapping[str, Tensor], fixed: Mapping[str, int], usual: int = DEFAULT_LEADING
) -> dict[str, int]:
    """k of each matrix by a number, a fraction or a rule; min(m, n) where that is smaller, with one warning.

    Args:
        leading: see `linalg.resolve_leading`; None is `usual`, or min(m, n) where that is smaller.
        weights: matrix name → W, (m, n).
        fixed: matrix name → k, of the matrices whose k is settled already.
        usual: see `leading`.
    """
    fixed = {name: leading for name in weights if isinstance(leading, int)} | dict(fixed)
    fixed = _lowered(fixed, weights)

    def default(W: Tensor) -> int:
        return min(usual, *W.shape) if leading is None else resolve_leading(leading, W)

    return {name: fixed[name] if name in fixed else default(W) for name, W in weights.items()}


def allocate_budget(
    budget: float,
    total: int,
    weights: Mapping[str, Tensor],
    fixed: Mapping[str, int],
    coefficients: str,
    size: int = 1,
) -> dict[str, int]:
    """The largest k, one for all matrices (min(m, n) where that is smaller), that trains at most `budget * total`.

    Args:
        budget: fraction of the model's parameters.
        total: parameters of the model.
        weights: matrix name → W, (m, n).
        fixed: matrix name → k, of the matrices whose k is settled already; they are paid first. Where min(m, n) is
            smaller, k is that, with one warning.
        coefficients: name of a kind, one of `KINDS`.
        size: value of the kind's option, such as the bandwidth of a band.

    Raises:
        InputError: the budget does not pay for k = 1.
    """
    fixed = _lowered(fixed, weights)
    sides = {name: min(W.shape) for name, W in weights.items() if name not in fixed}
    numbers = KINDS[coefficients].numbers
    settled = sum(numbers(k, size) for k in fixed.values())

    def price(k: int) -> int:
        return settled + sum(numbers(min(k, side), size) for side in sides.values())

    allowed = math.floor(budget * total)
    if price(1) > allowed:
        raise InputError(
            f"budget={budget:g} of {total:,} parameters is {allowed:,} coefficients, but one direction in each of "
            f"{len(weights)} matrices takes {price(1):,}; pass budget>={price(1) / total:.2g} or target fewer modules"
        )
    k = bisect_right(range(1, max(sides.values(), default=1) + 1), allowed, key=price)
    return {name: fixed[name] if name in fixed else min(k, sides[name]) for name in weights}


def _lowered(ranks: Mapping[str, int], weights: Mapping[str, Tensor]) -> dict[str, int]:
    """These k, where they exceed min(m, n) that; one warning names the matrices."""
    lowered = {name: min(k, *weights[name].shape) for name, k in ranks.items()}
    changed = [name for name, k in ranks.items() if lowered[name] != k]
    if changed:
        first = changed[0]
        warn(
            f"k={ranks[first]} exceeds min(m, n)={lowered[first]} of {first}"
            + (f" ({len(changed)} matrices are smaller than their k)" if len(changed) > 1 else "")
            + "; min(m, n) is taken there",
            stacklevel=2,
        )
    return lowered
