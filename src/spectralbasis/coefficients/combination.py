"""Arithmetic on adapters of one base; the result is again an adapter."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from spectralbasis.checkpoints import matrix_name
from spectralbasis.checkpoints.adapters import ADAPTER_CONFIG, adapted_name
from spectralbasis.checkpoints.weight_files import inside
from spectralbasis.coefficients.spectral_adapters import (
    SpectralAdapter,
    difference,
    difference_of_numbers,
    form_of,
    read_spectral_adapter,
    with_names_of,
)
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_folder, check_output
from spectralbasis.kinds import KINDS
from spectralbasis.records import read_record
from spectralbasis.tuner.config import BASIS_FILE, place_basis
from spectralbasis.tuner.factors import BASES
from spectralbasis.tuner.layer import COEFFICIENTS_OF

HEADS = ("refuse", "first", "mean", "none")


@dataclass(frozen=True)
class Combination:
    """What was written.

    Attributes:
        output: the new adapter's folder.
        adapters: what it was made of.
        weights: one for each.
        method: how.
        coefficients: the kind of the new coefficients.
        matrices: how many matrices they belong to.
    """

    output: Path
    adapters: list[str]
    weights: list[float]
    method: str
    coefficients: str
    matrices: int

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return asdict(self) | {"output": str(self.output)}


def combine(
    adapters: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    *,
    output: str | Path,
    method: str = "sum",
    density: float = 0.2,
    heads: str = "refuse",
    overwrite: bool = False,
) -> Combination:
    """Add, average, subtract or merge spectral adapters of one base and basis; needs neither the base nor the basis.

    The arithmetic is on C, so it is exactly that of the updates `U C Vᵀ` (for "ties", in the coordinates of the
    basis). Where the adapters store C differently, as sparse ones of different entries do, or where C is not linear in
    the numbers, as that of a rotation, the result is a full core or diagonal.

    Examples:
        >>> import copy, tempfile
        >>> from pathlib import Path
        >>> import peft, torch
        >>> import spectralbasis as sb
        >>> folder, base = Path(tempfile.mkdtemp()), torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> config = sb.SpectralConfig(target_modules=["0"], leading=3, init_weights=False)
        >>> peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(folder / "task")
        >>> sb.combine([folder / "task"], weights=[0.5], output=folder / "half").matrices
        1

    Args:
        adapters: folders of two or more adapters of the same matrices and ranks; of one to scale it.
        weights: a number for each, of any sign; None is 1.
        output: a new folder.
        method: "sum" `Σ w C`, "mean" `Σ w C / Σ w`, "difference" `w₁ C₁ − w₂ C₂`, or "ties": the entries of largest
            modulus of each, a sign elected for each entry, the mean of those that agree (arXiv 2306.01708).
        density: of "ties", the fraction of each adapter's numbers that is kept.
        heads: what becomes of heads and whatever else the adapters bring besides coefficients: "refuse" if there is
            any, since heads of different tasks cannot be added; "first" keeps those of the first adapter; "mean"
            averages them with the weights, which suits runs of one task from one start; "none" leaves them out.
        overwrite: replace an adapter that is in `output`.

    Raises:
        InputError: the adapters are not of one kind, have heads that no rule is given for, or a setting is wrong.
    """
    check_output(Path(output), overwrite=overwrite)
    given = _weights(adapters, weights)
    read = [read_spectral_adapter(Path(folder)) for folder in adapters]
    read = [with_names_of(read[0].config, one) for one in read]
    _check_alike(read)
    others = _others(read, given, heads)
    combined = _combined(read, given, method, density)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (*combined.values(), *others.values())):
        raise InputError(f"with weights={given.tolist()} the sum is too large for float32; pass smaller weights")
    config = read[0].config
    alike = KINDS[config.coefficients].linear and not any(
        difference_of_numbers(config, other.config) for other in read[1:]
    )
    stored = (
        {name: config.parametrisation(config.matrix(name)).inverse(C) for name, C in combined.items()}
        if alike
        else combined
    )
    # What a config says when all of C is stored as it is.
    plain = {"coefficients": form_of(config), "scaling": "absolute", "scales": None, "entries": None}
    plain |= {"singular_values": None}
    changes = {} if alike else plain
    with atomic_folder(Path(output)) as folder:
        _write(folder, read[0], stored, others)
        _write_config(folder, read[0], changes, headless=heads == "none")
    kind = config.coefficients if alike else form_of(config)
    return Combination(Path(output), [str(one) for one in adapters], given.tolist(), method, kind, len(stored))


def _weights(adapters: Sequence[str | Path], weights: Sequence[float] | None) -> Tensor:
    if not adapters:
        raise InputError("there is nothing to combine; pass one or more adapters")
    found = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(found) != len(adapters) or not all(map(isfinite, found)):
        raise InputError(f"weights must be one finite number for each of {len(adapters)} adapters, got {found}")
    return torch.tensor(found, dtype=torch.float64)


def _check_alike(adapters: Sequence[SpectralAdapter]) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        found = difference(first.config, other.config)
        if not found and first.config.ranks != other.config.ranks:
            found = "they adapt different matrices, or have different ranks"
        if not found and first.stored.keys() != other.stored.keys():
            found = "they hold coefficients of different matrices"
        if found:
            raise InputError(f"{first.folder} and {other.folder} cannot be combined: {found}")


def _combined(adapters: Sequence[SpectralAdapter], weights: Tensor, method: str, density: float) -> dict[str, Tensor]:
    """C of the result by matrix, float32."""
    trained = torch.tensor([one.entries for one in adapters])
    make = find_method(method, density, trained)
    coefficients = [one.coefficients() for one in adapters]
    X = torch.stack([torch.cat([one[name].double().flatten() for name in coefficients[0]]) for one in coefficients])
    parts = make(X, weights).float().split([C.numel() for C in coefficients[0].values()])
    return {name: part.view_as(C) for part, (name, C) in zip(parts, coefficients[0].items(), strict=True)}


def _others(adapters: Sequence[SpectralAdapter], weights: Tensor, heads: str) -> dict[str, Tensor]:
    """Heads and other retrained tensors of the result."""
    if heads not in HEADS:
        raise InputError(f"heads={heads!r} is unknown; choose from {', '.join(HEADS)}")
    brought = [one for one in adapters if one.others]
    if not brought or heads == "none":
        return {}
    if heads == "refuse":
        raise InputError(
            f"{brought[0].folder} has {next(iter(brought[0].others))}, and heads of different tasks cannot be added; "
            "choose what to do with it: heads='first', 'mean' or 'none' (--heads)"
        )
    return adapters[0].others if heads == "first" else _mean(adapters, weights)


def _mean(adapters: Sequence[SpectralAdapter], weights: Tensor) -> dict[str, Tensor]:
    shapes = [{name: tensor.shape for name, tensor in one.others.items()} for one in adapters]
    if any(other != shapes[0] for other in shapes):
        raise InputError(
            "the adapters have different heads, or heads of different sizes, which have no mean; use heads='first'"
        )
    found = {}
    for name, tensor in adapters[0].others.items():
        X = torch.stack([one.others[name].double().flatten() for one in adapters])
        found[name] = weighted_mean(X, weights).to(tensor.dtype).view_as(tensor)
    return found


def _write(folder: Path, first: SpectralAdapter, stored: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """The tensors, under the names that the first adapter gives them."""
    tensors = {}
    for name in first.names:
        module, is_coefficients, _ = adapted_name(name).partition(COEFFICIENTS_OF)
        if is_coefficients:
            tensors[name] = stored[module if module in stored else matrix_name(module)].contiguous()
        elif module in others:
            tensors[name] = others[module]
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _write_config(folder: Path, first: SpectralAdapter, changes: Mapping[str, Any], *, headless: bool) -> None:
    """The first adapter's config with changes, and its basis file."""
    config = {**read_record(inside(first.folder, ADAPTER_CONFIG), dict[str, Any]), **changes}
    if headless:
        # With a task type, PEFT asks for the head of the task.
        config |= {"modules_to_save": None, "bias": "none", "task_type": None}
    basis = first.config.basis
    if basis not in BASES:
        config["basis"] = place_basis(Path(basis), folder) if Path(basis).is_file() else BASIS_FILE
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


