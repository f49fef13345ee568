"""
Layers of dynamic caches with prompts in front of their tokens.

In a step of decoding, such a layer joins what it has with the new token, as it does without prompts. `keys` and
`values` are those of its tokens: whatever reads, moves or replaces them finds no prompts, and copies have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..upstream import JOINING, count_token, joins_tokens
from .prompt_kv import PromptKV


# The entry of a layer's `__dict__` that holds prompts and tokens, in the place of `keys` and `values`.
JOINED = "m2pt_joined"


@dataclass(slots=True)
class Joined:
    """
    Keys and values of prompts and tokens.

    Args:
        prompts ([`~peft_m2pt.attention.prompt_kv.PromptKV`]):
            The prompts.
        keys (`torch.Tensor`), values (`torch.Tensor`):
            Of shape `(batch_size, num_key_value_heads, num_prompts + num_tokens, head_dim)`.
    """

    prompts: PromptKV
    keys: torch.Tensor
    values: torch.Tensor

    def of_tokens(self, name: str) -> torch.Tensor:
        """The keys or values of the tokens."""
        joined, num_prompts = getattr(self, name), len(self.prompts)
        return joined.narrow(-2, num_prompts, joined.size(-2) - num_prompts)


def _of_tokens(name: str) -> property:
    def read(layer: Any) -> torch.Tensor | None:
        joined = layer.__dict__.get(JOINED)
        return layer.__dict__[name] if joined is None else joined.of_tokens(name)

    def write(layer: Any, tensor: torch.Tensor | None) -> None:
        joined = layer.__dict__.pop(JOINED, None)
        if joined is not None:
            layer.__dict__.update(keys=joined.of_tokens("keys"), values=joined.of_tokens("values"))
        layer.__dict__[name] = tensor

    return property(read, write)


def _copy_tokens(layer: Any) -> dict[str, torch.Tensor | None]:
    """Keys and values without prompts, not even behind a view."""
    tokens = {name: getattr(layer, name) for name in ("keys", "values")}
    layout = torch.contiguous_format
    return {name: None if tensor is None else tensor.clone(memory_format=layout) for name, tensor in tokens.items()}


def _make_prompted(layer_class: type) -> type:
    """Makes the class of layers that may have prompts. The class of a layer is changed in place."""

    def reduce(layer: Any, protocol: Any) -> tuple[Any, ...]:
        rest = {name: value for name, value in layer.__dict__.items() if name != JOINED}
        return object.__new__, (layer_class,), {**rest, **_copy_tokens(layer)}

    contents = {"keys": _of_tokens("keys"), "values": _of_tokens("values"), "__reduce_ex__": reduce}
    names = {name: getattr(layer_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(layer_class.__name__, (layer_class,), {**contents, **names})


# Subclasses of others may do anything with what they keep.
_PROMPTED = {layer_class: _make_prompted(layer_class) for layer_class in JOINING}


def can_have_prompts(layer: Any) -> bool:
    """Whether a layer of a cache does nothing but join the keys and values of its tokens with new ones."""
    return (type(layer) in _PROMPTED or type(layer) in _PROMPTED.values()) and joins_tokens(layer)


def join_prompts(
    layer: Any, prompts: PromptKV, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    Does what `update` of a layer of a cache does, with prompts in front of what it returns.

    Args:
        layer (`DynamicLayer`):
            The layer, which shows tokens alone.
        prompts ([`~peft_m2pt.attention.prompt_kv.PromptKV`]):
            The prompts.
        key (`torch.Tensor`), value (`torch.Tensor`):
            Of a token.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Keys and values. `None` if the layer would not join them.
    """
    # Hot path: once per layer and token.
    contents = layer.__dict__
    joined = contents.get(JOINED)
    if joined is not None and joined.prompts is prompts and not contents.get("record_past"):
        keys, values = torch.cat((joined.keys, key), -2), torch.cat((joined.values, value), -2)
    elif can_have_prompts(layer):
        # The first time, or something has moved, removed or replaced tokens.
        keys, values = _join(prompts.key, layer.keys, key), _join(prompts.value, layer.values, value)
        layer.__class__ = _PROMPTED.get(type(layer), type(layer))
    else:
        return None
    num_dropped = count_token(layer, keys.size(-2) - len(prompts)) if layer.is_sliding else 0
    if num_dropped > 0:
        start = len(prompts) + num_dropped
        layer.keys, layer.values = keys[:, :, start:], values[:, :, start:]
    else:
        contents[JOINED] = Joined(prompts, keys, values)
        contents["keys"] = contents["values"] = None
    return keys, values


def _join(prompts: torch.Tensor, cached: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return torch.cat((prompts.to(new.dtype).expand(new.shape[0], -1, -1, -1), cached, new), -2)


def undo_join(layer: Any, prompts: PromptKV, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Undoes a call of `join_prompts` that returned these keys and values."""
    layer.keys, layer.values = keys[:, :, len(prompts) : -1], values[:, :, len(prompts) : -1]
    if layer.is_sliding:
        layer.cumulative_length -= 1


def take_prompts_out(cache: Any) -> None:
    """Makes the layers of a cache what they are without prompts. The next token brings these back."""
    for layer in cache.layers:
        if type(layer) in _PROMPTED.values():
            layer.__dict__.update(_copy_tokens(layer))
            layer.__dict__.pop(JOINED, None)
            layer.__class__ = type(layer).__base__
