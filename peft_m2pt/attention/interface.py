"""
The journey of prompt keys and values, from a prompt to the attention function.

A prompt acts only through its key and value in its own layer, since the layer's output at the prompt is discarded. So
no sequence gets longer: each self-attention gets n more keys and values, and the rest of the model does not notice.

1. *Extend*: [`~peft_m2pt.layers.attention.M2PTAttention`] is called in the place of an attention module. It makes sure
   that the implementation in use has a `PromptAttention` as its entry in transformers' `AttentionInterface`. For calls
   without prompts, in any model, that does what the entry before it did.
2. *Record*: the module runs on the normed prompts alone, with arguments by `prompt_arguments.py`; its own code
   projects, norms and rotates. The attention function takes the key and value, a `PromptKV`, and ends the pass.
3. *Assign*: `assign_prompt_kv` gives each sample, packed sequence or image the prompts of its adapter, at the position
   of its first token (`find_first_tokens.py`).
4. *Attend*: the module runs on the tokens, with its arguments unchanged. At the attention function, `eager_sdpa.py`,
   `flash.py` or `flex.py` put the prompts in front of key and value, and widen the mask.

Lifetimes: a `PromptKV` is made anew in each call of a layer, so gradient checkpointing recomputes it. Without
gradients, the cache keeps it for its next token, which finds it in front of the tokens in the cache where that is safe
(`cached_prompts.py`). First tokens are found once in a forward pass, for all layers; those in a cache are kept with it
(`cached_first_tokens.py`).

Threads: what the attention function is to do is one value per thread, set around the calls of the module.

Compilation: all of this becomes a part of the model's graph, in which nothing can depend on the values of a mask.
Where eager code refuses a mask, a graph has an assertion, and NaN behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.integrations.flash_attention import flash_attention_forward

from ..anatomy.attention_calls import find_attention_call
from ..errors import UnsupportedModelError
from ..per_thread import PerThread
from ..upstream import PAGED_EAGER, attention_implementation
from .cached_prompts import InFront, Watch
from .eager_sdpa import attend_eager, attend_sdpa, mask_of_step
from .flash import attend_flash
from .flex import attend_flex
from .module_call import layer_index
from .paged import attend_paged
from .prompt_kv import PromptKV
from .prompted_layers import can_have_prompts, join_prompts, undo_join


# How prompts get into each implementation.
IMPLEMENTATIONS: dict[str, Callable] = {
    "eager": attend_eager,
    "sdpa": attend_sdpa,
    "flash_attention_2": attend_flash,
    "flash_attention_3": attend_flash,
    "flash_attention_4": attend_flash,
    "flex_attention": attend_flex,
}


class _Recorded(Exception):
    """Ends the pass of a module on prompts, whose output is not needed."""


class _Task:
    """What the attention function, and `update` of a cache, are to do for a module that is being called."""

    def update(self, method: Callable, layer: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer of a cache does with new keys and values, and returns to the module."""
        return method(layer, *args, **kwargs)


class _Recorder(_Task):
    """Takes the key and value that a module passes to its attention function, in one of its calls of it."""

    def __init__(self, module: nn.Module, path: str, masks: list[torch.Tensor], call: int) -> None:
        self.module = module
        self.path = path
        self.masks = masks
        self.calls_left = call
        self.prompts: PromptKV | None = None

    def __call__(self, extension: Callable, attend: Callable, query, key, value, attention_mask, **kwargs):
        _refuse_biases(self.module, self.path, key.shape[2], kwargs)
        self._check_mask(attention_mask)
        if self.calls_left > 0:
            self.calls_left -= 1
            # NaN spreads to what depends on this call.
            shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])
            return query.new_full(shape, torch.nan), None
        self.prompts = PromptKV(key, value)
        raise _Recorded

    def _check_mask(self, mask: Any) -> None:
        """Refuses a mask in which the module adds a bias to the scores of visible keys: prompts would not get it."""
        if torch.compiler.is_compiling() or not isinstance(mask, torch.Tensor) or not mask.is_floating_point():
            return
        if mask.is_meta or any(_share_memory(mask, other) for other in self.masks):
            return
        if mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, 0).any():
            raise _biased(self.module, self.path, "a mask that does more than show or hide keys")


