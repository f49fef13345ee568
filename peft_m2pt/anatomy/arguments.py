"""
What the arguments of an attention module are.

Names differ between model families and change with releases: transformers 5.24 renamed the cache. So an argument is
recognized by its annotation, then by what the module's code does with it, and only then by its name.
"""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache

from ..errors import UnsupportedModelError
from ..upstream import renamed_arguments
from .code_reader import CodeReader, parameters_of, parse_function


class Role(Enum):
    """What an argument of an attention module is."""

    INPUT = auto()
    """The hidden states."""
    CACHE = auto()
    """Keys and values of earlier tokens."""
    MASK = auto()
    """Which keys each query sees."""
    ROTATIONS = auto()
    """Rotations, or other position embeddings, computed outside the module."""
    POSITIONS = auto()
    """Position ids."""
    BOUNDARIES = auto()
    """Where packed sequences begin and end (`cu_seqlens`)."""
    MAX_LENGTH = auto()
    """The length of the longest packed sequence."""
    SHARED_KV = auto()
    """A dictionary in which modules store keys and values that later layers share."""
    SELECTED_KEYS = auto()
    """Indices of the keys that each query sees, selected by an earlier layer."""
    TOKENS_ONLY = auto()
    """Computed for the tokens, or says what to return. Left out for prompts."""
    UNSUPPORTED = auto()
    """Changes scores or keys in a way that is not defined for prompts."""


# Used if annotation and code say nothing.
NAMES: dict[str, Role] = {
    "attention_mask": Role.MASK,
    "cache": Role.CACHE,
    "cache_offset": Role.TOKENS_ONLY,
    "cache_position": Role.TOKENS_ONLY,
    "cu_seqlens": Role.BOUNDARIES,
    "encoder_attention_mask": Role.MASK,
    "encoder_hidden_states": Role.TOKENS_ONLY,
    "freqs_ci": Role.ROTATIONS,
    "head_mask": Role.TOKENS_ONLY,
    "input_features_mask": Role.TOKENS_ONLY,
    "key_value_states": Role.TOKENS_ONLY,
    "layer_head_mask": Role.TOKENS_ONLY,
    "layer_past": Role.CACHE,
    "mask": Role.MASK,
    "max_seqlen": Role.MAX_LENGTH,
    "output_attentions": Role.TOKENS_ONLY,
    "past_key_value": Role.CACHE,
    "past_key_values": Role.CACHE,
    "position_bias": Role.UNSUPPORTED,
    "position_embeddings": Role.ROTATIONS,
    "position_ids": Role.POSITIONS,
    "prev_topk_indices": Role.SELECTED_KEYS,
    "relative_position_embeddings": Role.UNSUPPORTED,
    "rotary_pos_emb": Role.ROTATIONS,
    "shared_kv_states": Role.SHARED_KV,
    "use_cache": Role.TOKENS_ONLY,
}


# Documented keyword arguments of transformers' attention functions.
ATTENTION_FUNCTION_ARGUMENTS = {
    "attention_mask": Role.MASK,
    "cu_seq_lens_k": Role.BOUNDARIES,
    "cu_seq_lens_q": Role.BOUNDARIES,
    "max_length_k": Role.MAX_LENGTH,
    "max_length_q": Role.MAX_LENGTH,
}


# Attention functions are called as `function(module, query, key, value, attention_mask, ...)`.
MASK_POSITION = 4


@dataclass(frozen=True)
class Argument:
    """
    A named argument of an attention module.

    Args:
        name (`str`):
            Its name.
        role ([`Role`], *optional*):
            What it is. `None` if unknown.
        default (`Any`):
            Its default, `inspect.Parameter.empty` if it has none.
    """

    name: str
    role: Role | None
    default: Any = None

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is inspect.Parameter.empty

    def is_left_out(self, value: Any) -> bool:
        """Whether a value means the same as leaving the argument out."""
        is_plain = isinstance(value, (bool, int, float, str))
        return value is None or value is self.default or (is_plain and value == self.default)


