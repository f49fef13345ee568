"""
Follows values through the code of a function.

It knows no more than the text says for certain: after branches a value is known if it is the same in all, and what is
carried round a loop, handed over in a way that is not known, or written by code that may run at any time is unknown.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any


@cache
def code_of(function: Callable) -> ast.FunctionDef | None:
    """
    Returns the code of a function, without that of its decorators.

    Args:
        function (`Callable`):
            A function.

    Returns:
        `ast.FunctionDef`, or `None` if its code is not at hand.
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


def names_written(*nodes: ast.AST) -> set[str]:
    """All names to which code gives a value, or takes it, in any of the ways that there are."""
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

    What a value is, subclasses say: they give a meaning to calls and to other expressions, and write down in `notes`
    what they have come for. A variable whose value is not known is not in `values`.

    Args:
        function (`Callable`):
            The function whose code is read.
        values (`dict[str, Any]`):
            What is known of its parameters.
    """

    def __init__(self, function: Callable, values: dict[str, Any]) -> None:
        self.function = inspect.unwrap(function)
        self.code = code_of(self.function)
        self.values = dict(values)
        self.notes: list[Any] = []
        # Written by functions within the function, which may run at any time.
        self._elsewhere: set[str] = set()
        self._everything_elsewhere = False
        self._depth = 0
        if self.code is not None:
            variadic = [argument for argument in (self.code.args.vararg, self.code.args.kwarg) if argument]
            parameters = {argument.arg for argument in (*parameters_of(self.code), *variadic)}
            self._locals = {*names_written(*self.code.body), *parameters}
            self.read(self.code.body)

    # What subclasses say.

    def outcome(self, test: ast.expr) -> bool | None:
        """What a condition amounts to, whenever the function is called. `None` if that is not known."""
        return None

    def join(self, value: Any, other: Any) -> Any:
        """What is known of a variable that has one value or another. `None` if nothing is."""
        return value if value == other else None

    def of_call(self, call: ast.Call, owner: Any, positional: list[Any], keywords: list[Any]) -> Any:
        """The value of a call, of whose parts (the owner is that of a method) these are the values."""
        return None

    def of_part(self, value: Any) -> Any:
        """The value of a part of something that has a value and is unpacked."""
        return None

    def of_expression(self, expression: ast.expr, first: Any) -> Any:
        """The value of an expression that is neither a name nor a call, and whose first part has a value."""
        return None

    def read_callee(self, callee: ast.expr) -> Any:
        """Reads what is called. Returns the value of the object whose method it is."""
        return self.value(callee.value if isinstance(callee, ast.Attribute) else callee)

    def write_to(self, target: ast.Attribute | ast.Subscript) -> None:
        """Something is written into an object."""

    def change_in_place(self) -> None:
        """Something that variables stand for may be changed, it is not known which."""

    def forget_all(self) -> None:
        """From here on, nothing is known of any variable; never again, if this is a function within the function."""
        self.values.clear()
        self._everything_elsewhere |= self._depth > 0

    def find_global(self, expression: ast.expr) -> Any:
        """What a dotted name outside of the function stands for. `None` if that is not known."""
        if isinstance(expression, ast.Name):
            if expression.id in self._locals or self._depth > 0:
                return None
            of_module, builtins = self.function.__globals__, __builtins__
            builtins = builtins if isinstance(builtins, dict) else vars(builtins)
            return of_module.get(expression.id, builtins.get(expression.id))
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
            case ast.If():
                self._choose(statement.test, lambda: self.read(statement.body), lambda: self.read(statement.orelse))
            case ast.For():
                self.value(statement.iter)
                self._read_loop(statement, lambda: self._bind(statement.target, None))
            case ast.While():
                self._read_loop(statement, lambda: self.value(statement.test))
            case ast.With():
                self._read_with(statement)
            case ast.Try() | ast.TryStar():
                self._read_try(statement)
            case ast.Match():
                self._read_match(statement)
            case ast.Delete():
                for target in statement.targets:
                    self._bind(target, None)
            case ast.FunctionDef():
                for part in (*statement.decorator_list, *statement.args.defaults, *statement.args.kw_defaults):
                    self.value(part)
                self._forget({statement.name})
                self._read_within(lambda: self.read(statement.body))
            case ast.Global() | ast.Nonlocal():
                self._elsewhere.update(statement.names)
                self._forget(set(statement.names))
            case ast.Raise():
                self.value(statement.exc)
                self.value(statement.cause)
            case ast.Assert():
                self.value(statement.test)
                self._maybe(lambda: self.value(statement.msg))
            case ast.Import() | ast.ImportFrom():
                self._forget(names_written(statement))
            case ast.Pass() | ast.Break() | ast.Continue():
                pass
            case _:
                self._read_blindly(statement)

    def _choose(self, test: ast.expr, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
        """Reads the branch that a condition leads to, or both. Returns their values, twice that of the only one."""
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

    def _maybe(self, action: Callable[[], Any]) -> None:
        """Reads what may run or not."""
        before = dict(self.values)
        action()
        self.values = self._common(before, self.values)

    def _repeat(self, action: Callable[[], Any]) -> None:
        """Reads what may run any number of times. What it writes is to be forgotten before."""
        while True:
            before, num_notes = dict(self.values), len(self.notes)
            action()
            self.values = self._common(before, self.values)
            if self.values == before:
                return
            # Not what the first time knew, but what every time does.
            del self.notes[num_notes:]

    def _read_loop(self, statement: ast.For | ast.While, begin: Callable[[], Any]) -> None:
        def turn() -> None:
            self._forget(written)
            begin()
            self.read(statement.body)
            self._forget(written)

        written = names_written(statement)
        self._forget(written)
        self._repeat(turn)
        self._maybe(lambda: self.read(statement.orelse))
        self._forget(written)

    def _read_with(self, statement: ast.With) -> None:
        for item in statement.items:
            self.value(item.context_expr)
            if item.optional_vars is not None:
                self._bind(item.optional_vars, None)
        before = dict(self.values)
        self.read(statement.body)
        # Other contexts may end it anywhere, as `contextlib.suppress` does.
        if not all(self._is_of_torch(item.context_expr) for item in statement.items):
            self.values = self._common(self._interrupted(before, statement.body), self.values)

    def _is_of_torch(self, expression: ast.expr) -> bool:
        found = self.find_global(expression.func) if isinstance(expression, ast.Call) else None
        return (getattr(found, "__module__", None) or "").partition(".")[0] == "torch"

    def _interrupted(self, before: dict[str, Any], statements: list[ast.stmt]) -> dict[str, Any]:
        """What is known after statements that may have ended anywhere, `self.values` if they did at their end."""
        written = names_written(*statements)
        common = self._common(before, self.values)
        return {name: value for name, value in common.items() if name not in written}

    def _read_try(self, statement: ast.Try | ast.TryStar) -> None:
        before = dict(self.values)
        self.read(statement.body)
        interrupted = self._interrupted(before, statement.body)
        self.read(statement.orelse)
        after = self.values
        for handler in statement.handlers:
            self.values = dict(interrupted)
            self.value(handler.type)
            self._forget({handler.name})
            self.read(handler.body)
            self._forget({handler.name})
            after = self._common(after, self.values)
        self.values = after
        if statement.finalbody:
            others = [*statement.body, *statement.handlers, *statement.orelse]
            self.values = self._interrupted(interrupted, others)
            self.read(statement.finalbody)

    def _read_match(self, statement: ast.Match) -> None:
        self.value(statement.subject)
        self._forget(names_written(*(case.pattern for case in statement.cases)))
        before = dict(self.values)
        ends = []
        for case in statement.cases:
            self.values = dict(before)
            for value in (node.value for node in ast.walk(case.pattern) if isinstance(node, ast.MatchValue)):
                self.value(value)
            self.value(case.guard)
            before = self._common(before, self.values)
            self.read(case.body)
            ends.append(self.values)
        self.values = before
        for end in ends:
            self.values = self._common(end, self.values)

    def _read_within(self, action: Callable[[], Any]) -> None:
        """Reads a function within the function: it may run at any time, and knows nothing of variables around it."""
        outer, self.values = self.values, {}
        self._depth += 1
        action()
        self._depth -= 1
        self.values = outer
        self._forget(self._elsewhere)
        if self._everything_elsewhere:
            self.values.clear()

    def _read_blindly(self, node: ast.AST) -> None:
        """Reads what is in none of the forms that are known."""
        self.forget_all()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(child)
            elif isinstance(child, ast.stmt):
                self._read(child)
            else:
                self._read_blindly(child)
            self.forget_all()
        self._forget(names_written(node))

    # Variables.

    def _bind(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name():
                if value is None or target.id in self._elsewhere or self._everything_elsewhere:
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

    def _forget(self, names: set[str | None]) -> None:
        for name in names:
            self.values.pop(name, None)

    def _common(self, values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
        joined = {name: self.join(values[name], others[name]) for name in values if name in others}
        return {name: value for name, value in joined.items() if value is not None}

    # Expressions.

    def value(self, expression: ast.expr | None) -> Any:
        """Reads an expression, in the order in which it is evaluated. `None` if its value is not known."""
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
            case ast.BoolOp(values=[first, *others]):
                self.value(first)
                self._maybe(lambda: self._values(others))
                return None
            case ast.Compare(left=left, comparators=[second, *others]):
                self._values([left, second])
                self._maybe(lambda: self._values(others))
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
                self.value(expression.generators[0].iter)
                self._elsewhere |= names_written(expression)
                self._read_within(lambda: self._read_comprehension(expression))
                return None
            case ast.ListComp() | ast.SetComp() | ast.DictComp():
                self.value(expression.generators[0].iter)
                self._forget(names_written(expression))
                self._repeat(lambda: self._read_comprehension(expression))
                return None
            case ast.Await() | ast.Yield() | ast.YieldFrom():
                self.value(expression.value)
                self.forget_all()
                return None
        values = self._values(list(_parts(expression)))
        return self.of_expression(expression, values[0] if values else None)

    def _values(self, expressions: list[ast.expr | None]) -> list[Any]:
        return [self.value(expression) for expression in expressions]

    def _read_comprehension(self, expression: ast.expr) -> None:
        written = names_written(expression)
        self._forget(written)
        for i, generator in enumerate(expression.generators):
            if i > 0:
                self.value(generator.iter)
            self._values(generator.ifs)
        if isinstance(expression, ast.DictComp):
            self._values([expression.key, expression.value])
        else:
            self.value(expression.elt)
        self._forget(written)


def _parts(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions directly within one, also behind what is no expression itself."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield child
        else:
            yield from _parts(child)
