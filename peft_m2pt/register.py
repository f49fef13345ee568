"""Registers M2PT with PEFT: adds the enum member `PeftType.M2PT` and the entries in PEFT's mappings."""

from __future__ import annotations

import enum

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method


NAME = "m2pt"


PREFIX = "m2pt_"


def add_enum_member(enum_class: type[enum.Enum], name: str) -> enum.Enum:
    """
    Adds a member to an existing string enum.

    Python has no public way of extending an enum, and PEFT has no entry point for methods of other packages. Python
    3.12 and later look up members as attributes, which `EnumType` does not allow to set, but `type` does.

    Args:
        enum_class (`type[enum.Enum]`):
            A `(str, Enum)` class, which is changed in place.
        name (`str`):
            Name and value of the new member.

    Returns:
        `enum.Enum`: The new member, or the existing one of this name.
    """
    if name in enum_class.__members__:
        return enum_class[name]
    member = str.__new__(enum_class, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enum_class
    type.__setattr__(enum_class, name, member)
    enum_class._member_names_.append(name)
    enum_class._member_map_[name] = member
    enum_class._value2member_map_[name] = member
    return member


def register(config_class: type, model_class: type) -> None:
    """
    Registers M2PT with PEFT. Repeating it is harmless, also after the package was reloaded.

    Raises:
        RuntimeError: If something else is already registered under the name "m2pt" or the prefix "m2pt_".
    """
    peft_type = add_enum_member(PeftType, NAME.upper())

    for mapping, new in ((PEFT_TYPE_TO_CONFIG_MAPPING, config_class), (PEFT_TYPE_TO_TUNER_MAPPING, model_class)):
        old = mapping.get(peft_type)
        if old is not None and (old.__module__, old.__qualname__) != (new.__module__, new.__qualname__):
            raise RuntimeError(
                f"PEFT already has a method called '{NAME}': {old.__module__}.{old.__qualname__}. peft_m2pt cannot "
                f"be used together with it. Import only one of the two packages in a process."
            )
    for other, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items():
        if prefix == PREFIX and other != peft_type:
            raise RuntimeError(
                f"The PEFT method '{other}' already uses the prefix '{PREFIX}', which marks the parameters of "
                f"peft_m2pt. Import only one of the two packages in a process."
            )

    # Remaining entries are from an earlier import of this package. `register_peft_method` refuses to replace them.
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(peft_type, None)
    register_peft_method(name=NAME, config_cls=config_class, model_cls=model_class, prefix=PREFIX)
