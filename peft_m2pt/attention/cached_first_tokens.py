"""
First tokens that are already in a cache, kept with it.

Prompts of later tokens stand in front of them too. So their positions are kept when they go in, and follow the samples
wherever a method of the cache moves them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Cache

from ..upstream import is_known_to_be_empty
from .cached_prompts import forget_prompts, keeps_prompts
from .first_tokens import FirstTokens


# The attribute of a cache, which its copies get too.
ATTRIBUTE = "m2pt_first_tokens"


# Marks a method of a cache that has been patched.
PATCHED = "m2pt_updates_first_tokens"


@dataclass(frozen=True)
class CachedFirstTokens:
    """
    The first tokens that a layer has in a cache.

    Args:
        indices (`torch.Tensor` of shape `(1 or batch_size,)`):
            Their indices in the cache, -1 for a sample that has none so far.
        first_tokens ([`~peft_m2pt.attention.first_tokens.FirstTokens`]):
            Their positions.
    """

    indices: torch.Tensor
    first_tokens: FirstTokens

    def select(self, samples: torch.Tensor) -> CachedFirstTokens:
        """Those of some samples, in the order given."""
        if len(self.indices) == 1:
            return self
        samples = torch.as_tensor(samples, device=self.indices.device)
        return CachedFirstTokens(self.indices[samples], self.first_tokens.select(samples))

    def crop(self, length: int) -> CachedFirstTokens | None:
        """Those that are left in a cache of this length. `None` if none are."""
        is_left = self.indices < length
        if not bool((is_left & (self.indices >= 0)).any()):
            return None
        if bool(is_left.all()):
            return self
        return CachedFirstTokens(torch.where(is_left, self.indices, -1), replace(self.first_tokens, is_complete=False))


def cached_first_tokens(cache: Any) -> dict[int, CachedFirstTokens]:
    """The first tokens in a cache, by layer."""
    # That of an encoder-decoder holds one for self-attention.
    cache = getattr(cache, "self_attention_cache", cache)
    by_layer = getattr(cache, ATTRIBUTE, None)
    if by_layer is None:
        by_layer = {}
        setattr(cache, ATTRIBUTE, by_layer)
    return by_layer


def first_tokens_of_layer(cache: Any, layer: int) -> CachedFirstTokens | None:
    """The first tokens that a layer has in a cache. `None` if they are not known, or if it has been emptied."""
    return None if is_known_to_be_empty(cache, layer) else cached_first_tokens(cache).get(layer)


def first_tokens_in_cache(cache: Any, layer: int) -> FirstTokens | None:
    """The first tokens that a layer has in a cache for self-attention that has not been emptied."""
    # Hot path: once per layer and token.
    by_layer = getattr(cache, ATTRIBUTE, None)
    cached = None if by_layer is None else by_layer.get(layer)
    return None if cached is None else cached.first_tokens


def patch_cache_methods(cache_class: type[Cache] = Cache) -> None:
    """
    Makes the methods of caches that move samples or remove tokens update the first tokens as well.

    A mask does not always tell which sample of a cache is which, and finding out whether a static cache has been reset
    would wait for the device. The methods do nothing else for caches without first tokens.
    """
    for name, update in UPDATES.items():
        method = vars(cache_class).get(name)
        if method is not None and not hasattr(method, PATCHED):
            setattr(cache_class, name, _patched(method, update))
    for subclass in cache_class.__subclasses__():
        patch_cache_methods(subclass)


def _patched(method: Callable, update: Callable[..., CachedFirstTokens | None]) -> Callable:
    @functools.wraps(method)
    def patched(cache: Cache, *args: Any, **kwargs: Any) -> Any:
        by_layer = getattr(cache, ATTRIBUTE, None)
        result = method(cache, *args, **kwargs)
        if update is _crop and keeps_prompts(cache) and int(cache.get_seq_length()) == 0:
            forget_prompts(cache)
        # Already updated if the method has called the one that it overrides.
        if by_layer and getattr(cache, ATTRIBUTE) is by_layer:
            # Layers that share a value still do.
            updated = {id(cached): update(cached, cache, layer, *args, **kwargs) for layer, cached in by_layer.items()}
            new = {layer: updated[id(cached)] for layer, cached in by_layer.items()}
            setattr(cache, ATTRIBUTE, {layer: cached for layer, cached in new.items() if cached is not None})
        return result

    setattr(patched, PATCHED, True)
    return patched


def _reorder(cached: CachedFirstTokens, cache: Cache, layer: int, beam_idx: torch.Tensor) -> CachedFirstTokens:
    return cached.select(beam_idx)


def _select(cached: CachedFirstTokens, cache: Cache, layer: int, indices: torch.Tensor) -> CachedFirstTokens:
    return cached.select(indices)


def _repeat(cached: CachedFirstTokens, cache: Cache, layer: int, repeats: int) -> CachedFirstTokens:
    return cached.select(torch.arange(len(cached.indices)).repeat_interleave(repeats))


def _crop(cached: CachedFirstTokens, cache: Cache, layer: int, *args: Any, **kwargs: Any) -> CachedFirstTokens | None:
    return cached.crop(int(cache.get_seq_length(layer)))


# How each method of a cache updates them: with the cached value, the cache, a layer, and the method's own arguments.
UPDATES: dict[str, Callable[..., CachedFirstTokens | None]] = {
    "reorder_cache": _reorder,
    "batch_select_indices": _select,
    "batch_repeat_interleave": _repeat,
    "crop": _crop,
    "reset": _crop,
}
