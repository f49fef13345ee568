"""
What a module does with the input of its `forward`, read from the code of that method.

The names of norms, and whether they stand in front of the attention or behind it, differ from family to family. The
code says it: `self.input_layernorm(hidden_states)`, then `self.self_attn(hidden_states, ...)`.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from .reading import CodeReader, code_of, parameter_names
from .upstream import new_names
from .wrappers import own_module


# What leaves a token's vector as it is.
SAME = ("to", "contiguous", "squeeze", "type_as")

# What a condition asks for of a module that stays what it is. These do not.
CHANGING = ("training", "gradient_checkpointing", "requires_grad", "_attn_implementation")

# Builtins that leave what they are given as it is, or that give it another type.
HARMLESS = {
    *("abs", "all", "any", "bool", "dict", "enumerate", "float", "hasattr", "id", "int", "isinstance", "len", "list"),
    *("max", "min", "print", "range", "repr", "reversed", "round", "set", "sorted", "str", "sum", "super", "tuple"),
    *("type", "zip", "getattr"),
}


@dataclass(frozen=True)
class Flow:
    """
    How a value came about.

    Args:
        modules (`tuple[str, ...]`):
            Names of the children that were called one after the other, each on the output of the one before.
        from_input (`bool`):
            Whether the first of them was called on the module's own input. Otherwise it was called on something that
            the module computed.
    """

    modules: tuple[str, ...] = ()
    from_input: bool = True


@dataclass(frozen=True)
class ChildCall:
    """
    A call of a child in the `forward` of a module.

    Args:
        flow ([`Flow`], *optional*):
            Where its first argument comes from. `None` if that is neither the input nor the output of a child, or if
            it is not known.
        arguments (`frozenset[str]`):
            Names of the arguments that it is given, constants left out.
    """

    flow: Flow | None
    arguments: frozenset[str]


def find_calls(module: nn.Module, child_name: str) -> list[ChildCall]:
    """
    Finds the calls of a child in the `forward` of a module.

    Args:
        module (`nn.Module`):
            The module. Its attributes decide conditions such as `if self.normalize_before`.
        child_name (`str`):
            Name of the child.

    Returns:
        `list[ChildCall]`: Empty if there are none, or if the code is not at hand. A child that may be called in a way
        that the code does not show has a call of unknown flow.
    """
    return [call for name, call in _read(module) if name == child_name]


def first_reader(module: nn.Module, attribute: str) -> nn.Module | None:
    """
    Returns the first child that a module calls on its own input and that has an attribute, or `None`.

    Args:
        module (`nn.Module`):
            The module.
        attribute (`str`):
            For example "in_features", to find a linear layer.
    """
    for name, call in _read(module):
        if call.flow == Flow() and hasattr(getattr(module, name), attribute):
            return getattr(module, name)
    return None


def _read(module: nn.Module) -> list[tuple[str, ChildCall]]:
    """The calls of children in the `forward` of a module, in the order in which they stand there."""
    code = code_of(type(module).forward)
    if code is None or len(parameter_names(code)) < 2:
        return []
    return _FlowReader(module, code).notes


class _FlowReader(CodeReader):
    """Follows the input of a module through its `forward`. A value is a [`Flow`]."""

    def __init__(self, module: nn.Module, code: ast.FunctionDef) -> None:
        self.module = module
        self.own_name, input_name = parameter_names(code)[:2]
        # What the module changes of itself, when it is called.
        self.own_changes = {
            node.attr
            for node in ast.walk(code)
            if isinstance(node, ast.Attribute) and self._is_own(node) and not isinstance(node.ctx, ast.Load)
        }
        super().__init__(type(module).forward, {input_name: Flow()})

    def outcome(self, test: ast.expr) -> bool | None:
        names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
        if names != {self.own_name} or any(isinstance(node, ast.Call) for node in ast.walk(test)):
            return None
        attributes = [node for node in ast.walk(test) if isinstance(node, ast.Attribute)]
        if any(node.attr in CHANGING or self._is_changing(node) for node in attributes):
            return None
        try:
            code = compile(ast.Expression(test), "<condition>", "eval")
            return bool(eval(code, {self.own_name: self.module}))
        except Exception:
            return None

    def _is_changing(self, node: ast.Attribute) -> bool:
        is_property = isinstance(getattr(type(self.module), node.attr, None), property)
        return self._is_own(node) and (node.attr in self.own_changes or is_property)

    def value(self, expression: ast.expr | None) -> Flow | None:
        if isinstance(expression, ast.FormattedValue) and self._is_self(expression.value):
            return None
        if isinstance(expression, ast.Call) and self._asks_for_attribute(expression):
            return None
        if isinstance(expression, ast.Compare) and all(map(_is_none, expression.comparators)):
            if self._child(expression.left) is not None:
                return None
        if isinstance(expression, ast.Attribute):
            if (name := self._child(expression)) is not None:
                self._note_unknown(name)
                return None
            if self._is_own(expression):
                return None
            if self._child(expression.value) is not None and not _is_callable(expression.attr):
                return None
            if _is_name_in_place(expression.attr):
                # A method that somebody else may call.
                self.change_in_place()
        if self._is_self(expression):
            # Whoever is given the module itself may call any of its children.
            self._note_all_unknown()
        return super().value(expression)

    def _asks_for_attribute(self, call: ast.Call) -> bool:
        """Whether a call is `hasattr(self, ...)`, or a `getattr` of something that cannot be called."""
        match call:
            case ast.Call(func=ast.Name(id="hasattr"), args=[owner, _]):
                return self._is_self(owner)
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(str(name)), *default]):
                is_plain = all(isinstance(node, ast.Constant) for node in default)
                return self._is_self(owner) and is_plain and not callable(getattr(self.module, name, None))
        return False

    def read_callee(self, callee: ast.expr) -> Flow | None:
        if isinstance(callee, ast.Attribute) and self._is_own(callee):
            return None
        return super().read_callee(callee)

    def of_call(
        self, call: ast.Call, owner: Flow | None, positional: list[Flow | None], keywords: list[Flow | None]
    ) -> Flow | None:
        name = self._child(call.func)
        if name is not None:
            return self._call_child(name, call, positional, keywords)
        if isinstance(call.func, ast.Attribute) and self._is_own(call.func):
            self._call_method(call.func.attr)
        if isinstance(call.func, ast.Name) and call.func.id == "super":
            self._note_all_unknown()
        if self._may_change_in_place(call):
            self.change_in_place()
            return None
        return owner if isinstance(call.func, ast.Attribute) and call.func.attr in SAME else None

    def _call_child(
        self, name: str, call: ast.Call, positional: list[Flow | None], keywords: list[Flow | None]
    ) -> Flow | None:
        child = getattr(self.module, name)
        own = own_module(child)
        parameters = list(inspect.signature(type(own).forward).parameters)[1:]
        renamed = new_names(type(own).forward)
        words = [renamed.get(word.arg, word.arg) for word in call.keywords]
        nodes = {**dict(zip(parameters, call.args)), **dict(zip(words, (word.value for word in call.keywords)))}
        flows = {**dict(zip(parameters, positional)), **dict(zip(words, keywords))}
        flow = flows.get(parameters[0]) if parameters else None
        given = frozenset(word for word, node in nodes.items() if word and not isinstance(node, ast.Constant))
        self.notes.append((name, ChildCall(flow, given)))
        if any(map(_may_change_its_input, own.modules())):
            self.change_in_place()
        if name in self.own_changes or len(call.args) + len(call.keywords) != 1:
            return None
        return Flow((name,), from_input=False) if flow is None else Flow((*flow.modules, name), flow.from_input)

    def _call_method(self, name: str) -> None:
        """The children that a method of the module calls, it is not known with what."""
        pending, seen = [name], set()
        while pending:
            method = getattr(type(self.module), pending.pop(), None)
            code = code_of(method) if inspect.isfunction(method) else None
            if code is None or method in seen:
                continue
            seen.add(method)
            for node in ast.walk(code):
                if isinstance(node, ast.Attribute) and self._is_own(node):
                    pending.append(node.attr)
                    if self._child(node) is not None:
                        self._note_unknown(node.attr)

    def _note_unknown(self, name: str) -> None:
        """Notes that a child may be called, it is not known when and with what."""
        self.notes.append((name, ChildCall(None, frozenset())))
        self.change_in_place()

    def _note_all_unknown(self) -> None:
        for name, _ in self.module.named_children():
            self._note_unknown(name)

    def _may_change_in_place(self, call: ast.Call) -> bool:
        if _says_in_place(call):
            return True
        if isinstance(call.func, ast.Attribute):
            if self._is_own(call.func):
                return _may_write(getattr(type(self.module), call.func.attr, None))
            found = self.find_global(call.func)
            return not _is_method(call.func.attr) if found is None else _may_write_when_called(found, call)
        return _may_write_when_called(self.find_global(call.func), call)

    def write_to(self, target: ast.Attribute | ast.Subscript) -> None:
        if not self._is_own(target):
            self.change_in_place()

    def change_in_place(self) -> None:
        # Other variables may stand for the same memory, in full or in part.
        self.forget_all()

    def _is_self(self, node: ast.AST | None) -> bool:
        return isinstance(node, ast.Name) and node.id == self.own_name

    def _is_own(self, node: ast.AST) -> bool:
        """Whether an expression is `self.<anything>`."""
        return isinstance(node, ast.Attribute) and self._is_self(node.value)

    def _child(self, node: ast.AST) -> str | None:
        """The name of the child that an expression `self.<child>` stands for."""
        is_child = self._is_own(node) and isinstance(getattr(self.module, node.attr, None), nn.Module)
        return node.attr if is_child else None


def _is_none(expression: ast.expr) -> bool:
    return isinstance(expression, ast.Constant) and expression.value is None


def _is_callable(name: str) -> bool:
    return name in ("forward", "__call__", "_call_impl")


def _is_method(name: str) -> bool:
    """Whether a method of this name, of a tensor or a container, leaves as it is what tokens are computed from."""
    owners = (torch.Tensor, dict, list, str, tuple)
    return not _is_name_in_place(name) and any(hasattr(owner, name) for owner in owners)


def _is_name_in_place(name: str) -> bool:
    return name.endswith("_")


def _says_in_place(call: ast.Call) -> bool:
    """Whether a call says of itself that it changes something in place."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    words = {word.arg: word.value for word in call.keywords}
    given = [words[name] for name in ("out", "inplace") if name in words]
    return _is_name_in_place(name) or not all(isinstance(node, ast.Constant) and not node.value for node in given)


