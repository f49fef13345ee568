"""Whether code may change a tensor in place, so that what was known of its value no longer holds."""

from __future__ import annotations

import ast
import builtins
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from .code_reader import find_global, parameter_names, parse_function


# Builtins that leave their arguments as they are.
PURE_BUILTINS = {
    *("abs", "all", "any", "bool", "dict", "enumerate", "float", "getattr", "hasattr", "id", "int", "isinstance"),
    *("len", "list", "max", "min", "print", "range", "repr", "reversed", "round", "set", "sorted", "str", "sum"),
    *("super", "tuple", "type", "zip"),
}


def is_in_place_name(name: str) -> bool:
    """Whether this is torch's way to name what changes a tensor in place."""
    return name.endswith("_")


def is_pure_method(name: str) -> bool:
    """Whether a method of this name, of a tensor or a container, leaves tensors as they are."""
    owners = (torch.Tensor, dict, list, str, tuple)
    return not is_in_place_name(name) and any(hasattr(owner, name) for owner in owners)


def says_in_place(call: ast.Call, function: Any = None) -> bool:
    """Whether a call, of a known function or another, asks for a change in place by its name or arguments."""
    if is_in_place_name(getattr(call.func, "attr", getattr(call.func, "id", ""))):
        return True
    given = {word.arg: word.value for word in call.keywords}
    try:
        given |= zip(inspect.signature(function).parameters, call.args)
    except (TypeError, ValueError):  # most functions of torch have no signature
        pass
    nodes = [given[name] for name in ("out", "inplace") if name in given]
    return not all(isinstance(node, ast.Constant) and not node.value for node in nodes)


def changes_input(module: nn.Module) -> bool:
    """Whether a module, without its children, may change its input in place."""
    return bool(getattr(module, "inplace", False)) or may_write(type(module).forward, type(module))


@cache
def may_write(function: Callable | None, owner: type | None = None) -> bool:
    """
    Whether a function may change tensors in place: it or what it calls does, or has no source to tell.

    Args:
        function (`Callable`, *optional*):
            The function. `None` for one that is not known.
        owner (`type`, *optional*):
            The class whose method it is. Other methods that it calls are read too; children are not.
    """
    pending, seen = [(function, owner)], set()
    while pending:
        function, owner = source = pending.pop()
        if source in seen or _is_pure(function):
            continue
        seen.add(source)
        code = parse_function(function) if _can_be_read(function) else None
        if code is None:
            return True
        own_name = None if owner is None else next(iter(parameter_names(code)), None)
        for node in ast.walk(code):
            match node:
                case ast.Subscript(ctx=ast.Store() | ast.Del()) | ast.AugAssign() | ast.Delete():
                    return True
                case ast.Attribute(value=ast.Name(id=name)) if name == own_name:
                    method = inspect.unwrap(getattr(owner, node.attr, None))
                    pending += [(method, owner)] if inspect.isfunction(method) else []
                case ast.Call() if says_in_place(node):
                    return True
                case ast.Call(func=ast.Name(id=name)):
                    pending.append((find_global(function, name), None))
                case ast.Call(func=ast.Attribute() as callee):
                    if not is_pure_method(callee.attr) and not _is_of(callee, own_name, function):
                        return True
                case ast.Call():
                    return True
    return False


def _is_of(callee: ast.Attribute, own_name: str | None, function: Callable) -> bool:
    """Whether this is an attribute of a function's own object, or of a module of Python."""
    root: ast.expr = callee
    while isinstance(root, ast.Attribute):
        root = root.value
    name = root.id if isinstance(root, ast.Name) else None
    return name is not None and (name == own_name or inspect.ismodule(find_global(function, name)))


def _is_pure(function: Any) -> bool:
    """Whether something is known to leave its arguments as they are, unless its name or an argument says otherwise."""
    if function is None or is_in_place_name(getattr(function, "__name__", "_")):
        return False
    if isinstance(function, type):
        return not issubclass(function, nn.Module)
    if getattr(builtins, function.__name__, None) is function:
        return function.__name__ in PURE_BUILTINS
    return _is_of_torch(function)


def _can_be_read(function: Any) -> bool:
    return inspect.isroutine(function) and not is_in_place_name(function.__name__)


def _is_of_torch(function: Callable) -> bool:
    owner = getattr(function, "__objclass__", None) or getattr(function, "__self__", None)
    module = function.__module__ or getattr(owner, "__module__", None) or getattr(owner, "__name__", None) or ""
    return module.partition(".")[0] == "torch"
