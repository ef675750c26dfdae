"""The interface of the places where work runs."""

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from spectralbasis.errors import SpectralBasisError

ATTEMPTS = 3
"""How often a call is tried whose worker dies; the last time with nothing beside it."""
_NO_MEMORY = ("not enough memory", "can't allocate memory", "cannot allocate memory")


@dataclass(frozen=True)
class Call:
    """A function and its arguments, picklable where they travel.

    Attributes:
        work: a function that a worker can import.
        arguments: what it is called with.
        memory: bytes that it takes at most, as far as known.
    """

    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    memory: int = 0


@dataclass(frozen=True)
class Failure:
    """In place of a result: what went wrong; text alone, since an exception might not travel."""

    reason: str


@dataclass(frozen=True)
class Death(Failure):
    """The worker died, or had too little memory: another attempt may succeed."""


class Executor(ABC):
    """Runs calls; a context manager that ends what is still under way when it is left."""

    travels: bool = True
    """Whether calls run in other processes, so that arguments and results are copied."""

    @property
    @abstractmethod
    def workers(self) -> int:
        """How many calls can run at once."""

    @property
    def slots(self) -> int:
        """How many calls may be under way: few more than can run at once, so that memory stays bounded."""
        return self.workers

    @abstractmethod
    def start(self, call: Call) -> Hashable:
        """Start a call and return a ticket for it."""

    @abstractmethod
    def finished(self) -> list[tuple[Hashable, Any]]:
        """Wait until a call ends; tickets of those that have, each with its result or with a `Failure`."""

    @abstractmethod
    def close(self) -> None:
        """End what is under way, without waiting for its result."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def perform(work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """The result of a call, or a `Failure` with what it raised."""
    try:
        return work(*arguments)
    except Exception as error:
        return Death(f"too little memory ({error})") if out_of_memory(error) else Failure(describe(error))


def out_of_memory(error: Exception) -> bool:
    """Whether an exception says that an allocation failed; torch raises a plain RuntimeError on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def describe(error: Exception) -> str:
    """What an exception says; where nobody foresaw it, with the place in the code."""
    if isinstance(error, SpectralBasisError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"unexpected {type(error).__name__} in {Path(place.filename).name}, line {place.lineno}: {error}"
