"""The extras of the package: which packages each one needs, and the message if they are missing.

`--help` reads this module, so it imports nothing large.
"""

from collections.abc import Iterable
from importlib.util import find_spec

from spectralbasis.errors import InputError

_TUNING = {"accelerate": "accelerate", "datasets": "datasets", "h5py": "h5py", "sklearn": "scikit-learn"}
EXTRAS = {
    "tune": _TUNING,
    "study": _TUNING,
    "gguf": {"gguf": "gguf"},
    "images": {"PIL": "pillow"},
    "diagnostics": {"weightwatcher": "weightwatcher"},
    "serve": {
        "prometheus_client": "prometheus_client",
        "ray": "ray[serve]",
        "starlette": "starlette",
        "uvicorn": "uvicorn",
    },
}
"""Extra → module → the package that brings it."""


def lacking(extra: str) -> list[str]:
    """The packages of an extra that are not installed."""
    return [package for module, package in EXTRAS[extra].items() if not _is_installed(module)]


def require_extra(extra: str, what: str) -> None:
    """Refuse what needs an extra that is not installed.

    Args:
        extra: a key of `EXTRAS`.
        what: what needs it, as the message names it.

    Raises:
        InputError: a package of the extra is not installed.
    """
    if packages := lacking(extra):
        needs = "the package " + packages[0] if len(packages) == 1 else "the packages " + ", ".join(packages)
        raise InputError(f"{what} needs {needs}, not installed here: pip install 'spectralbasis[{extra}]'")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # `sys.modules[module]` is None: the import would fail
        return False


def listed_by_group(entries: Iterable[tuple[str, str]]) -> str:
    """Pairs of a group and a name as a list for people.

    Examples:
        >>> listed_by_group([("text", "RTE"), ("images", "mnist"), ("text", "CoLA")])
        'RTE, CoLA (text); mnist (images)'
    """
    groups: dict[str, list[str]] = {}
    for group, name in entries:
        groups.setdefault(group, []).append(name)
    return "; ".join(f"{', '.join(names)} ({group})" for group, names in groups.items())
