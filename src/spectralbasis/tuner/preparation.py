"""From a config and the modules it targets to ranks and factors, with every check done before the model is changed.

Who gets how many directions: from a number, a rule or a budget to one k per matrix.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from spectralbasis.errors import BaseMismatchError, InputError
from spectralbasis.linalg import Leading, resolve_leading
from spectralbasis.printable import warn
from spectralbasis.records import pattern_of
from spectralbasis.tuner.config import RECORD, SpectralConfig
from spectralbasis.tuner.factors import Directions, Factors, directions_of, source_of
from spectralbasis.tuner.layer import SpectralLayer
from spectralbasis.tuner.parameters import Target
from spectralbasis.tuner.parametrisation import Parametrisation, numbers

DEFAULT_LEADING = 64
"""k where neither `leading` nor `budget` is given; smaller matrices give all they have."""


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


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model itself: no coefficients, and of retrained modules the original only."""
    added = (".spectral_coefficients.", ".modules_to_save.")
    return sum(_size(p) for name, p in model.named_parameters() if not any(part in f".{name}" for part in added))


def allocate_leading(
    leading: Leading | None, weights: Mapping[str, Tensor], fixed: Mapping[str, int]
) -> dict[str, int]:
    """k of each matrix by a number, a fraction or a rule; min(m, n) where that is smaller, with one warning.

    Args:
        leading: see `linalg.resolve_leading`; None is `DEFAULT_LEADING`, or min(m, n) where that is smaller.
        weights: matrix name → W, (m, n).
        fixed: matrix name → k, of the matrices whose k is settled already.
    """
    fixed = {name: leading for name in weights if isinstance(leading, int)} | dict(fixed)
    fixed = _lowered(fixed, weights)
    return {name: fixed[name] if name in fixed else _leading_rank(leading, W) for name, W in weights.items()}


def allocate_budget(
    budget: float,
    total: int,
    weights: Mapping[str, Tensor],
    fixed: Mapping[str, int],
    coefficients: str,
    bandwidth: int = 1,
) -> dict[str, int]:
    """The largest k, one for all matrices (min(m, n) where that is smaller), that trains at most `budget * total`.

    Args:
        budget: fraction of the model's parameters.
        total: parameters of the model.
        weights: matrix name → W, (m, n).
        fixed: matrix name → k, of the matrices whose k is settled already; they are paid first. Where min(m, n) is
            smaller, k is that, with one warning.
        coefficients: "diagonal", "core" or "band".
        bandwidth: of a band.

    Raises:
        InputError: the budget does not pay for k = 1.
    """
    fixed = _lowered(fixed, weights)
    sides = {name: min(W.shape) for name, W in weights.items() if name not in fixed}
    settled = sum(numbers(coefficients, k, bandwidth) for k in fixed.values())

    def price(k: int) -> int:
        return settled + sum(numbers(coefficients, min(k, side), bandwidth) for side in sides.values())

    allowed = math.floor(budget * total)
    if price(1) > allowed:
        raise InputError(
            f"budget={budget:g} of {total:,} parameters is {allowed:,} coefficients, but one direction in each of "
            f"{len(weights)} matrices takes {price(1):,}; pass budget>={price(1) / total:.2g} or target fewer modules"
        )
    k = bisect_right(range(1, max(sides.values(), default=1) + 1), allowed, key=price)
    return {name: fixed[name] if name in fixed else min(k, sides[name]) for name in weights}


def _size(parameter: nn.Parameter) -> int:
    """Number of weights in a parameter; bitsandbytes packs two of 4 bits into a byte."""
    quantized = getattr(parameter, "quant_state", None)
    return parameter.numel() if quantized is None else math.prod(quantized.shape)


def _leading_rank(leading: Leading | None, W: Tensor) -> int:
    return min(DEFAULT_LEADING, *W.shape) if leading is None else resolve_leading(leading, W)


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


PROBE_TOLERANCE = 1e-2
"""Probes are of order 1: below this, directions agree as well as float32 singular vectors of one matrix can."""


@dataclass(frozen=True)
class Preparation:
    """What a layer needs to take an adapter."""

    parametrisation: Parametrisation
    factors: Factors

    @property
    def directions(self) -> tuple[Tensor, Tensor]:
        """U (m, k) and V (n, k)."""
        return self.factors.first(self.parametrisation.k)


def prepare(config: SpectralConfig, targets: Sequence[Target], total: int) -> dict[str, Preparation]:
    """Resolve ranks, find the factors, check or record hashes, scales and probes; `config` keeps the record.

    Args:
        config: read from an adapter folder, it must fit this base; otherwise it takes what is found here.
        targets: the modules to adapt.
        total: parameters of the model, of which a budget is a fraction.

    Returns:
        Module key → preparation.

    Raises:
        BaseMismatchError: weights or directions are not those that the adapter was trained on.
        InputError: a budget or a basis file does not fit the model.
    """
    hashes = {target.name: target.hash for target in targets}
    if config.bound:
        _check_hashes(config, hashes)
    else:
        _check_calibrated(config)
        config.ranks = resolve_ranks(config, targets, total)
        config.base_hashes = hashes
    ranks = config.ranks or {}
    factors = dict(zip(hashes, _find_factors(config, targets, ranks), strict=True))
    if not config.bound:
        config.scales = _measure_scales(config, targets, factors, ranks)
    prepared = {t.key: Preparation(config.parametrisation(t.name), factors[t.name]) for t in targets}
    probes = {t.name: factors[t.name].probe(prepared[t.key].parametrisation.form, ranks[t.name]) for t in targets}
    if config.bound:
        _check_probes(config, probes)
    else:
        config.probes = probes
    return prepared


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
        return allocate_leading(config.leading, weights, fixed)
    return allocate_budget(config.budget, total, weights, fixed, config.coefficients, config.bandwidth)


