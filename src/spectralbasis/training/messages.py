"""What other libraries say: their errors in a line, their chatter not at all."""

from collections.abc import Iterator
from contextlib import contextmanager

import transformers

from spectralbasis.printable import shortened


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop, or its class name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def described(error: BaseException) -> str:
    """The first line of an error's text, after its class where the text alone says little, as of a KeyError."""
    plain = isinstance(error, OSError | ValueError | RuntimeError)
    return shortened(first_line(error) if plain else f"{type(error).__name__}: {first_line(error)}")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' notes while a model loads: which weights are new is known and handled here."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
