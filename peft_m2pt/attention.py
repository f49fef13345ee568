"""
Attention functions that see prompt rows.

A prompt acts only through its key and its value in its own layer, since the layer's output at the prompt rows is
thrown away. So no sequence gets longer. While [`~peft_m2pt.layer.M2PTAttention`] calls the attention module that it
wraps, the attention function which that module calls through transformers' `AttentionInterface` either

- *records* the key and the value it is given, when the module runs on the prompt rows, or
- *attends* with these rows in front of key and value, when the module runs on the tokens.

For every other call, in this model or another, it does what the function does that transformers would have called.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

from .errors import UnsupportedModelError


IMPLEMENTATIONS = ("eager", "sdpa")


@dataclass(frozen=True)
class AttentionCall:
    """
    How a class of attention modules reaches its attention function.

    Args:
        interface (`AttentionInterface`):
            Where it looks up the function of the implementation in use.
        eager (`Callable`, *optional*):
            The function of its own file that it calls for "eager", which no interface knows.
    """

    interface: AttentionInterface
    eager: Callable | None


@cache
def find_attention_call(module_class: type) -> AttentionCall | None:
    """
    Finds out, from the code of its methods, how a class of modules reaches its attention function.

    Args:
        module_class (`type`):
            Class of a module.

    Returns:
        [`AttentionCall`], or `None` if no method of the class uses an `AttentionInterface`.
    """
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
    """
    Whether a function calls `getattr(interface, ...)`. An interface has no attributes of the names of implementations,
    so that always gives the default.
    """
    loaded = [instruction.argval for instruction in dis.get_instructions(function)]
    return any(
        first == "getattr" and function.__globals__.get(second) is interface
        for first, second in zip(loaded, loaded[1:])
        if isinstance(second, str)
    )


def _takes_module(value: Any) -> bool:
    """Whether something is a function that takes a module first, as attention functions do."""
    return inspect.isfunction(value) and next(iter(inspect.signature(value).parameters), None) == "module"


@dataclass
class Rows:
    """
    Key and value of the prompt rows of one attention module.

    Args:
        key (`torch.Tensor` of shape `(1 or batch_size, num_key_value_heads, num_rows, head_dim)`):
            Keys, normed and rotated as the module does it.
        value (`torch.Tensor` of shape `(1 or batch_size, num_key_value_heads, num_rows, value_head_dim)`):
            Values.
        visible (`torch.Tensor` of shape `(batch_size, num_rows)`, *optional*):
            Which rows each sample sees. `None` if it sees all.
    """

    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor | None = None

    @staticmethod
    def of_batch(rows: Sequence[Rows | None]) -> Rows | None:
        """Puts the rows of each sample side by side, as a batch. `None` stands for no rows."""
        some = next((row for row in rows if row is not None), None)
        if some is None:
            return None
        counts = [0 if row is None else row.key.shape[2] for row in rows]
        positions = torch.arange(max(counts), device=some.key.device)
        visible = positions < torch.tensor(counts, device=some.key.device)[:, None]
        key, value = (
            torch.cat([_padded(None if row is None else getattr(row, name), part, max(counts)) for row in rows])
            for name, part in (("key", some.key), ("value", some.value))
        )
        return Rows(key, value, None if min(counts) == max(counts) else visible)


def _padded(rows: torch.Tensor | None, like: torch.Tensor, num_rows: int) -> torch.Tensor:
    rows = like[:, :, :0] if rows is None else rows
    return nn.functional.pad(rows, (0, 0, 0, num_rows - rows.shape[2]))


class _Recorder:
    """Takes the key and value that a module hands to its attention function."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.rows: Rows | None = None

    def __call__(self, attend: Callable, implementation: str, query, key, value, attention_mask, **kwargs):
        self.rows = Rows(key, value)
        # Nobody reads the output of this pass; it only has the shape that the module goes on with.
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