def _pattern_of(target: Target, patterns: Mapping[str, int]) -> str | None:
    found = (pattern_of(patterns, key) for key in (target.key, *target.also))
    return next((pattern for pattern in found if pattern is not None), None)


def _measure_scales(
    config: SpectralConfig, targets: Sequence[Target], factors: Mapping[str, Factors], ranks: Mapping[str, int]
) -> dict[str, list[float]] | None:
    """The record of `SpectralConfig.scaling`, rounded to what its JSON and float32 hold alike."""
    if config.scaling == "absolute":
        return None
    if config.scaling == "normalized":
        return normalized_scales(
            {name: numbers(config.coefficients, k, config.bandwidth) / k for name, k in ranks.items()}
        )
    scales = {}
    for target in targets:
        W = target.W.float()
        U, V = (factor.to(W) for factor in factors[target.name].first(ranks[target.name]))
        found = (U * (W @ V)).sum(0).abs()
        scales[target.name] = [float(f"{value:.7g}") for value in found.tolist()]
    return scales


def normalized_scales(fan_in: Mapping[str, float]) -> dict[str, list[float]]:
    """The record of the scaling "normalized", from how many trained numbers meet in one left direction on average."""
    return {name: [float(f"{count**-0.5:.7g}")] for name, count in fan_in.items()}


def _check_calibrated(config: SpectralConfig) -> None:
    if config.coefficients == "sparse":
        raise InputError(
            "coefficients='sparse' needs to know which entries to train; pick them first: "
            "config = spectralbasis.calibrate(model, batches, config)"
        )


def _find_factors(config: SpectralConfig, targets: Sequence[Target], ranks: Mapping[str, int]) -> list[Factors]:
    """Factors of each target: those its layer already holds, else found anew, in the dtype and place of the weight."""
    directions = directions_of(config.basis, tolerance=config.tolerance, seed=config.basis_seed)
    source = source_of(config.basis, config.basis_seed)
    found = []
    for target in targets:
        k = ranks[target.name]
        held = target.module.held_factors(source, k) if isinstance(target.module, SpectralLayer) else None
        found.append(held or Factors(*_decompose(directions, target, k), source))
    return found


def _decompose(directions: Directions, target: Target, k: int) -> tuple[Tensor, Tensor]:
    try:
        return directions(target.name_in_basis, target.W, k, target.hash)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{target.name}: {error}; leave it out with exclude_modules") from error


def _check_hashes(config: SpectralConfig, hashes: Mapping[str, str]) -> None:
    expected = config.base_hashes or {}
    absent = [name for name in expected if name not in hashes]
    if absent:
        warn(
            f"the model has no {absent[0]} ({len(absent)} of {len(expected)} matrices are missing); "
            "the adapter's coefficients for it are left out",
            stacklevel=2,
        )
        for field in RECORD:
            values = getattr(config, field)
            if values is not None:  # or the adapter, saved again, would record what it does not hold
                setattr(config, field, {name: value for name, value in values.items() if name not in absent})
        expected = config.base_hashes or {}
    unknown = [name for name in hashes if name not in expected or name not in (config.ranks or {})]
    if unknown:
        raise InputError(
            f"the adapter knows nothing of {unknown[0]}: its base_hashes and ranks are of other modules; "
            "pass target_modules as they were, or make a new SpectralConfig"
        )
    changed = [name for name, found in hashes.items() if expected[name] != found]
    if changed:
        base = config.base_model_name_or_path or "the base that it was trained on"
        raise BaseMismatchError(
            f"{changed[0]} has hash {hashes[changed[0]]}, but the adapter was made on {expected[changed[0]]} "
            f"({len(changed)} of {len(hashes)} matrices differ); load it on {base}, in the same dtype or wider: a base "
            "rounded to 16 bits is another base, so add the adapter before the cast"
        )


def _check_probes(config: SpectralConfig, probes: Mapping[str, list[float]]) -> None:
    expected = config.probes or {}
    for name, found in probes.items():
        distance = max(abs(a - b) for a, b in zip(found, expected[name], strict=True))
        if not distance <= PROBE_TOLERANCE:
            raise BaseMismatchError(
                f"the directions found for {name} are not those that its coefficients were trained on (probes "
                f"differ by {distance:.2g}): nearly equal singular values, or another basis file; "
                "where the adapter was trained, write the file with: spectralbasis basis MODEL -o FILE, "
                "put it in the adapter's folder, and set basis to its name in adapter_config.json"
            )
