"""Reads from the code of attention modules how they reach their attention function."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.modeling_utils import AttentionInterface


@dataclass(frozen=True)
class AttentionCall:
    """
    How a class of attention modules reaches its attention function.

    Args:
        interface (`AttentionInterface`):
            Where it looks up the function of the implementation in use.
        eager (`Callable`, *optional*):
            The function for "eager", which is in the file of the model and in no interface.
    """

    interface: AttentionInterface
    eager: Callable | None


def find_attention_call(module_class: type) -> AttentionCall | None:
    """
    Finds out how a class of modules reaches its attention function.

    Returns:
        [`AttentionCall`], or `None` if no method of the class uses an `AttentionInterface`.
    """
    if module_class not in _attention_calls:
        _attention_calls[module_class] = _read_attention_call(module_class)
    return _attention_calls[module_class]


# Not `functools.cache`, since torch.compile would trace the function behind it.
_attention_calls: dict[type, AttentionCall | None] = {}


def _read_attention_call(module_class: type) -> AttentionCall | None:
    for name in dir(module_class):
        function = inspect.unwrap(getattr(module_class, name, None))
        if not inspect.isfunction(function):
            continue
        used = {name: function.__globals__.get(name) for name in function.__code__.co_names}
        interface = next((value for value in used.values() if isinstance(value, AttentionInterface)), None)
        if interface is not None and not _asks_for_attribute(function, interface):
            eager = (value for name, value in used.items() if name.endswith("eager_attention_forward"))
            others = (value for value in used.values() if _takes_module(value))
            return AttentionCall(interface, next(eager, None) or next(others, None))
    return None


def _asks_for_attribute(function: Callable, interface: AttentionInterface) -> bool:
    """Whether a function calls `getattr(interface, ...)`, so always the default: entries are no attributes."""
    loaded = [instruction.argval for instruction in dis.get_instructions(function)]
    return any(
        first == "getattr" and function.__globals__.get(second) is interface
        for first, second in zip(loaded, loaded[1:])
        if isinstance(second, str)
    )


def _takes_module(value: Any) -> bool:
    """Whether something is a function whose first parameter is a module, like attention functions."""
    return inspect.isfunction(value) and next(iter(inspect.signature(value).parameters), None) == "module"