class _Attender:
    """
    Puts recorded rows in front of the key and value that a module hands to its attention function.

    A module that calls it once for each image can be given the rows of each call.
    """

    def __init__(self, module: nn.Module, rows: Rows | Sequence[Rows | None]) -> None:
        self.module = module
        self.rows = rows
        self.num_calls = 0

    def __call__(self, attend: Callable, implementation: str, query, key, value, attention_mask, **kwargs):
        rows = self.rows if isinstance(self.rows, Rows) else self.rows[self.num_calls]
        self.num_calls += 1
        if rows is None:
            return attend(self.module, query, key, value, attention_mask, **kwargs)
        num_rows = rows.key.shape[2]
        is_causal = query.shape[2] > 1 and attention_mask is None and _is_causal(self.module, kwargs)
        num_dummies = 0
        if is_causal and implementation == "sdpa":
            # Keys behind the last query are those of an empty static cache; transformers cuts them off the same way.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
            if rows.visible is None:
                # Causal without a mask: torch lines up the first query with the first key. As many dummy queries as
                # rows make that right again, and keep the fast kernels, which take no mask.
                num_dummies = num_rows
                dummies = query.new_zeros(query.shape[0], query.shape[1], num_dummies, query.shape[3])
                query = torch.cat([dummies, query], dim=2)
        if attention_mask is None and rows.visible is not None:
            attention_mask = _make_mask(query, key, is_causal and implementation == "sdpa")
        if attention_mask is not None:
            attention_mask = widen_mask(attention_mask, num_rows, key.shape[2], rows.visible)
        key = _put_in_front(rows.key, key)
        value = _put_in_front(rows.value, value)
        output, weights = attend(self.module, query, key, value, attention_mask, **kwargs)
        # Some modules arrange the weights by their tokens, which know nothing of prompts.
        return output[:, num_dummies:], None if weights is None else weights[..., num_rows:]