Method = Callable[[Tensor, Tensor], Tensor]
"""X (tasks, numbers), weights (tasks,) → (numbers,)."""


def weighted_sum(X: Tensor, weights: Tensor) -> Tensor:
    """`Σ wᵢ xᵢ`."""
    return weights @ X


def weighted_mean(X: Tensor, weights: Tensor) -> Tensor:
    """`Σ wᵢ xᵢ / Σ wᵢ`.

    Raises:
        InputError: the weights add up to 0.
    """
    total = weights.sum()
    if not bool(total.abs() > 0):
        raise InputError(f"the weights {weights.tolist()} add up to 0, so they have no mean; use method='sum'")
    return weights @ X / total


def weighted_difference(X: Tensor, weights: Tensor) -> Tensor:
    """`w₁ x₁ − w₂ x₂`.

    Raises:
        InputError: there are not two.
    """
    if len(X) != 2:
        raise InputError(f"method='difference' needs two adapters, got {len(X)}; use method='sum' with weights")
    return weights[0] * X[0] - weights[1] * X[1]


def trim(X: Tensor, keep: Tensor) -> Tensor:
    """The entries of largest modulus of each row, `keep` of them (tasks,), zeros elsewhere."""
    kept = torch.zeros_like(X)
    for row, numbers, count in zip(kept, X, keep.tolist(), strict=True):
        chosen = numbers.abs().topk(count).indices
        row[chosen] = numbers[chosen]
    return kept


def ties(X: Tensor, weights: Tensor, *, keep: Tensor) -> Tensor:
    """Trim, elect signs, and average what agrees (TIES-Merging, arXiv 2306.01708).

    The sign of an entry is that of the weighted sum; the result is the mean of the weighted entries that have it.
    """
    weighted = weights[:, None] * trim(X, keep)
    agreeing = weighted * (weighted.sign() == weighted.sum(0).sign())
    return agreeing.sum(0) / agreeing.count_nonzero(0).clamp(min=1)


_PLAIN: Mapping[str, Method] = MappingProxyType(
    {"sum": weighted_sum, "mean": weighted_mean, "difference": weighted_difference}
)
METHODS = (*_PLAIN, "ties")
"""Names that `find_method` knows."""


def find_method(name: str, density: float, trained: Tensor) -> Method:
    """A method by name.

    Args:
        name: one of `METHODS`.
        density: of "ties", the fraction of each task's numbers that is kept.
        trained: how many entries of C each task trains, (tasks,).

    Raises:
        InputError: the name or the density is none.
    """
    if name in _PLAIN:
        return _PLAIN[name]
    if name != "ties":
        raise InputError(f"method={name!r} is unknown; choose from {', '.join(METHODS)}")
    if not 0 < density <= 1:
        raise InputError(f"density must be above 0 and at most 1, got {density!r}; pass a fraction such as 0.2")
    return partial(ties, keep=(density * trained).round().long().clamp(min=1))
