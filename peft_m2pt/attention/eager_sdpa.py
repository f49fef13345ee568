"""Prompts in "eager" and "sdpa" attention, whose mask of queries and keys, if there is one, gets columns for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..per_thread import PerThread
from .module_call import layer_index
from .prompt_kv import PromptKV


def attend_masked(
    attend: Callable, module: nn.Module, prompts: PromptKV, query, key, value, attention_mask, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends with prompts in front of key and value. Without a mask, every query sees every key."""
    if prompts.is_in_front:
        attention_mask = mask_of_step(layer_index(module), prompts, query, key, attention_mask)
    else:
        attention_mask = mask_with_prompts(prompts, query, key, attention_mask)
    key, value = prompts.prepend_to(key, value)
    return attend(module, query, key, value, attention_mask, **kwargs)


def attend_eager(
    attend: Callable, module: nn.Module, prompts: PromptKV, query, key, value, attention_mask, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends with prompts in front of key and value, by the attention function in the model's own file."""
    output, weights = attend_masked(attend, module, prompts, query, key, value, attention_mask, **kwargs)
    # The caller expects a column for each of its own tokens.
    return output, None if weights is None else weights[..., len(prompts) :]


def attend_sdpa(
    attend: Callable, module: nn.Module, prompts: PromptKV, query, key, value, attention_mask, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attends with prompts in front of key and value, by torch's `scaled_dot_product_attention` or its equation."""
    is_plain = not kwargs.get("dropout") and kwargs.get("softcap") is None and kwargs.get("position_bias") is None
    if query.shape[2] == 1 and attend is sdpa_attention_forward and is_plain:
        attention_mask = mask_with_prompts(prompts, query, key, attention_mask)
        return _attend_one_query(prompts, query, key, value, attention_mask, kwargs.get("scaling")), None
    if attention_mask is not None or query.shape[2] == 1 or not is_causal(module, kwargs):
        return attend_masked(attend, module, prompts, query, key, value, attention_mask, **kwargs)
    # The rest is the empty part of a static cache, which transformers crops in the same way.
    key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if prompts.visible is not None:
        hidden = query.new_full((1, 1, query.shape[2], key.shape[2]), torch.finfo(query.dtype).min).triu(1)
        return attend_masked(attend, module, prompts, query, key, value, hidden, **kwargs)
    # Without a mask, torch aligns the first query with the first key. A dummy query for each prompt corrects that, and
    # keeps the fast kernels, which take no mask.
    dummies = query.new_zeros(query.shape[0], query.shape[1], len(prompts), query.shape[3])
    key, value = prompts.prepend_to(key, value)
    output, weights = attend(module, torch.cat([dummies, query], dim=2), key, value, None, **kwargs)
    return output[:, len(prompts) :], weights


def _attend_one_query(
    prompts: PromptKV,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """
    Attends with one query per sample, without prepending prompts to the keys.

    While decoding, prepending would copy the whole cache for every token, which takes longer than attending to it.
    Scores are rounded to the precision of the queries, as in "eager" attention.
    """
    batch_size, num_heads, _, head_dim = query.shape
    num_prompts = len(prompts)
    # Heads that share a key become several queries of one head.
    query = (query * (head_dim**-0.5 if scaling is None else scaling)).reshape(batch_size * key.shape[1], -1, head_dim)
    prompt_keys, prompt_values = (
        tensor.to(query.dtype).expand(batch_size, -1, -1, -1).flatten(0, 1) for tensor in (prompts.key, prompts.value)
    )
    scores = torch.cat([torch.bmm(query, prompt_keys.mT), torch.bmm(query, key.flatten(0, 1).mT)], dim=-1)
    if attention_mask is not None:
        by_head = scores.view(batch_size, num_heads, 1, -1)
        if attention_mask.dtype == torch.bool:
            by_head = by_head.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            by_head = by_head + attention_mask
        scores = by_head.reshape_as(scores)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    output = torch.bmm(weights[..., num_prompts:], value.flatten(0, 1))
    output = torch.baddbmm(output, weights[..., :num_prompts], prompt_values)
    return output.view(batch_size, 1, num_heads, -1)


def mask_with_prompts(
    prompts: PromptKV, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """The mask for keys behind prompts. `None` if every query sees every key."""
    num_tokens = prompts.count_tokens(key)
    if attention_mask is None:
        if prompts.visible is None:
            return None
        attention_mask = query.new_zeros(1, 1, query.shape[2], num_tokens)
    return widen_mask(attention_mask, len(prompts), num_tokens, prompts.visible)


# The index of the layer that attended last, and the masks of this forward pass with what was made of them.
_masks = PerThread()


def mask_of_step(
    layer: int, prompts: PromptKV, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """As `mask_with_prompts`, but made once for all layers of a forward pass, which are called in their order."""
    last, masks = _masks.value or (layer, [])
    masks = masks if layer > last else []
    _masks.value = layer, masks
    if attention_mask is None or prompts.visible is not None or attention_mask.is_inference():
        return mask_with_prompts(prompts, query, key, attention_mask)
    sizes = attention_mask._version, len(prompts), key.shape[2]
    for mask, sizes_then, widened in masks:
        if mask is attention_mask and sizes_then == sizes:
            return widened
    widened = mask_with_prompts(prompts, query, key, attention_mask)
    masks.append((attention_mask, sizes, widened))
    return widened


def is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a call of an attention module is causal, as transformers decides it."""
    argument = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if argument is None else argument


def widen_mask(
    attention_mask: torch.Tensor, num_prompts: int, key_length: int, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Adds columns on the left of an attention mask, in which queries see prompts.

    Args:
        attention_mask (`torch.Tensor` of shape `(..., query_length, key_length)`):
            A boolean (`True`: visible) or additive mask. The last dimension may be 1 for all keys.
        num_prompts (`int`):
            Number of prompts.
        key_length (`int`):
            Number of keys behind the prompts.
        visible (`torch.Tensor` of shape `(batch_size, 1 or query_length, num_prompts)`, *optional*):
            Which prompts each query sees. `None` if it sees all.

    Returns:
        `torch.Tensor` of shape `(..., query_length, num_prompts + key_length)`.
    """
    if attention_mask.shape[-1] == 1:
        attention_mask = attention_mask.expand(*attention_mask.shape[:-1], key_length)
    is_boolean = attention_mask.dtype == torch.bool
    # `torch.jit.trace` cannot record `new_full` with a boolean.
    new = attention_mask.new_ones if is_boolean else attention_mask.new_zeros
    columns = new(*attention_mask.shape[:-1], num_prompts)
    if visible is not None:
        hidden = False if is_boolean else torch.finfo(attention_mask.dtype).min
        columns = torch.where(visible[:, None], columns, hidden)
        attention_mask = attention_mask.expand(*columns.shape[:-1], -1)
    return torch.cat([columns, attention_mask], dim=-1)
