"""
What a module does with its input, read from the code of its `forward`.

The names of norms, and whether they come before or behind the attention, differ between families. The code tells:
`self.input_layernorm(hidden_states)`, then `self.self_attn(hidden_states, ...)`.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass

from torch import nn

from ..upstream import renamed_arguments
from .code_reader import CodeReader, parameter_names, parse_function
from .in_place import changes_input, is_in_place_name, is_pure_method, may_write, says_in_place
from .modules import own_module


# Methods that leave the vector of each token as it is.
IDENTITY_METHODS = ("to", "contiguous", "squeeze", "type_as")


# Attributes of modules that may change from call to call, so conditions on them have no fixed outcome.
MUTABLE_ATTRIBUTES = ("training", "gradient_checkpointing", "requires_grad", "_attn_implementation")


@dataclass(frozen=True)
class Flow:
    """
    How a value was computed.

    Args:
        modules (`tuple[str, ...]`):
            Names of the children that were called one after the other, each on the output of the one before.
        from_input (`bool`):
            Whether the first of them was called on the module's own input, and not on something else that the module
            computed.
    """

    modules: tuple[str, ...] = ()
    from_input: bool = True


@dataclass(frozen=True)
class ChildCall:
    """
    A call of a child in the `forward` of a module.

    Args:
        flow ([`Flow`], *optional*):
            How its first argument was computed. `None` if that is not known, or not by children from the input.
        arguments (`frozenset[str]`):
            Names of the arguments that it gets, without constants.
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
        `list[ChildCall]`: Empty if there are none, or if the source is not available. A child that may be called in a
        way that the code does not show has a call of unknown flow.
    """
    return [call for name, call in _read(module) if name == child_name]


def first_child_on_input(module: nn.Module, attribute: str) -> nn.Module | None:
    """
    Returns the first child with an attribute that a module calls on its own input, or `None`.

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
    """The calls of children in the `forward` of a module, in the order of the code."""
    code = parse_function(type(module).forward)
    if code is None or len(parameter_names(code)) < 2:
        return []
    return _FlowReader(module, code).findings


class _FlowReader(CodeReader):
    """Follows the input of a module through its `forward`. A value is a [`Flow`]."""

    def __init__(self, module: nn.Module, code: ast.FunctionDef) -> None:
        self.module = module
        self.own_name, input_name = parameter_names(code)[:2]
        # Attributes that the module sets when it is called.
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
        if any(node.attr in MUTABLE_ATTRIBUTES or self._may_change(node) for node in attributes):
            return None
        try:
            code = compile(ast.Expression(test), "<condition>", "eval")
            return bool(eval(code, {self.own_name: self.module}))
        except Exception:
            return None

    def _may_change(self, node: ast.Attribute) -> bool:
        is_property = isinstance(getattr(type(self.module), node.attr, None), property)
        return self._is_own(node) and (node.attr in self.own_changes or is_property)

    def value(self, expression: ast.expr | None) -> Flow | None:
        match expression:
            case ast.FormattedValue() if self._is_self(expression.value):
                return None
            case ast.Call() if self._asks_for_attribute(expression):
                return None
            case ast.Compare(comparators=[ast.Constant(None)]) if self._child(expression.left) is not None:
                return None
            case ast.Attribute():
                if (name := self._child(expression)) is not None:
                    self._call_unknown(name)
                    return None
                is_of_child = self._child(expression.value) is not None
                if self._is_own(expression) or (is_of_child and not _is_call(expression.attr)):
                    return None
                if is_in_place_name(expression.attr):
                    # A method that something else may call.
                    self.change_in_place()
            case ast.Name() if self._is_self(expression):
                # What gets the module itself may call any child.
                self._call_all_unknown()
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
            self._call_all_unknown()
        if self._may_write(call):
            self.change_in_place()
            return None
        return owner if isinstance(call.func, ast.Attribute) and call.func.attr in IDENTITY_METHODS else None

    def _call_child(
        self, name: str, call: ast.Call, positional: list[Flow | None], keywords: list[Flow | None]
    ) -> Flow | None:
        own = own_module(getattr(self.module, name))
        parameters = list(inspect.signature(type(own).forward).parameters)[1:]
        renamed = renamed_arguments(type(own).forward)
        words = [renamed.get(word.arg, word.arg) for word in call.keywords]
        nodes = {**dict(zip(parameters, call.args)), **dict(zip(words, (word.value for word in call.keywords)))}
        flows = {**dict(zip(parameters, positional)), **dict(zip(words, keywords))}
        flow = flows.get(parameters[0]) if parameters else None
        given = frozenset(word for word, node in nodes.items() if word and not isinstance(node, ast.Constant))
        self.findings.append((name, ChildCall(flow, given)))
        if any(map(changes_input, own.modules())):
            self.change_in_place()
        if name in self.own_changes or len(call.args) + len(call.keywords) != 1:
            return None
        return Flow((name,), from_input=False) if flow is None else Flow((*flow.modules, name), flow.from_input)

    def _call_method(self, name: str) -> None:
        """Finds the children that a method of the module may call, with unknown input."""
        pending, seen = [name], set()
        while pending:
            method = getattr(type(self.module), pending.pop(), None)
            code = parse_function(method) if inspect.isfunction(method) else None
            if code is None or method in seen:
                continue
            seen.add(method)
            for node in ast.walk(code):
                if isinstance(node, ast.Attribute) and self._is_own(node):
                    pending.append(node.attr)
                    if self._child(node) is not None:
                        self._call_unknown(node.attr)

    def _call_unknown(self, name: str) -> None:
        """Notes that a child may be called, at an unknown time and with unknown input."""
        self.findings.append((name, ChildCall(None, frozenset())))
        self.change_in_place()

    def _call_all_unknown(self) -> None:
        for name, _ in self.module.named_children():
            self._call_unknown(name)

    def _may_write(self, call: ast.Call) -> bool:
        """Whether a call of something that is no child may change a tensor in place."""
        if isinstance(call.func, ast.Attribute) and self._is_own(call.func):
            owner = type(self.module)
            return says_in_place(call) or may_write(getattr(owner, call.func.attr, None), owner)
        found = self.find_global(call.func)
        if found is None and isinstance(call.func, ast.Attribute):
            return says_in_place(call) or not is_pure_method(call.func.attr)
        return says_in_place(call, found) or may_write(found)

    def write_to(self, target: ast.Attribute | ast.Subscript) -> None:
        if not self._is_own(target):
            self.change_in_place()

    def change_in_place(self) -> None:
        # Any variable may share the memory.
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


def _is_call(name: str) -> bool:
    return name in ("forward", "__call__", "_call_impl")
