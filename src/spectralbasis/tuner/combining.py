"""What the weighted sum of adapters is: a config of its own, and whether there is one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from spectralbasis.errors import InputError
from spectralbasis.tuner.config import SpectralConfig
from spectralbasis.tuner.entries import pack_positions, unpack_positions
from spectralbasis.tuner.record import RECORD

ALIKE = ("coefficients", "bandwidth", "scaling", "basis", "basis_seed")
"""Settings that adapters must share for their coefficients to be added."""


def combined_config(configs: Sequence[SpectralConfig], names: Sequence[str]) -> SpectralConfig:
    """The config of a weighted sum of adapters of one base: the first one's; of sparse ones, the union of entries.

    Args:
        configs: complete ones, as a model holds them.
        names: of the adapters, for errors.

    Raises:
        InputError: they are not of one kind.
    """
    first = configs[0]
    differing = [field for field in ALIKE if any(getattr(one, field) != getattr(first, field) for one in configs)]
    if differing or not _have_equal_ranks(configs):
        field = (*differing, "ranks")[0]
        raise InputError(f"adapters {', '.join(names)} differ in {field}, so their coefficients cannot be added")
    changes: dict[str, Any] = {"inference_mode": True}
    if first.coefficients == "sparse":
        changes |= _united_record(configs)
    return replace(first, **changes)


def _united_record(configs: Sequence[SpectralConfig]) -> dict[str, Any]:
    """Settings of the sparse adapter that trains every entry that one of these does."""
    record: dict[str, Any] = {
        field: {name: value for config in configs for name, value in getattr(config, field).items()}
        for field in RECORD
        if getattr(configs[0], field) is not None
    }
    record["entries"] = {name: _united(configs, name, k) for name, k in record["ranks"].items()}
    record["target_modules"] = set().union(*(config.target_modules or () for config in configs))
    return record


def _have_equal_ranks(configs: Sequence[SpectralConfig]) -> bool:
    """Whether each matrix has one k; only sparse adapters may adapt different matrices."""
    ranks = [config.ranks or {} for config in configs]
    if configs[0].coefficients != "sparse":
        return all(one == ranks[0] for one in ranks)
    found = {pair for one in ranks for pair in one.items()}
    return len(found) == len({name for name, _ in found})


def _united(configs: Sequence[SpectralConfig], name: str, k: int) -> str:
    packed = [(config.entries or {}).get(name) for config in configs]
    return pack_positions(torch.cat([unpack_positions(one, k) for one in packed if one is not None]).unique())
