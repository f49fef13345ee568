"""
What is known of the first tokens in a cache. It is noted there when they go in, since prompts of later tokens stand in
front of them, and goes wherever a method of the cache brings them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache


if TYPE_CHECKING:
    from .starts import Starts

# Under this name, a cache carries its notes, so that its copies carry them too.
NOTES = "m2pt_first_tokens"

# What tells a method that carries notes.
CARRIES_NOTES = "m2pt_carries_notes"


@dataclass(frozen=True)
class Noted:
    """
    What is known of the first tokens that a layer has in a cache.

    Args:
        indices (`torch.Tensor` of shape `(1 or batch_size,)`):
            Which token of each sample is the first one, -1 if there is none so far.
        starts ([`~peft_m2pt.starts.Starts`]):
            Where it stands.
    """

    indices: torch.Tensor
    starts: Starts

    def select(self, samples: torch.Tensor) -> Noted:
        """What is known of some samples, in the order given."""
        if len(self.indices) == 1:
            return self
        samples = torch.as_tensor(samples, device=self.indices.device)
        return Noted(self.indices[samples], self.starts.select(samples))

    def crop(self, length: int) -> Noted | None:
        """What is known when so many tokens are left. `None` for nothing."""
        is_left = self.indices < length
        if not bool((is_left & (self.indices >= 0)).any()):
            return None
        if bool(is_left.all()):
            return self
        return Noted(torch.where(is_left, self.indices, -1), replace(self.starts, is_complete=False))


def notes_of(cache: Any) -> dict[int, Noted]:
    """What is known of the first tokens in a cache, by layer."""
    # One of an encoder and a decoder holds another one.
    cache = getattr(cache, "self_attention_cache", cache)
    if not hasattr(cache, NOTES):
        setattr(cache, NOTES, {})
    return getattr(cache, NOTES)


def let_caches_carry_notes(cache_class: type[Cache] = Cache) -> None:
    """
    Lets those methods of caches that bring samples elsewhere, or take tokens away, do the same with the notes.

    A mask does not always tell which sample of a cache is which, and to see that a static cache has been emptied would
    be to wait for the device. With caches without notes, the methods do what they did.

    Args:
        cache_class (`type[Cache]`):
            Whose methods, and whose subclasses'.
    """
    for name, move in MOVES.items():
        method = vars(cache_class).get(name)
        if method is not None and not hasattr(method, CARRIES_NOTES):
            setattr(cache_class, name, _carrying_notes(method, move))
    for subclass in cache_class.__subclasses__():
        let_caches_carry_notes(subclass)


def _carrying_notes(method: Callable, move: Callable[..., Noted | None]) -> Callable:
    @functools.wraps(method)
    def carry(cache: Cache, *args: Any, **kwargs: Any) -> Any:
        notes = getattr(cache, NOTES, None)
        result = method(cache, *args, **kwargs)
        # A method of a subclass may have called the one that it overrides.
        if notes and getattr(cache, NOTES) is notes:
            # Layers share what is the same for them.
            moved = {id(noted): move(noted, cache, layer, *args, **kwargs) for layer, noted in notes.items()}
            of_layers = {layer: moved[id(noted)] for layer, noted in notes.items()}
            setattr(cache, NOTES, {layer: noted for layer, noted in of_layers.items() if noted is not None})
        return result

    setattr(carry, CARRIES_NOTES, True)
    return carry


def _reorder(noted: Noted, cache: Cache, layer: int, beam_idx: torch.Tensor) -> Noted:
    return noted.select(beam_idx)


def _select(noted: Noted, cache: Cache, layer: int, indices: torch.Tensor) -> Noted:
    return noted.select(indices)


def _repeat(noted: Noted, cache: Cache, layer: int, repeats: int) -> Noted:
    return noted.select(torch.arange(len(noted.indices)).repeat_interleave(repeats))


def _crop(noted: Noted, cache: Cache, layer: int, *args: Any, **kwargs: Any) -> Noted | None:
    return noted.crop(int(cache.get_seq_length(layer)))


# What methods of caches do with notes: functions of what is noted, the cache, a layer, and the method's own arguments.
MOVES: dict[str, Callable[..., Noted | None]] = {
    "reorder_cache": _reorder,
    "batch_select_indices": _select,
    "batch_repeat_interleave": _repeat,
    "crop": _crop,
    "reset": _crop,
}
