"""Registers the method "SPECTRAL" with PEFT; the only place that changes PEFT and Python's imports.

PEFT has no plug-ins: a method must be in its enum and its registry before an adapter is opened. This package does not
import PEFT itself, because that takes seconds. So a finder on `sys.meta_path` puts our loader before PEFT's own, and
`spectralbasis/__init__.py` says what the loader runs.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

METHOD = "SPECTRAL"
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


def add_peft_type(name: str = METHOD) -> None:
    """Add a member to the enum `peft.PeftType`; a second call changes nothing.

    `register_peft_method` refuses names outside the enum, and PEFT calls `.value` on what it finds, so that a plain
    string as key would not do. An enum has no public way to grow; these are the attributes that its constructor sets.
    """
    from peft.utils.peft_types import PeftType

    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member


def register(config_class: type, model_class: type) -> None:
    """Enter the method into PEFT's registry; a second call changes nothing.

    Args:
        config_class: the `PeftConfig` of the method.
        model_class: its `BaseTuner`, whose `prefix` starts the names of all trained parameters.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    add_peft_type()
    if METHOD not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=METHOD.lower(), config_cls=config_class, model_cls=model_class, is_mixed_compatible=False
        )