@dataclass(frozen=True)
class Signature:
    """
    The arguments of a class of attention modules.

    Args:
        arguments (`tuple[Argument, ...]`):
            The named ones. The first is the input.
        roles (`dict[str, Role]`):
            The known roles, of named arguments and of those that a caller may add.
        unknown (`tuple[Argument, ...]`):
            The named ones without a known role.
        renamed_arguments (`dict[str, str]`):
            The present names of deprecated arguments, which callers may still use.
        input_names (`tuple[str, ...]`), cache_names (`tuple[str, ...]`):
            The names under which callers may pass the hidden states and a cache.
    """

    arguments: tuple[Argument, ...]
    roles: dict[str, Role]
    unknown: tuple[Argument, ...]
    renamed_arguments: dict[str, str]
    input_names: tuple[str, ...]
    cache_names: tuple[str, ...]

    @property
    def input_name(self) -> str:
        """The name of the hidden states."""
        return self.arguments[0].name

    def takes(self, role: Role) -> bool:
        """Whether a named argument has this role."""
        return any(argument.role is role for argument in self.arguments)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call, by their present names."""
        bound = dict(zip((argument.name for argument in self.arguments), args))
        for name, value in kwargs.items():
            bound[self.renamed_arguments.get(name, name)] = value
        return bound

    def find(self, role: Role, bound: dict[str, Any]) -> Any:
        """The argument with this role in a call. `None` if there is none."""
        for name, value in bound.items():
            if value is not None and self.roles.get(name) is role:
                return value
        return None

    def find_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hidden states in the arguments of a call."""
        if args:
            return args[0]
        # Hot path: once per layer and token.
        for name in self.input_names:
            if name in kwargs:
                return kwargs[name]
        raise TypeError(f"There are no hidden states among {list(kwargs)}.")

    def find_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The cache for self-attention in the arguments of a call. `None` if there is none."""
        # Hot path: once per layer and token.
        for name in self.cache_names:
            if (cache := kwargs.get(name)) is not None:
                break
        else:
            cache = self.find(Role.CACHE, self.bind(args, {})) if len(args) > 1 else None
        # That of an encoder-decoder holds one.
        return getattr(cache, "self_attention_cache", cache)


@cache
def read_signature(module_class: type) -> Signature:
    """
    Recognizes the arguments of a class of attention modules.

    Returns:
        [`Signature`]
    """
    function = inspect.unwrap(module_class.forward)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind not in variadic][1:]
    in_code = _roles_in_code(module_class)
    arguments = []
    for i, parameter in enumerate(parameters):
        role = Role.INPUT if i == 0 else _role(parameter, function, in_code)
        arguments.append(Argument(parameter.name, role, parameter.default))
    roles = {**NAMES, **{argument.name: argument.role for argument in arguments if argument.role is not None}}
    unknown = tuple(argument for argument in arguments if argument.role is None)
    renamed = renamed_arguments(module_class.forward)
    names = [
        tuple(name for name in (*roles, *renamed) if roles.get(renamed.get(name, name)) is role)
        for role in (Role.INPUT, Role.CACHE)
    ]
    return Signature(tuple(arguments), roles, unknown, renamed, *(tuple(dict.fromkeys(some)) for some in names))


def check_signature(attention: nn.Module, path: str, remedy: str) -> None:
    """
    Checks that every argument that a call of an attention module must give has a meaning for prompts.

    Raises:
        UnsupportedModelError: If an argument without a default is unknown, or any argument is unsupported.
    """
    unknown = [
        argument.name
        for argument in read_signature(type(attention)).arguments
        if argument.role is Role.UNSUPPORTED or (argument.role is None and argument.is_required)
    ]
    if unknown:
        raise UnsupportedModelError(
            f"The attention '{path}' ({type(attention).__name__}) takes {sorted(unknown)}, which M2PT does not know "
            f"how to set for prompts. {remedy}"
        )


def check_call(signature: Signature, bound: dict[str, Any], attention: nn.Module, path: str) -> None:
    """
    Checks that a call gives an attention module no unknown argument.

    One that has its default, or is `None`, does no harm: prompts are computed as for callers that do not know it.

    Raises:
        UnsupportedModelError: If an unknown argument has a value.
    """
    for argument in signature.unknown:
        value = bound.get(argument.name)
        if not argument.is_left_out(value):
            is_plain = isinstance(value, (bool, int, float, str))
            shown = repr(value) if is_plain else f"a value of type {type(value).__name__}"
            if isinstance(value, torch.Tensor):
                shown = f"a tensor of shape {tuple(value.shape)}"
            raise UnsupportedModelError(
                f"The attention '{path}' ({type(attention).__name__}) was called with {argument.name}={shown}, which "
                f"M2PT does not know how to set for prompts. Call the model without it, or leave this attention out "
                f"with exclude_modules=['{path}']."
            )


def _role(parameter: inspect.Parameter, function: Callable, in_code: dict[str, Role]) -> Role | None:
    """The role of an argument by annotation, code and name. `None` if these say nothing or contradict each other."""
    members = list(_members(parameter.annotation, function))
    if any(isinstance(member, type) and issubclass(member, Cache) for member in members):
        return Role.CACHE
    if BlockMask in members:
        return Role.MASK
    if parameter.name in in_code:
        return in_code[parameter.name]
    by_name = NAMES.get(parameter.name)
    if any(typing.get_origin(m) is tuple and typing.get_args(m) == (torch.Tensor, torch.Tensor) for m in members):
        # A cosine and a sine, or the key and value of models that are older than cache classes.
        return Role.ROTATIONS if by_name in (None, Role.ROTATIONS) else None
    return by_name


def _members(annotation: Any, function: Callable) -> Iterator[Any]:
    """The types that an annotation allows."""
    if isinstance(annotation, typing.ForwardRef):
        annotation = annotation.__forward_arg__
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, function.__globals__)
        except Exception:  # a name imported for type checkers only
            return
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _members(member, function)
    else:
        yield annotation


def _roles_in_code(module_class: type) -> dict[str, Role]:
    """The roles of arguments by what `forward` does with them. Arguments of several roles are left out."""
    code = parse_function(module_class.forward)
    if code is None:
        return {}
    own_name, *names = [parameter.arg for parameter in parameters_of(code)] or [""]
    roles: dict[str, set[Role]] = defaultdict(set)
    for name, role in _RoleReader(module_class, own_name, names[1:]).findings:
        roles[name].add(role)
    return {name: found.pop() for name, found in roles.items() if len(found) == 1}


# Methods that return the same tensor in another form.
VIEW_METHODS = ("bool", "contiguous", "expand", "float", "squeeze", "to", "type_as", "unsqueeze", "view")


# The value of a variable that is `None`, as an argument that is left out.
NOTHING = object()


class _RoleReader(CodeReader):
    """
    Follows the arguments of an attention module through its `forward`. The value of a variable is the name of the
    argument that it holds, in full, in part or in another form.
    """

    def __init__(self, module_class: type, own_name: str, names: list[str]) -> None:
        self.module_class = module_class
        self.own_name = own_name
        super().__init__(module_class.forward, {name: name for name in names})

    def join(self, value: Any, other: Any) -> Any:
        if NOTHING in (value, other):
            return other if value is NOTHING else value
        return super().join(value, other)

    def of_part(self, value: Any) -> Any:
        return None if value is NOTHING else value

    def of_expression(self, expression: ast.expr, first: Any) -> Any:
        if isinstance(expression, ast.Constant) and expression.value is None:
            return NOTHING
        return first if isinstance(expression, (ast.Subscript, ast.Attribute, ast.Starred)) else None

    def of_call(self, call: ast.Call, owner: Any, positional: list[Any], keywords: list[Any]) -> Any:
        words = list(zip((keyword.arg for keyword in call.keywords), keywords))
        found = self._roles_in_call(call, owner, positional, words)
        self.findings += [(source, role) for source, role in found if source not in (None, NOTHING)]
        return owner if isinstance(call.func, ast.Attribute) and call.func.attr in VIEW_METHODS else None

    def _roles_in_call(
        self, call: ast.Call, owner: Any, positional: list[Any], words: list[tuple[str | None, Any]]
    ) -> Iterator[tuple[Any, Role]]:
        """Yields the arguments that a call uses, and the roles that it gives them."""
        function = call.func
        if isinstance(function, ast.Attribute):
            if function.attr == "update" and len(call.args) > 1:
                yield owner, Role.CACHE
            # A rotary module takes positions. A method would apply rotations.
            if self._is_self(function.value) and "rotary" in function.attr:
                if not hasattr(self.module_class, function.attr):
                    yield from ((source, Role.POSITIONS) for source in (*positional, *dict(words).values()))
        elif isinstance(function, ast.Name) and "rotary" in function.id:
            # `apply_rotary_pos_emb` of older models takes position ids as well.
            callee = self.find_global(function)
            names = list(inspect.signature(callee).parameters) if callable(callee) else []
            for name, source in (*zip_longest(names, positional), *words):
                yield source, Role.POSITIONS if name == "position_ids" else Role.ROTATIONS
        elif isinstance(function, ast.Name) and call.args and self._is_self(call.args[0]):
            # Positions cannot be counted behind a starred argument.
            is_counted = not any(isinstance(argument, ast.Starred) for argument in call.args)
            masks = positional[MASK_POSITION : MASK_POSITION + 1] if is_counted else []
            for name, source in (*words, *(("attention_mask", source) for source in masks)):
                if name in ATTENTION_FUNCTION_ARGUMENTS:
                    yield source, ATTENTION_FUNCTION_ARGUMENTS[name]

    def _is_self(self, expression: ast.expr) -> bool:
        return isinstance(expression, ast.Name) and expression.id == self.own_name