def _may_write_when_called(function: Any, call: ast.Call) -> bool:
    """The same, where the function is known."""
    if _may_write(function):
        return True
    try:
        names = list(inspect.signature(function).parameters)[: len(call.args)]
    except (TypeError, ValueError):
        return False
    given = dict(zip(names, call.args))
    nodes = [given[name] for name in ("out", "inplace") if name in given]
    return not all(isinstance(node, ast.Constant) and not node.value for node in nodes)


@cache
def _may_write(function: Callable | None) -> bool:
    """Whether a function may change its arguments in place, or somebody else's: whether its code says so, or is not
    at hand."""
    if function is None or _is_name_in_place(getattr(function, "__name__", "_")):
        return True
    if isinstance(function, type):
        return issubclass(function, nn.Module)
    if getattr(builtins, function.__name__, None) is function:
        return function.__name__ not in HARMLESS
    if _is_of_torch(function):
        return False
    code = code_of(function)
    if code is None:
        return True
    known = inspect.unwrap(function).__globals__
    own_name = next(iter(parameter_names(code)), None)
    for node in ast.walk(code):
        is_written = isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load)
        if is_written or isinstance(node, (ast.AugAssign, ast.Delete)):
            return True
        if isinstance(node, ast.Call):
            if _says_in_place(node):
                return True
            callee = node.func
            if isinstance(callee, ast.Name):
                found = known.get(callee.id, getattr(builtins, callee.id, None))
                if found is not function and _may_write(found):
                    return True
            elif isinstance(callee, ast.Attribute):
                root = callee
                while isinstance(root, ast.Attribute):
                    root = root.value
                name = root.id if isinstance(root, ast.Name) else None
                # What a module calls of itself, is looked at where the module is.
                if name != own_name and not inspect.ismodule(known.get(name)) and not _is_method(callee.attr):
                    return True
            else:
                return True
    return False


def _may_change_its_input(module: nn.Module) -> bool:
    """Whether a module, without its children, may change in place what it is given."""
    if getattr(module, "inplace", False):
        return True
    pending, seen = ["forward"], set()
    while pending:
        method = inspect.unwrap(getattr(type(module), pending.pop(), None))
        if not inspect.isfunction(method) or method in seen:
            continue
        seen.add(method)
        if _may_write(method):
            return True
        code = None if _is_of_torch(method) else code_of(method)
        own_name = next(iter(parameter_names(code)), None) if code is not None else None
        for node in ast.walk(code) if own_name is not None else ():
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == own_name:
                pending.append(node.attr)
    return False


def _is_of_torch(function: Callable) -> bool:
    owner = getattr(function, "__objclass__", None) or getattr(function, "__self__", None)
    module = function.__module__ or getattr(owner, "__module__", None) or getattr(owner, "__name__", None) or ""
    return module.partition(".")[0] == "torch"
