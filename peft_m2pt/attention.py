"""
Attention functions that see prompt rows.

A prompt acts only through its key and its value in its own layer, since the layer's output at the prompt rows is
thrown away. So no sequence gets longer. While [`~peft_m2pt.layer.M2PTAttention`] calls the attention module that it
adapts, the attention function which that module calls through transformers' `AttentionInterface` either

- *records* the key and the value it is given, when the module runs on the prompt rows, or
- *attends* with these rows in front of key and value, when the module runs on the tokens.

For every other call, in this model or another, it does what the function does that transformers would have called.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import AttentionInterface

from .dense import attend_eager, attend_sdpa
from .errors import UnsupportedModelError
from .flash import attend_flash
from .flex import attend_flex
from .rows import Rows
from .threads import PerThread
from .upstream import attention_implementation


# How prompt rows get into each implementation.
IMPLEMENTATIONS: dict[str, Callable] = {
    "eager": attend_eager,
    "sdpa": attend_sdpa,
    "flash_attention_2": attend_flash,
    "flash_attention_3": attend_flash,
    "flash_attention_4": attend_flash,
    "flex_attention": attend_flex,
}


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


def find_attention_call(module_class: type) -> AttentionCall | None:
    """
    Finds out, from the code of its methods, how a class of modules reaches its attention function.

    Args:
        module_class (`type`):
            Class of a module.

    Returns:
        [`AttentionCall`], or `None` if no method of the class uses an `AttentionInterface`.
    """
    if module_class not in _attention_calls:
        _attention_calls[module_class] = _read_attention_call(module_class)
    return _attention_calls[module_class]


# A dictionary, since torch.compile would read the code anew behind `functools.cache`.
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


class _Recorded(Exception):
    """Ends the pass of a module on prompt rows: nobody reads what it would go on to compute."""


class _Recorder:
    """Takes the key and value that a module hands to its attention function, in one of its calls of it."""

    def __init__(self, module: nn.Module, path: str, masks: list[torch.Tensor], call: int) -> None:
        self.module = module
        self.path = path
        self.masks = masks
        self.calls_left = call
        self.rows: Rows | None = None

    def __call__(self, extension: Callable, attend: Callable, query, key, value, attention_mask, **kwargs):
        _check_what_keys_get(self.module, self.path, key, kwargs)
        self._check_mask(attention_mask)
        if self.calls_left > 0:
            self.calls_left -= 1
            # Shows in what depends on it.
            shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])
            return query.new_full(shape, torch.nan), None
        self.rows = Rows(key, value)
        raise _Recorded

    def _check_mask(self, attention_mask: Any) -> None:
        """Refuses a mask by which the module adds something to the scores of some keys: prompts would not get it."""
        if not isinstance(attention_mask, torch.Tensor) or not attention_mask.is_floating_point():
            return
        if (
            torch.compiler.is_compiling()
            or attention_mask.is_meta
            or any(_share_memory(attention_mask, mask) for mask in self.masks)
        ):
            return
        hides = attention_mask <= torch.finfo(attention_mask.dtype).min / 2
        if attention_mask.masked_fill(hides, 0).any():
            raise _adds(self.module, self.path, "a mask with other numbers than those that show or hide a key")


def _share_memory(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor is other or tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


# What attention functions are given besides, which says nothing of single keys, or what prompts are spared.
SAID_OTHERWISE = {
    *("cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q", "position_ids"),
    *("s_aux", "sinks"),
}


def _check_what_keys_get(module: nn.Module, path: str, key: torch.Tensor, kwargs: dict[str, Any]) -> None:
    """Refuses what a module hands to its attention function with a number for each key, which prompts do not have."""
    num_keys = key.shape[2]
    for name, value in kwargs.items():
        if name in SAID_OTHERWISE or not isinstance(value, torch.Tensor) or value.dim() == 0:
            continue
        of_keys = value.is_floating_point() and num_keys > 1 and value.shape[-1] == num_keys
        if of_keys or name == "position_bias":
            raise _adds(module, path, f"{name} of shape {tuple(value.shape)}")


def _adds(module: nn.Module, path: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The attention '{path}' ({type(module).__name__}) hands {what} to its attention function, which adds "
        f"something to the score of each key, and M2PT does not know what that would be for prompts. Leave it out "
        f"with exclude_modules=['{path}']."
    )


class _Attender:
    """
    Puts recorded rows in front of the key and value that a module hands to its attention function.

    A module that treats each image on its own can be given the rows of each image. Another one that calls its
    attention function again may do so with other keys and values: these are recorded then.
    """

    def __init__(
        self, module: nn.Module, path: str, rows: Rows | Sequence[Rows | None], record: Callable[[int], Rows] | None
    ) -> None:
        self.module = module
        self.path = path
        self.rows = rows
        self.record = record
        self.num_calls = 0

    def __call__(self, extension: Callable, attend: Callable, query, key, value, attention_mask, **kwargs):
        _check_what_keys_get(self.module, self.path, key, kwargs)
        rows = self.rows
        if not isinstance(rows, Rows) and kwargs.get("cu_seq_lens_k") is None:
            rows = rows[self.num_calls]
        elif self.num_calls > 0 and self.record is not None:
            rows = self.record(self.num_calls)
        self.num_calls += 1
        if rows is None:
            return attend(self.module, query, key, value, attention_mask, **kwargs)
        return extension(attend, self.module, rows, query, key, value, attention_mask, **kwargs)


# What the attention function does for the module that is being called: a `_Recorder` or an `_Attender`. Not a keyword
# argument, since many modules do not hand those on to their attention function; not a `ContextVar`, which
# torch.compile cannot follow.
_task = PerThread()


class PromptAttention:
    """
    The function of an attention implementation, extended to see prompt rows.

    Args:
        extension (`Callable`):
            One of `IMPLEMENTATIONS`, which calls the function with the rows.
        attend (`Callable`, *optional*):
            The function to extend. `None` for "eager", which is another function for every model.
    """

    def __init__(self, extension: Callable, attend: Callable | None) -> None:
        self.extension = extension
        self.attend = attend

    def __call__(self, module: nn.Module, query, key, value, attention_mask=None, **kwargs):
        attend = self.attend or _own_eager_attention(type(module))
        task = _task.value
        if task is None or task.module is not module:
            return attend(module, query, key, value, attention_mask, **kwargs)
        return task(self.extension, attend, query, key, value, attention_mask, **kwargs)


def _own_eager_attention(module_class: type) -> Callable:
    call = find_attention_call(module_class)
    if call is None or call.eager is None:
        raise UnsupportedModelError(
            f"{module_class.__name__} uses attn_implementation='eager', but no function for it was found in "
            f"{module_class.__module__}. Use attn_implementation='sdpa' for the model that it belongs to."
        )
    return call.eager


def find_extension(module: nn.Module, path: str) -> Callable:
    """
    Finds out how prompt rows get into the attention implementation that a module uses.

    Args:
        module (`nn.Module`):
            An attention module.
        path (`str`):
            Its module path, for the error message.

    Returns:
        `Callable`: One of `IMPLEMENTATIONS`.

    Raises:
        UnsupportedModelError: If M2PT does not know the implementation.
    """
    implementation = attention_implementation(module)
    attend = find_attention_call(type(module)).interface.get(implementation)
    if isinstance(attend, PromptAttention):
        return attend.extension
    if attend is flash_attention_forward:
        # Also under the names of kernels from the Hub.
        return attend_flash
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"The attention '{path}' uses attn_implementation={implementation!r}, which M2PT does not support. Choose "
            f"one of {tuple(IMPLEMENTATIONS)} with model.set_attn_implementation(...), or when loading the model."
        )
    return IMPLEMENTATIONS[implementation]


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
    implementation = attention_implementation(module)
    interface = find_attention_call(type(module)).interface
    attend = interface.get(implementation)
    if isinstance(attend, PromptAttention):
        return
    extended = PromptAttention(find_extension(module, path), attend)
    # An interface without entries of its own shows those of all.
    if type(interface)().get(implementation) is attend:
        interface.register(implementation, extended)
    else:
        interface[implementation] = extended


def record_rows(
    module: nn.Module, path: str, arguments: dict[str, Any], shape: tuple[int, int], call: int = 0
) -> Rows:
    """
    Runs an attention module on prompt rows and takes the key and value that reach its attention function.

    Args:
        module (`nn.Module`):
            The attention module.
        path (`str`):
            Its module path, for error messages.
        arguments (`dict[str, Any]`):
            Keyword arguments for its `forward`.
        shape (`tuple[int, int]`):
            In how many batches there are prompt rows among them, and how many in each.
        call (`int`, defaults to 0):
            Which call of the attention function, for modules that call it several times.

    Returns:
        [`Rows`]

    Raises:
        UnsupportedModelError: If the attention function was not called so often, or with other keys than those of the
            prompt rows, or with something that is added to their scores.
    """
    masks = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    recorder = _Recorder(module, path, masks, call)
    # `forward`, since hooks on the module are for the tokens: transformers collects `attentions` with them.
    with contextlib.suppress(_Recorded):
        _run(recorder, module.forward, **arguments)
    if recorder.rows is None and call == 0:
        raise _goes_round(module, path)
    if recorder.rows is None or (call > 0 and _depends_on_nan(recorder.rows)):
        reason = "less often for prompts" if recorder.rows is None else "with keys or values that depend on the first"
        raise UnsupportedModelError(
            f"The attention '{path}' ({type(module).__name__}) calls its attention function {call + 1} times, and "
            f"{reason}, so that M2PT does not know what prompts are there. Leave it out with "
            f"exclude_modules=['{path}']."
        )
    if (recorder.rows.key.shape[0], recorder.rows.key.shape[2]) != shape:
        raise UnsupportedModelError(
            f"The attention '{path}' ({type(module).__name__}) made keys of shape {tuple(recorder.rows.key.shape)} of "
            f"{shape[1]} prompt rows, where ({shape[0]}, num_heads, {shape[1]}, head_dim) was expected. Leave it out "
            f"with exclude_modules=['{path}']."
        )
    return recorder.rows


def _depends_on_nan(rows: Rows) -> bool:
    return bool(rows.key.isnan().any() or rows.value.isnan().any())


def attend_to_rows(
    module: nn.Module,
    path: str,
    rows: Rows | Sequence[Rows | None],
    record: Callable[[int], Rows] | None,
    call: Callable[[], Any],
) -> Any:
    """
    Calls an attention module, which attends to prompt rows besides its own tokens.

    Args:
        module (`nn.Module`):
            The attention module.
        path (`str`):
            Its module path, for error messages.
        rows ([`~peft_m2pt.rows.Rows`] or `Sequence[Rows | None]`):
            Key and value of its prompt rows, or those of each image, where it treats each on its own.
        record (`Callable[[int], Rows]`, *optional*):
            Gives those of a later call of the attention function. `None` if they are the same for all calls.
        call (`Callable[[], Any]`):
            Calls the module on its tokens.

    Returns:
        `Any`: What the module returns.

    Raises:
        UnsupportedModelError: If no attention function was called, or with something that is added to scores.
    """
    attender = _Attender(module, path, rows, record)
    output = _run(attender, call)
    if attender.num_calls == 0:
        raise _goes_round(module, path)
    return output


def _run(task: _Recorder | _Attender, function: Callable, *args: Any, **kwargs: Any) -> Any:
    before, _task.value = _task.value, task
    try:
        return function(*args, **kwargs)
    finally:
        _task.value = before


def _goes_round(module: nn.Module, path: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The attention '{path}' ({type(module).__name__}) went round the attention interface of transformers, so its "
        f"prompts were not seen. Leave it out with exclude_modules=['{path}']."
    )