def _share_memory(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor is other or tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


# Keyword arguments of attention functions that are no bias, or one that does not concern prompts.
UNBIASED = {
    *("cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q", "position_ids"),
    *("s_aux", "sinks"),
}


def _refuse_biases(module: nn.Module, path: str, num_keys: int, kwargs: dict[str, Any]) -> None:
    """Refuses what a module passes to its attention function with one number per key, which prompts do not have."""
    for name, value in kwargs.items():
        if not isinstance(value, torch.Tensor) or name in UNBIASED or value.dim() == 0:
            continue
        is_per_key = value.is_floating_point() and num_keys > 1 and value.shape[-1] == num_keys
        if is_per_key or name == "position_bias":
            raise _biased(module, path, f"{name} of shape {tuple(value.shape)}")


def _biased(module: nn.Module, path: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The attention '{path}' ({type(module).__name__}) passes {what} to its attention function, which adds a bias "
        f"to the score of each key, and prompts have none. Leave it out with exclude_modules=['{path}']."
    )


class _Attender(_Task):
    """
    Puts prompts in front of the key and value that a module passes to its attention function.

    A module that attends to each image in a call of its own gets the prompts of each. For another one that calls its
    attention function again, maybe with other keys and values, these are recorded then.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str,
        prompts: PromptKV | Sequence[PromptKV | None],
        record: Callable[[int], PromptKV] | None,
        is_paged: bool,
    ) -> None:
        self.module = module
        self.path = path
        self.prompts = prompts
        self.record = record
        self.is_paged = is_paged
        self.num_calls = 0

    def __call__(self, extension: Callable, attend: Callable, query, key, value, attention_mask, **kwargs):
        _refuse_biases(self.module, self.path, key.shape[2], kwargs)
        prompts = self.prompts
        if not isinstance(prompts, PromptKV) and kwargs.get("cu_seq_lens_k") is None:
            prompts = prompts[self.num_calls]
        elif self.num_calls > 0 and self.record is not None:
            prompts = self.record(self.num_calls)
        self.num_calls += 1
        if prompts is None:
            return attend(self.module, query, key, value, attention_mask, **kwargs)
        if self.is_paged:
            extension = partial(attend_paged, extension)
        return extension(attend, self.module, prompts, query, key, value, attention_mask, **kwargs)


class NotInFront(Exception):
    """Ends a call of a module that uses its cache in another way than was observed."""


class _Observer(_Attender):
    """Attends as before, and observes whether prompts may stand in front of the tokens in a layer of a cache."""

    def __init__(self, layer: Any, *args: Any) -> None:
        super().__init__(*args)
        self.layer = layer
        self.watches: list[Watch] = []
        self.arrived = False

    def update(self, method: Callable, layer: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        returned = method(layer, *args, **kwargs)
        # A tensor of a class of its own cannot be watched.
        can_be_watched = all(type(tensor) is torch.Tensor for tensor in returned)
        if layer is not self.layer or not can_have_prompts(layer) or not can_be_watched:
            return returned
        watches = [Watch(tensor) for tensor in returned]
        self.watches += watches
        return tuple(watch.hand_over() for watch in watches)

    def __call__(self, extension: Callable, attend: Callable, query, key, value, attention_mask, **kwargs):
        watches = self.watches
        if len(watches) == 2 and watches[0].is_seen_in(key) and watches[1].is_seen_in(value):
            self.arrived = _may_be_in_front(extension, kwargs)
        plain = {id(watch.reference()): watch.tensor for watch in watches}
        key, value = plain.get(id(key), key), plain.get(id(value), value)
        return super().__call__(extension, attend, query, key, value, attention_mask, **kwargs)

    def end(self) -> bool:
        """Ends the observation. Returns whether it is safe."""
        are_let_go = [watch.end() for watch in self.watches]
        return all(are_let_go) and self.arrived and self.num_calls == 1


def _may_be_in_front(extension: Callable, kwargs: dict[str, Any]) -> bool:
    """Whether an attention implementation takes keys with prompts in front of them."""
    if extension is attend_sdpa or extension is attend_eager:
        return True
    return extension is attend_flash and kwargs.get("sliding_window") is None and kwargs.get("cu_seq_lens_k") is None


class _InFrontAttender(_Task):
    """Attends to prompts in front of the tokens in a cache, as the module does without them."""

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    num_calls = 0

    def __init__(self, module: nn.Module, path: str, prompts: PromptKV, layer: Any) -> None:
        self.module = module
        self.path = path
        self.prompts = prompts
        self.layer = layer

    def update(self, method: Callable, layer: Any, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any):
        if layer is not self.layer:
            # Of another model, which is called by a hook.
            return method(layer, key, value, *args, **kwargs)
        joined = join_prompts(layer, self.prompts, key, value) if self.keys is None else None
        if joined is None:
            raise NotInFront
        self.keys, self.values = joined
        return joined

    def __call__(self, extension: Callable, attend: Callable, query, key, value, attention_mask, **kwargs):
        prompts = self.prompts
        if self.num_calls > 0:
            raise NotInFront
        if self.keys is None:
            # In a graph, or by another `update`, the layer has joined tokens alone.
            prompts = PromptKV(prompts.key, prompts.value, prompts.visible)
        elif key is not self.keys or value is not self.values:
            raise NotInFront
        elif not (extension is attend_sdpa or _may_be_in_front(extension, kwargs)):
            raise NotInFront
        self.num_calls = 1
        for name, argument in kwargs.items():
            if isinstance(argument, torch.Tensor) and name not in UNBIASED:
                _refuse_biases(self.module, self.path, prompts.count_tokens(key), kwargs)
                break
        if extension is attend_sdpa and prompts.is_in_front:
            # All that is left to do for one query.
            if attention_mask is not None or prompts.visible is not None:
                attention_mask = mask_of_step(layer_index(self.module), prompts, query, key, attention_mask)
            return attend(self.module, query, key, value, attention_mask, **kwargs)
        return extension(attend, self.module, prompts, query, key, value, attention_mask, **kwargs)


# What the attention function is to do for the module that is being called. Not a keyword argument, since many modules
# (Siglip, Idefics2) do not pass those on; not a `ContextVar`, which torch.compile cannot trace.
_task = PerThread()


class PromptAttention:
    """
    The function of an attention implementation, extended by prompts.

    Args:
        extension (`Callable`):
            One of `IMPLEMENTATIONS`, which calls the function with the prompts.
        attend (`Callable`, *optional*):
            The function to extend. `None` for "eager", whose function is in each model's own file.
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


def intercept_update(method: Callable) -> Callable:
    """Makes what takes the place of the method `update` of layers of caches, see `intercept_updates`."""

    def update(
        layer: Any, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        task = _task.value
        if task is None or torch.compiler.is_dynamo_compiling():
            return method(layer, key_states, value_states, *args, **kwargs)
        return task.update(method, layer, key_states, value_states, *args, **kwargs)

    return update


def _own_eager_attention(module_class: type) -> Callable:
    call = find_attention_call(module_class)
    if call is None or call.eager is None:
        raise UnsupportedModelError(
            f"{module_class.__name__} uses attn_implementation='eager', but {module_class.__module__} has no function "
            f"for it. Load the model with attn_implementation='sdpa'."
        )
    return call.eager


def find_extension(module: nn.Module, path: str, is_paged: bool = False) -> Callable:
    """
    Finds out how prompts get into the attention implementation that a module uses, with a paged cache or without.

    Returns:
        `Callable`: One of `IMPLEMENTATIONS`.

    Raises:
        UnsupportedModelError: If M2PT does not support the implementation.
    """
    implementation = attention_implementation(module)
    if implementation == PAGED_EAGER and is_paged:
        return attend_eager
    attend = find_attention_call(type(module)).interface.get(implementation)
    if isinstance(attend, PromptAttention) and implementation != PAGED_EAGER:
        return attend.extension
    if attend is flash_attention_forward:
        # Kernels from the Hub have it under their own names.
        return attend_flash
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"The attention '{path}' uses attn_implementation={implementation!r}, which M2PT does not support. Choose "
            f"one of {tuple(IMPLEMENTATIONS)} with model.set_attn_implementation(...), or when loading the model."
        )
    return IMPLEMENTATIONS[implementation]


def extend_attention_function(module: nn.Module, path: str, is_paged: bool = False) -> None:
    """
    Extends the attention function that a module calls by prompts, if that is not done. To be called every time, since
    the implementation in use may change.

    Raises:
        UnsupportedModelError: If M2PT does not support the implementation in use.
    """
    implementation = attention_implementation(module)
    interface = find_attention_call(type(module)).interface
    attend = interface.get(implementation)
    if isinstance(attend, PromptAttention) and implementation != PAGED_EAGER:
        return
    # Without a paged cache, "paged|eager" is refused in every call: transformers makes no mask for it.
    extension = find_extension(module, path, is_paged)
    if isinstance(attend, PromptAttention):
        return
    extended = PromptAttention(extension, attend)
    # An entry that all interfaces share is replaced for all of them.
    if type(interface)().get(implementation) is attend:
        interface.register(implementation, extended)
    else:
        interface[implementation] = extended


def record_prompt_kv(
    module: nn.Module, path: str, arguments: dict[str, Any], shape: tuple[int, int], call: int = 0
) -> PromptKV:
    """
    Runs an attention module on prompts and takes the key and value that reach its attention function.

    Args:
        module (`nn.Module`):
            The attention module.
        path (`str`):
            Its module path, for error messages.
        arguments (`dict[str, Any]`):
            Keyword arguments for its `forward`.
        shape (`tuple[int, int]`):
            Batch size and number of prompts in these.
        call (`int`, defaults to 0):
            Which call of the attention function, for modules that call it several times.

    Returns:
        [`PromptKV`]

    Raises:
        UnsupportedModelError: If the attention function was not called so often, got other keys than those of the
            prompts, or adds a bias to their scores.
    """
    masks = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    recorder = _Recorder(module, path, masks, call)
    # `forward`, since hooks are for the tokens: with these, transformers collects `attentions`.
    with contextlib.suppress(_Recorded):
        _run(recorder, module.forward, **arguments)
    prompts = recorder.prompts
    if prompts is None and call == 0:
        raise _bypassed(module, path)
    if prompts is None or (call > 0 and bool(prompts.key.isnan().any() or prompts.value.isnan().any())):
        reason = "fewer times for prompts" if prompts is None else "with keys or values that depend on the first call"
        raise UnsupportedModelError(
            f"The attention '{path}' ({type(module).__name__}) calls its attention function {call + 1} times, but "
            f"{reason}, so M2PT does not know the keys and values of prompts there. Leave it out with "
            f"exclude_modules=['{path}']."
        )
    if (prompts.key.shape[0], prompts.key.shape[2]) != shape:
        raise UnsupportedModelError(
            f"The attention '{path}' ({type(module).__name__}) made keys of shape {tuple(prompts.key.shape)} of "
            f"{shape[1]} prompts, where ({shape[0]}, num_heads, {shape[1]}, head_dim) was expected. Leave it out "
            f"with exclude_modules=['{path}']."
        )
    return prompts


def attend_with_prompts(
    module: nn.Module,
    path: str,
    prompts: PromptKV | Sequence[PromptKV | None],
    record: Callable[[int], PromptKV] | None,
    call: Callable[[], Any],
    is_paged: bool = False,
    in_front: InFront | None = None,
    layer: Any = None,
) -> Any:
    """
    Calls an attention module, which attends to prompts besides its own tokens.

    Args:
        module (`nn.Module`):
            The attention module.
        path (`str`):
            Its module path, for error messages.
        prompts ([`~peft_m2pt.attention.prompt_kv.PromptKV`] or `Sequence[PromptKV | None]`):
            Its prompts, or those of each image if it attends to each in a call of its own.
        record (`Callable[[int], PromptKV]`, *optional*):
            Returns those of a later call of the attention function. `None` if they are the same for all calls.
        call (`Callable[[], Any]`):
            Calls the module on its tokens.
        is_paged (`bool`, defaults to `False`):
            Whether it does so with a paged cache.
        in_front ([`~peft_m2pt.attention.cached_prompts.InFront`], *optional*):
            Records whether the prompts may stand in front of the tokens in the cache of the module.
        layer (`CacheLayerMixin`, *optional*):
            The layer of the cache in which that is observed.

    Returns:
        `Any`: What the module returns.

    Raises:
        UnsupportedModelError: If the attention function was not called, or adds a bias to scores.
    """
    is_observed = in_front is not None and in_front.is_safe is None
    of_call = module, path, prompts, record, is_paged
    attender = _Observer(layer, *of_call) if is_observed else _Attender(*of_call)
    try:
        output = _run(attender, call)
    finally:
        is_safe = is_observed and attender.end()
    if attender.num_calls == 0:
        raise _bypassed(module, path)
    if is_observed:
        in_front.is_safe = is_safe
    return output


def attend_in_front(
    module: nn.Module,
    path: str,
    prompts: PromptKV,
    layer: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """
    Calls an attention module for one token, with prompts in front of the tokens in its cache.

    Args:
        module (`nn.Module`):
            The attention module.
        path (`str`):
            Its module path, for error messages.
        prompts ([`~peft_m2pt.attention.prompt_kv.PromptKV`]):
            Its prompts.
        layer (`CacheLayerMixin`):
            Its layer of the cache.
        args (`tuple[Any, ...]`), kwargs (`dict[str, Any]`):
            The arguments of the call.

    Returns:
        `Any`: What the module returns.

    Raises:
        NotInFront: If the module uses its cache in another way than was observed. The cache is as before.
        UnsupportedModelError: If it adds a bias to scores.
    """
    attender = _InFrontAttender(module, path, prompts, layer)
    task, _task.value = _task.value, attender
    try:
        output = module.call_without_adapters(*args, **kwargs)
        if attender.num_calls == 0 and attender.keys is not None:
            raise NotInFront
    except Exception as error:
        # An attention function that is not extended yet gets keys that do not fit its mask.
        is_unseen = attender.num_calls == 0 and attender.keys is not None and not _is_extended(module)
        if not is_unseen and not isinstance(error, NotInFront):
            raise
        if attender.keys is not None:
            undo_join(layer, prompts, attender.keys, attender.values)
        elif attender.num_calls > 0:
            raise UnsupportedModelError(
                f"The attention '{path}' ({type(module).__name__}) calls its attention function more often than for "
                f"the token before, so M2PT does not know which prompts belong there. Begin with a new cache, or "
                f"leave it out with exclude_modules=['{path}']."
            ) from error
        raise NotInFront from error
    finally:
        _task.value = task
    if attender.num_calls == 0:
        raise _bypassed(module, path)
    return output


def _is_extended(module: nn.Module) -> bool:
    interface = find_attention_call(type(module)).interface
    return isinstance(interface.get(attention_implementation(module)), PromptAttention)


def _run(task: _Recorder | _Attender, function: Callable, *args: Any, **kwargs: Any) -> Any:
    before, _task.value = _task.value, task
    try:
        return function(*args, **kwargs)
    finally:
        _task.value = before


def _bypassed(module: nn.Module, path: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The attention '{path}' ({type(module).__name__}) bypassed the attention interface of transformers, so its "
        f"prompts had no effect. Leave it out with exclude_modules=['{path}']."
    )
