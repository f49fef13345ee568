"""
What a module does with the input of its `forward`, read from the code of that method.

The names of norms, and whether they stand in front of the attention or behind it, differ from family to family. The
code says it: `self.input_layernorm(hidden_states)`, then `self.self_attn(hidden_states, ...)`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from functools import cache

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .upstream import new_names


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
            Where its first argument comes from. `None` if that is neither the input nor the output of a child.
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
        `list[ChildCall]`: Empty if there are none, or if the code is not at hand.
    """
    return [call for name, call in _Reader(module).calls if name == child_name]


def first_reader(module: nn.Module, attribute: str) -> nn.Module | None:
    """
    Returns the first child that a module calls on its own input and that has an attribute, or `None`.

    Args:
        module (`nn.Module`):
            The module.
        attribute (`str`):
            For example "in_features", to find a linear layer.
    """
    for name, call in _Reader(module).calls:
        if call.flow == Flow() and hasattr(getattr(module, name), attribute):
            return getattr(module, name)
    return None


@cache
def forward_code(module_class: type) -> ast.FunctionDef | None:
    function = inspect.unwrap(module_class.forward)
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None


class _Reader:
    """
    Follows values through the statements of a `forward`, in the order in which they stand there.

    `flows` holds where the value of each variable comes from; a variable of other origin is missing.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls: list[tuple[str, ChildCall]] = []
        code = forward_code(type(module))
        if code is None or len(code.args.args) < 2:
            return
        self.flows = {code.args.args[1].arg: Flow()}
        self._read(code.body)

    def _read(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if isinstance(statement, ast.If):
                self._note_calls(statement.test)
                self._read_branches(statement)
            elif isinstance(statement, (ast.For, ast.While, ast.With, ast.Try)):
                for field in ("iter", "test"):
                    if hasattr(statement, field):
                        self._note_calls(getattr(statement, field))
                self._read(statement.body)
            else:
                self._note_calls(statement)
                self._assign(statement)

    def _read_branches(self, statement: ast.If) -> None:
        outcome = self._evaluate(statement.test)
        if outcome is not None:
            self._read(statement.body if outcome else statement.orelse)
            return
        before = dict(self.flows)
        self._read(statement.body)
        after_body, self.flows = self.flows, before
        self._read(statement.orelse)
        self.flows = {name: flow for name, flow in self.flows.items() if after_body.get(name) == flow}

    def _evaluate(self, test: ast.expr) -> bool | None:
        """What a condition on attributes of the module amounts to. `None` if it is about anything else."""
        names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
        if names != {"self"} or any(isinstance(node, ast.Call) for node in ast.walk(test)):
            return None
        try:
            return bool(eval(compile(ast.Expression(test), "<condition>", "eval"), {"self": self.module}))
        except Exception:
            return None

    def _assign(self, statement: ast.stmt) -> None:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        for target in targets:
            names = [node.id for node in ast.walk(target) if isinstance(node, ast.Name)] if target is not None else []
            for name in names:
                self.flows.pop(name, None)
            if isinstance(target, ast.Name) and isinstance(statement, (ast.Assign, ast.AnnAssign)):
                flow = self._flow(statement.value)
                if flow is not None:
                    self.flows[target.id] = flow

    def _flow(self, expression: ast.expr | None) -> Flow | None:
        if isinstance(expression, ast.Name):
            return self.flows.get(expression.id)
        if isinstance(expression, ast.IfExp):
            outcome = self._evaluate(expression.test)
            return None if outcome is None else self._flow(expression.body if outcome else expression.orelse)
        if not isinstance(expression, ast.Call) or not isinstance(expression.func, ast.Attribute):
            return None
        name = self._child(expression)
        if name is not None:
            flow = self._flow(_first_argument(expression))
            return Flow((name,), from_input=False) if flow is None else Flow((*flow.modules, name), flow.from_input)
        # What leaves a token's vector as it is.
        is_same = expression.func.attr in ("to", "contiguous", "squeeze", "type_as")
        return self._flow(expression.func.value) if is_same else None

    def _note_calls(self, node: ast.AST) -> None:
        for call in ast.walk(node):
            name = self._child(call)
            if name is None:
                continue
            child = getattr(self.module, name)
            child = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
            parameters = list(inspect.signature(type(child).forward).parameters)[1:]
            renamed = new_names(type(child).forward)
            given = dict(zip(parameters, call.args))
            given.update({renamed.get(word.arg, word.arg): word.value for word in call.keywords if word.arg})
            first = given.get(parameters[0]) if parameters else None
            names = frozenset(name for name, value in given.items() if not isinstance(value, ast.Constant))
            self.calls.append((name, ChildCall(self._flow(first), names)))

    def _child(self, call: ast.AST) -> str | None:
        """The name of the child in a call `self.<child>(...)`."""
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            return None
        is_own = isinstance(call.func.value, ast.Name) and call.func.value.id == "self"
        is_child = is_own and isinstance(getattr(self.module, call.func.attr, None), nn.Module)
        return call.func.attr if is_child else None


def _first_argument(call: ast.Call) -> ast.expr | None:
    if call.args:
        return call.args[0]
    return call.keywords[0].value if call.keywords else None