def _make_mask(query: torch.Tensor, key: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """What attention without a mask sees, as a mask of shape `(1, 1, query_length, key_length)`."""
    mask = query.new_zeros(1, 1, query.shape[2], key.shape[2])
    return mask.masked_fill(mask.bool().logical_not().triu(1), torch.finfo(mask.dtype).min) if is_causal else mask


def widen_mask(
    attention_mask: torch.Tensor, num_rows: int, key_length: int, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Adds columns on the left of an attention mask, at which queries see the prompt rows.

    Args:
        attention_mask (`torch.Tensor` of shape `(..., query_length, key_length)`):
            A boolean mask (`True`: visible) or one that is added to the scores. The last dimension may be 1 for all
            keys.
        num_rows (`int`):
            Number of prompt rows.
        key_length (`int`):
            Number of keys behind the prompt rows.
        visible (`torch.Tensor` of shape `(batch_size, num_rows)`, *optional*):
            Which rows each sample sees. `None` if it sees all.

    Returns:
        `torch.Tensor` of shape `(..., query_length, num_rows + key_length)`.
    """
    if attention_mask.shape[-1] == 1:
        attention_mask = attention_mask.expand(*attention_mask.shape[:-1], key_length)
    is_boolean = attention_mask.dtype == torch.bool
    columns = attention_mask.new_full((*attention_mask.shape[:-1], num_rows), is_boolean)
    if visible is not None:
        hidden = False if is_boolean else torch.finfo(attention_mask.dtype).min
        columns = torch.where(visible[:, None, None], columns, hidden)
        attention_mask = attention_mask.expand(*columns.shape[:-1], -1)
    return torch.cat([columns, attention_mask], dim=-1)


def _put_in_front(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows.to(tokens.dtype).expand(tokens.shape[0], -1, -1, -1), tokens], dim=2)


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    is_causal = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if is_causal is None else is_causal


# What the attention function does for the module that is being called. Per thread, since several threads may call one
# model at once; not a keyword argument, since many modules do not hand those on to their attention function.
_current: ContextVar[_Recorder | _Attender | None] = ContextVar("m2pt_attention", default=None)


class PromptAttention:
    """
    The function of an attention implementation, extended to see prompt rows.

    Args:
        implementation (`str`):
            Its name in the `AttentionInterface`.
        attend (`Callable`, *optional*):
            The function to extend. `None` for "eager", which is another function for every model.
    """

    def __init__(self, implementation: str, attend: Callable | None) -> None:
        self.implementation = implementation
        self.attend = attend

    def __call__(self, module: nn.Module, query, key, value, attention_mask=None, **kwargs):
        attend = self.attend or _own_eager_attention(type(module))
        current = _current.get()
        if current is None or current.module is not module:
            return attend(module, query, key, value, attention_mask, **kwargs)
        return current(attend, self.implementation, query, key, value, attention_mask, **kwargs)


def _own_eager_attention(module_class: type) -> Callable:
    call = find_attention_call(module_class)
    if call is None or call.eager is None:
        raise UnsupportedModelError(
            f"{module_class.__name__} uses attn_implementation='eager', but no function for it was found in "
            f"{module_class.__module__}. Use attn_implementation='sdpa' for the model that it belongs to."
        )
    return call.eager


def check_implementation(module: nn.Module, path: str) -> None:
    """
    Checks that M2PT knows the attention implementation that a module uses.

    Args:
        module (`nn.Module`):
            An attention module.
        path (`str`):
            Its module path, for the error message.

    Raises:
        UnsupportedModelError: If it does not.
    """
    implementation = module.config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"The attention '{path}' uses attn_implementation={implementation!r}, which M2PT does not support. Choose "
            f"one of {IMPLEMENTATIONS} with model.set_attn_implementation(...), or when loading the model."
        )


def extend_attention_function(module: nn.Module, path: str) -> None:
    """
    Makes sure that the attention function which a module calls sees prompt rows. Done on every call, since the
    implementation in use may change at any time.

    Args:
        module (`nn.Module`):
            An attention module.
        path (`str`):
            Its module path, for error messages.

    Raises:
        UnsupportedModelError: If M2PT does not know the attention implementation in use.
    """
    implementation = module.config._attn_implementation
    interface = find_attention_call(type(module)).interface
    attend = interface.get(implementation)
    if isinstance(attend, PromptAttention):
        return
    check_implementation(module, path)
    if implementation in interface._local_mapping:
        interface[implementation] = PromptAttention(implementation, attend)
    else:
        interface.register(implementation, PromptAttention(implementation, attend))


def record_rows(module: nn.Module, path: str, arguments: dict[str, Any], num_rows: int) -> Rows:
    """
    Runs an attention module on prompt rows and takes the key and value that reach its attention function.

    Args:
        module (`nn.Module`):
            The attention module.
        path (`str`):
            Its module path, for error messages.
        arguments (`dict[str, Any]`):
            Keyword arguments for its `forward`.
        num_rows (`int`):
            Number of prompt rows among them.

    Returns:
        [`Rows`]

    Raises:
        UnsupportedModelError: If no attention function was called, or with other keys than those of the prompt rows.
    """
    with _as_current(_Recorder(module)) as recorder:
        # `forward`, since hooks on the module are for the tokens: transformers collects `attentions` with them.
        module.forward(**arguments)
    if recorder.rows is None:
        raise _goes_round(module, path)
    if recorder.rows.key.shape[0] != 1 or recorder.rows.key.shape[2] != num_rows:
        raise UnsupportedModelError(
            f"The attention '{path}' ({type(module).__name__}) made keys of shape {tuple(recorder.rows.key.shape)} of "
            f"{num_rows} prompt rows, where (1, num_heads, {num_rows}, head_dim) was expected. Leave it out with "
            f"exclude_modules=['{path}']."
        )
    return recorder.rows


@contextmanager
def attending(module: nn.Module, path: str, rows: Rows | Sequence[Rows | None]) -> Iterator[None]:
    """
    While this context is open, `module` attends to `rows` too.

    Args:
        module (`nn.Module`):
            The attention module.
        path (`str`):
            Its module path, for error messages.
        rows ([`Rows`] or `Sequence[Rows | None]`):
            Key and value of its prompt rows, or those of each call that it will make.

    Raises:
        UnsupportedModelError: At the end, if no attention function was called.
    """
    with _as_current(_Attender(module, rows)) as attender:
        yield
    if attender.num_calls == 0:
        raise _goes_round(module, path)


@contextmanager
def _as_current(current: _Recorder | _Attender) -> Iterator[Any]:
    token = _current.set(current)
    try:
        yield current
    finally:
        _current.reset(token)


def _goes_round(module: nn.Module, path: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The attention '{path}' ({type(module).__name__}) went round the attention interface of transformers, so its "
        f"prompts were not seen. Leave it out with exclude_modules=['{path}']."
    )
