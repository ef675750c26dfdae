"""Registers the method "SPECTRAL" when PEFT is imported, so that this package need not import PEFT to do so.

Python has no hook for "after this module is imported", so a finder on `sys.meta_path` puts a loader of ours before
PEFT's own. What has to be done then is given by the package itself (`spectralbasis/__init__.py`), since this module
stands below all that knows the method.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_registrations: list[Callable[[], object]] = []


def register_with_peft(register: Callable[[], object]) -> None:
    """Call `register` now where PEFT is imported already, else right after it will be."""
    _registrations.append(register)
    if "peft" in sys.modules:
        register_now()
    else:
        sys.meta_path.insert(0, _PeftFinder())


def register_now() -> None:
    """Do what was asked for with `register_with_peft`, also where PEFT was not imported yet."""
    for register in _registrations:
        register()


class _PeftFinder(MetaPathFinder):
    """Finds PEFT where the other finders do, and puts a loader of ours before its own."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _PeftLoader(spec.loader)
        return spec


class _PeftLoader(Loader):
    """Loads PEFT by its own loader, then registers the method."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        register_now()
