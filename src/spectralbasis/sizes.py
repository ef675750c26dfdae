"""Amounts of memory: how much is free, and how they are written."""

import math
import re

import psutil

from spectralbasis.errors import InputError
from spectralbasis.printable import shortened

_UNCHECKED = 1 << 28
_MOST = 1 << 62
_UNITS = {"": 1, "B": 1, **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)}}
_BINARY = {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}
_FACTORS = {unit.upper(): factor for unit, factor in (_UNITS | _BINARY).items()}


def available_memory() -> int:
    """Bytes that processes can take without swapping."""
    return int(psutil.virtual_memory().available)


def check_memory(count: int, what: str) -> None:
    """Raise InputError unless that many bytes of memory are free, before the system ends a process for taking them.

    Args:
        count: bytes.
        what: begins the message, such as "reading q.weight of model.safetensors".
    """
    if count > _UNCHECKED and count > (free := available_memory()):
        raise InputError(
            f"{what} takes {format_size(count, up=True)} of memory, and {format_size(free)} are free; use a machine "
            f"with more memory, or leave it out"
        )


def parse_size(size: str | int) -> int:
    """Bytes, from their number or from text such as "8GB", "500 MB" or "1.5GiB".

    Raises:
        InputError: it is not a positive amount of memory.

    Examples:
        >>> parse_size("1.5GiB"), parse_size("500 MB")
        (1610612736, 500000000)
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", str(size))
    factor = _FACTORS.get(found[2].upper()) if found else None
    count = float(found[1]) * factor if found and factor else 0
    if not 1 <= count < _MOST:
        raise InputError(
            f"{shortened(repr(size), 80)} is not an amount of memory; pass bytes, or a number with a unit such as 8GB "
            "or 500MB"
        )
    return int(count)


def format_size(count: int, *, up: bool = False) -> str:
    """Bytes in the unit of 1000s that suits them, with one decimal, such as "1.5GB"; rounded upwards if `up`."""
    unit = max((factor for factor in _UNITS.values() if factor <= count), default=1)
    name = next(name for name, factor in _UNITS.items() if factor == unit and name)
    tenths = math.ceil(count / unit * 10) if up else round(count / unit * 10)
    return f"{tenths / 10:g}{name}"
