"""
Follows values through the code of a function.

It knows what the text says for certain, and nothing else: after a branch, a value is known if it is the same on both
sides. What is assigned in a loop, a `try` or a function within the function is unknown behind it.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any


@cache
def parse_function(function: Callable) -> ast.FunctionDef | None:
    """
    Parses the source of a function, without its decorators' wrappers.

    Returns:
        `ast.FunctionDef`, or `None` if the source is not available.
    """
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return code if isinstance(code, ast.FunctionDef) else None


def parameter_names(code: ast.FunctionDef) -> list[str]:
    """Names of the parameters of a function that can be given by position."""
    return [parameter.arg for parameter in (*code.args.posonlyargs, *code.args.args)]


def parameters_of(code: ast.FunctionDef) -> list[ast.arg]:
    """The named parameters of a function."""
    return [*code.args.posonlyargs, *code.args.args, *code.args.kwonlyargs]


def assigned_names(*nodes: ast.AST) -> set[str]:
    """All names that code binds or deletes, in any way that Python has."""
    names: set[str] = set()
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        match node:
            case ast.Name(ctx=ast.Store() | ast.Del()):
                names.add(node.id)
            case ast.alias():
                names.add((node.asname or node.name).partition(".")[0])
            case ast.MatchMapping(rest=str(name)):
                names.add(name)
            case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar() if node.name:
                names.add(node.name)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Global() | ast.Nonlocal():
                names.update(node.names)
    return names


class CodeReader:
    """
    Reads statements in the order in which they run, and keeps what is known of the value of each variable.

    Subclasses say what a value is: they give a meaning to calls and other expressions, and collect `findings`. A
    variable of unknown value is not in `values`.

    Args:
        function (`Callable`):
            The function to read.
        values (`dict[str, Any]`):
            What is known of its parameters.
    """

    def __init__(self, function: Callable, values: dict[str, Any]) -> None:
        self.function = inspect.unwrap(function)
        self.code = parse_function(self.function)
        self.values = dict(values)
        self.findings: list[Any] = []
        # Assigned by functions within the function, which may run at any time.
        self._assigned_anytime: set[str] = set()
        self._nothing_is_certain = False
        self._depth = 0
        if self.code is not None:
            variadic = [argument for argument in (self.code.args.vararg, self.code.args.kwarg) if argument]
            parameters = {argument.arg for argument in (*parameters_of(self.code), *variadic)}
            self._locals = {*assigned_names(*self.code.body), *parameters}
            self.read(self.code.body)

    # For subclasses.

    def outcome(self, test: ast.expr) -> bool | None:
        """The value of a condition if it is the same in every call of the function, else `None`."""
        return None

    def join(self, value: Any, other: Any) -> Any:
        """What is known of a variable that has one value or another. `None` if nothing is."""
        return value if value == other else None

    def of_call(self, call: ast.Call, owner: Any, positional: list[Any], keywords: list[Any]) -> Any:
        """The value of a call, given those of its arguments and, for a method, of the object."""
        return None

    def of_part(self, value: Any) -> Any:
        """The value of a part of something that is unpacked."""
        return None

    def of_expression(self, expression: ast.expr, first: Any) -> Any:
        """The value of any other expression, given that of its first part."""
        return None

    def read_callee(self, callee: ast.expr) -> Any:
        """Reads what is called. Returns the value of the object whose method it is."""
        return self.value(callee.value if isinstance(callee, ast.Attribute) else callee)

    def write_to(self, target: ast.Attribute | ast.Subscript) -> None:
        """Called for an assignment into an object."""

    def change_in_place(self) -> None:
        """Called for code that may change an object in place."""

    def forget_all(self) -> None:
        """Makes all variables unknown; for good, if a function within the function does it."""
        self.values.clear()
        self._nothing_is_certain |= self._depth > 0

    def find_global(self, expression: ast.expr) -> Any:
        """What a dotted name outside the function stands for. `None` if that is not known."""
        if isinstance(expression, ast.Name):
            if expression.id in self._locals or self._depth > 0:
                return None
            return find_global(self.function, expression.id)
        if isinstance(expression, ast.Attribute):
            owner = self.find_global(expression.value)
            return getattr(owner, expression.attr, None) if inspect.ismodule(owner) else None
        return None

    # Statements.

    def read(self, statements: list[ast.stmt]) -> None:
        """Reads statements one after the other."""
        for statement in statements:
            self._read(statement)

    def _read(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Expr() | ast.Return():
                self.value(statement.value)
            case ast.Assign():
                value = self.value(statement.value)
                for target in statement.targets:
                    self._bind(target, value)
            case ast.AnnAssign():
                value = self.value(statement.value)
                if statement.value is not None:
                    self._bind(statement.target, value)
            case ast.AugAssign():
                self.value(statement.value)
                self._bind(statement.target, None)
                self.change_in_place()
            case ast.Delete():
                for target in statement.targets:
                    self._bind(target, None)
            case ast.If():
                self._choose(statement.test, lambda: self.read(statement.body), lambda: self.read(statement.orelse))
            case ast.For() | ast.While():
                self._repeat(lambda: self._read_loosely(statement))
            case ast.With():
                for item in statement.items:
                    self.value(item.context_expr)
                    if item.optional_vars is not None:
                        self._bind(item.optional_vars, None)
                self.read(statement.body)
                # Contexts such as `contextlib.suppress` may end the body anywhere; those of torch do not.
                if not all(self._is_of_torch(item.context_expr) for item in statement.items):
                    self._forget(assigned_names(*statement.body))
            case ast.FunctionDef():
                for part in (*statement.decorator_list, *statement.args.defaults, *statement.args.kw_defaults):
                    self.value(part)
                self._forget({statement.name})
                self._read_within(lambda: self.read(statement.body))
            case ast.Global() | ast.Nonlocal():
                self._assigned_anytime.update(statement.names)
                self._forget(set(statement.names))
            case ast.Try() | ast.TryStar() | ast.Match() | ast.Raise() | ast.Assert():
                self._read_loosely(statement)
            case ast.Import() | ast.ImportFrom() | ast.Pass() | ast.Break() | ast.Continue():
                self._forget(assigned_names(statement))
            case _:
                self.forget_all()
                self._read_loosely(statement)
                self.forget_all()

    def _choose(self, test: ast.expr, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
        """Reads the branch that a condition leads to, or both. Returns their values, or that of the only one twice."""
        outcome = self.outcome(test)
        if outcome is not None:
            value = first() if outcome else second()
            return value, value
        self.value(test)
        before = dict(self.values)
        value = first()
        after, self.values = self.values, before
        other = second()
        self.values = self._common(after, self.values)
        return value, other

    def _read_loosely(self, node: ast.AST) -> None:
        """Reads parts of which each may run or not, or end anywhere: what one assigns is unknown in all others."""
        assigned = assigned_names(node)
        for _, part in ast.iter_fields(node):
            is_block = isinstance(part, list) and all(isinstance(inner, ast.stmt) for inner in part)
            for inner in [part] if is_block or not isinstance(part, list) else part:
                self._forget(assigned)
                if is_block:
                    self.read(inner)
                elif isinstance(getattr(inner, "ctx", None), ast.Store):
                    self._bind(inner, None)
                elif isinstance(inner, ast.expr):
                    self.value(inner)
                elif isinstance(inner, ast.AST):
                    self._read_loosely(inner)
        self._forget(assigned)

    def _repeat(self, action: Callable[[], Any]) -> None:
        """Reads what may run any number of times."""
        while True:
            before, num_findings = dict(self.values), len(self.findings)
            action()
            self.values = self._common(before, self.values)
            if self.values == before:
                return
            # These rest on values that are not known every time.
            del self.findings[num_findings:]

    def _is_of_torch(self, expression: ast.expr) -> bool:
        found = self.find_global(expression.func) if isinstance(expression, ast.Call) else None
        return (getattr(found, "__module__", None) or "").partition(".")[0] == "torch"

    def _read_within(self, action: Callable[[], Any]) -> None:
        """Reads a function within the function: it may run at any time, so it knows nothing of outer variables."""
        outer, self.values = self.values, {}
        self._depth += 1
        action()
        self._depth -= 1
        self.values = outer
        self._forget(self._assigned_anytime)
        if self._nothing_is_certain:
            self.values.clear()

    # Variables.

    def _bind(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name():
                if value is None or target.id in self._assigned_anytime or self._nothing_is_certain:
                    self.values.pop(target.id, None)
                else:
                    self.values[target.id] = value
            case ast.Tuple() | ast.List():
                for element in target.elts:
                    self._bind(element, None if value is None else self.of_part(value))
            case ast.Starred():
                self._bind(target.value, value)
            case ast.Attribute() | ast.Subscript():
                self.value(target)
                self.write_to(target)

    def _forget(self, names: set[str]) -> None:
        for name in names:
            self.values.pop(name, None)

    def _common(self, values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
        joined = {name: self.join(values[name], others[name]) for name in values if name in others}
        return {name: value for name, value in joined.items() if value is not None}

    # Expressions.

    def value(self, expression: ast.expr | None) -> Any:
        """Reads an expression, in the order of evaluation. `None` if its value is not known."""
        match expression:
            case None:
                return None
            case ast.Name():
                return self.values.get(expression.id)
            case ast.NamedExpr():
                value = self.value(expression.value)
                self._bind(expression.target, value)
                return value
            case ast.IfExp(test=test, body=body, orelse=orelse):
                value, other = self._choose(test, lambda: self.value(body), lambda: self.value(orelse))
                return None if value is None or other is None else self.join(value, other)
            case ast.BoolOp() | ast.Compare():
                self._read_loosely(expression)
                return None
            case ast.Call():
                owner = self.read_callee(expression.func)
                positional = self._values(expression.args)
                keywords = self._values([keyword.value for keyword in expression.keywords])
                return self.of_call(expression, owner, positional, keywords)
            case ast.Lambda():
                self._values([*expression.args.defaults, *expression.args.kw_defaults])
                self._read_within(lambda: self.value(expression.body))
                return None
            case ast.GeneratorExp():
                self._assigned_anytime |= assigned_names(expression)
                self._read_within(lambda: self._read_loosely(expression))
                return None
            case ast.ListComp() | ast.SetComp() | ast.DictComp():
                self._repeat(lambda: self._read_loosely(expression))
                return None
            case ast.Await() | ast.Yield() | ast.YieldFrom():
                self.value(expression.value)
                self.forget_all()
                return None
        values = self._values(list(_parts(expression)))
        return self.of_expression(expression, values[0] if values else None)

    def _values(self, expressions: list[ast.expr | None]) -> list[Any]:
        return [self.value(expression) for expression in expressions]


def find_global(function: Callable, name: str) -> Any:
    """The global or builtin that a name in the code of a function stands for. `None` if there is none."""
    return inspect.unwrap(function).__globals__.get(name, getattr(builtins, name, None))


def _parts(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions directly within one, also behind what is no expression itself."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield child
        else:
            yield from _parts(child)
