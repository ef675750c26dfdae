"""Errors for users: each message gives the value, what was expected and what to do."""

import re

from spectralbasis.printable import shortened

_LONGEST = 4000


class SpectralBasisError(ValueError):
    """Base of every error that this package raises on purpose.

    A message is one paragraph. It may quote names out of files, so what a terminal would act on is written as an
    escape, and a name of a million letters is cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(re.sub(r"\s*[\r\n]\s*", " ", message), _LONGEST))


class InputError(SpectralBasisError):
    """A file, folder, value or combination that the user gave cannot be used."""


class BusyError(InputError):
    """Another process writes what was to be written; nothing is wrong with what was asked for."""


class BaseMismatchError(SpectralBasisError):
    """An adapter meets a base model whose weights are not those that it was made from."""
