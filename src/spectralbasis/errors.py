"""Errors meant for people: each message gives the value, what was expected and what to do."""


class SpectralBasisError(ValueError):
    """Base of every error that this package raises on purpose."""


class InputError(SpectralBasisError):
    """A file, folder, value or combination that the user gave cannot be used."""


class BaseMismatchError(SpectralBasisError):
    """An adapter or a basis meets a base model whose weights are not those it was made from."""
