"""
Prompts that a cache keeps for its next token.

In a step of decoding, a layer of the cache joins the keys that it has with the new one, and the attention function
gets the result. With prompts in front of that (`prompted_layers.py`), a step does what it does in the base model.

Whether this is safe is observed in the first step: what `update` of the layer has returned has to reach the attention
function untouched, and nothing may hold on to it. That is not so in layers that share keys (Gemma 3n), expand latents
(DeepSeek) or select keys, and other kinds of caches do not join keys. The attention function adds the prompts there.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .first_tokens import FirstTokens
from .prompt_kv import PromptKV


# The attribute of a cache with its prompts, by module path. Copies get it too.
PROMPTS = "m2pt_cached_prompts"


class Owner:
    """
    Stands for prompts as they are. What replaces them retires their owner, so that no cache serves the old ones.
    Copies of a cache have the same owner.
    """

    def __init__(self) -> None:
        self.is_current = True

    def retire(self) -> Owner:
        """Ends what the owner stands for. Returns the next one."""
        self.is_current = False
        return Owner()

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        return self


@dataclass(frozen=True)
class CachedPrompts:
    """
    What a cache keeps of the prompts of an attention module.

    Args:
        layer (`int`):
            The index of the module's layer in the cache.
        prompts (`PromptKV` or `list[PromptKV | None]`, *optional*):
            Their keys and values.
        first_tokens ([`~peft_m2pt.attention.first_tokens.FirstTokens`], *optional*):
            What they stand in front of. `None` for prompts without positions.
        owners (`tuple[Owner, ...]`):
            That of the layer, and those of the prompts in it.
        conditions ([`~peft_m2pt.layers.conditions.Conditions`]):
            What else they depend on.
        are_certain (`bool`):
            Whether they fit any next token. If samples start at several positions, its mask tells.
        in_front ([`InFront`], *optional*):
            The same, to stand in front of the tokens in the cache. `None` if the attention function always adds them.
    """

    layer: int
    prompts: PromptKV | list[PromptKV | None] | None
    first_tokens: FirstTokens | None
    owners: tuple[Owner, ...]
    conditions: Any
    are_certain: bool
    in_front: InFront | None


class _ByPath(dict):
    """Prompts by module path. Files have none, since other weights may be there when one is read."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _ByPath:
        return _ByPath({path: copy.deepcopy(kept, memo) for path, kept in self.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        return _ByPath, ()


def keep_prompts(cache: Any, path: str, prompts: CachedPrompts | None) -> None:
    """
    Lets a cache keep the prompts of an attention module.

    Args:
        cache (`Cache`):
            The cache.
        path (`str`):
            The module path of the attention.
        prompts ([`CachedPrompts`], *optional*):
            The prompts. `None` to keep none.
    """
    by_path = _ByPath(getattr(cache, PROMPTS, {}))
    by_path.pop(path, None)
    if prompts is not None:
        by_path[path] = prompts
    setattr(cache, PROMPTS, by_path)


def keeps_prompts(cache: Any) -> bool:
    """Whether a cache keeps prompts of any attention module."""
    return bool(getattr(cache, PROMPTS, None))


def forget_prompts(cache: Any) -> None:
    """Makes a cache keep no prompts."""
    setattr(cache, PROMPTS, _ByPath())


@dataclass(slots=True)
class InFront:
    """
    Prompts that may stand in front of the tokens in a layer of a cache, for calls with one token.

    Args:
        prompts ([`~peft_m2pt.attention.prompt_kv.PromptKV`]):
            The prompts.
        is_safe (`bool`, *optional*):
            Whether they may stand there. `None` until it has been observed.
    """

    prompts: PromptKV
    is_safe: bool | None = None

    def __post_init__(self) -> None:
        self.prompts = replace(self.prompts, is_in_front=True)


class Watched(torch.Tensor):
    """A tensor that records which functions it is passed to, its own methods and attributes included."""

    used_by: list[Any]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, cls):
                value.used_by.append(function)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


class Watch:
    """
    Watches what becomes of the keys or values that `update` of a cache has returned to a module.

    Args:
        tensor (`torch.Tensor`):
            The keys or values.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.used_by: list[Any] = []
        self._watched: Watched | None = tensor.as_subclass(Watched)
        self._watched.used_by = self.used_by
        self.reference = weakref.ref(self._watched)

    def hand_over(self) -> torch.Tensor:
        """What the module gets in the place of the tensor."""
        watched, self._watched = self._watched, None
        return watched

    def is_seen_in(self, tensor: torch.Tensor) -> bool:
        """Whether that reaches the attention function as it was handed over."""
        return tensor is self.reference() and not self.used_by

    def end(self) -> bool:
        """Ends the watch. Returns whether nobody holds on to the tensor."""
        self._watched = None
        if (watched := self.reference()) is None:
            return True
        # For whoever does, it is an ordinary tensor.
        watched.__class__ = torch.Tensor
        del watched.used_by
        return False
