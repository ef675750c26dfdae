"""Making PEFT know the method "SPECTRAL"; done when this package and PEFT are imported, see `peft_import`.

`peft.PeftModel.from_pretrained` can only open a spectral adapter after `import spectralbasis`.
"""

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

METHOD = "SPECTRAL"


def register(config_class: type, model_class: type) -> None:
    """Enter the method into PEFT's registry; a second call changes nothing.

    Args:
        config_class: the `PeftConfig` of the method.
        model_class: its `BaseTuner`, whose `prefix` starts the names of all trained parameters.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    add_peft_type(METHOD)
    if METHOD in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    register_peft_method(name=METHOD.lower(), config_cls=config_class, model_cls=model_class, is_mixed_compatible=False)


def add_peft_type(name: str) -> None:
    """Add a member to the enum `peft.PeftType`.

    `register_peft_method` refuses names outside the enum, and PEFT calls `.value` on what it finds, so that a plain
    string as key would not do. An enum has no public way to grow; these are the attributes that its constructor sets.
    """
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
