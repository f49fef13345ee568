"""
Prompts in flash attention.

It aligns the last query with the last key, so prompts in front do not change what is causal. Three things need care:
the mask has two dimensions and only marks padding, each packed sequence needs prompts of its own in front, and a
sliding window would hide the prompts from later queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..errors import UnsupportedModelError
from ..upstream import attention_implementation
from .eager_sdpa import attend_masked, is_causal
from .packed_sequences import PACKING_ARGUMENTS, find_packing
from .prompt_kv import PromptKV


def attend_flash(
    attend: Callable,
    module: nn.Module,
    prompts: PromptKV | Sequence[PromptKV | None],
    query,
    key,
    value,
    attention_mask,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attends with prompts in front of key and value of each sequence.

    Args:
        prompts ([`PromptKV`] or `Sequence[PromptKV | None]`):
            The prompts, or those of each packed sequence.
        attention_mask (`torch.Tensor` of shape `(batch_size, key_length)`, *optional*):
            1 for tokens, 0 for padding.
    """
    packing: dict[str, Any] = {}
    if attention_mask is None:
        packing = find_packing(len(query), query.shape[2], kwargs)
        # `packing` replaces position ids, which would not fit the longer keys.
        kwargs = {**kwargs, **dict.fromkeys(PACKING_ARGUMENTS), **packing, "position_ids": None}
    elif not prompts.is_in_front:
        # The rest is the empty part of a static cache, which transformers crops in the same way.
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
    boundaries, max_length = packing.get("cu_seq_lens_k"), packing.get("max_length_k", key.shape[2])
    if (window := kwargs.get("sliding_window")) is not None:
        if max_length > window:
            return _attend_in_window(module, prompts, query, key, value, attention_mask, packing, kwargs)
        kwargs["sliding_window"] = None
    if boundaries is not None:
        key, value, boundaries, num_prompts = _prepend_to_each(prompts, key, value, boundaries)
        kwargs |= {"cu_seq_lens_k": boundaries, "max_length_k": max_length + num_prompts}
        return attend(module, query, key, value, None, **kwargs)
    if attention_mask is None and prompts.visible is not None:
        attention_mask = key.new_ones(key.shape[0], prompts.count_tokens(key), dtype=torch.long)
    if attention_mask is not None:
        visible = attention_mask.new_ones(len(attention_mask), len(prompts))
        visible = visible if prompts.visible is None else prompts.visible[:, 0]
        attention_mask = torch.cat([visible.to(attention_mask.dtype), attention_mask], dim=1)
    key, value = prompts.prepend_to(key, value)
    return attend(module, query, key, value, attention_mask, **kwargs)


def _prepend_to_each(
    prompts: PromptKV | Sequence[PromptKV | None], key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Prepends prompts to each packed sequence. Returns key, value, boundaries and the greatest number of prompts."""
    num_sequences, num_tokens, device = len(boundaries) - 1, key.shape[2], boundaries.device
    of_each = [prompts] * num_sequences if isinstance(prompts, PromptKV) else prompts
    sources = list({id(some): some for some in of_each if some is not None}.values())
    offsets = dict(zip(map(id, sources), accumulate(map(len, sources), initial=0)))
    lengths = [0 if some is None else len(some) for some in of_each]
    num_in_sources, num_prompts = sum(map(len, sources)), sum(lengths)
    counts = torch.tensor(lengths, device=device)
    prompts_before = counts.cumsum(0)

    # `order` gathers the longer sequence of keys out of [sources ; tokens].
    sequence_of_prompt = torch.arange(num_sequences, device=device).repeat_interleave(counts, output_size=num_prompts)
    shifts = torch.tensor([offsets.get(id(some), 0) for some in of_each], device=device) - prompts_before + counts
    numbers, tokens = torch.arange(num_prompts, device=device), torch.arange(num_tokens, device=device)
    sequence_of_token = torch.searchsorted(boundaries[1:].long(), tokens, right=True).clamp(max=num_sequences - 1)
    order = torch.empty(num_prompts + num_tokens, device=device, dtype=torch.long)
    order[boundaries.long()[sequence_of_prompt] + numbers] = numbers + shifts[sequence_of_prompt]
    order[tokens + prompts_before[sequence_of_token]] = num_in_sources + tokens
    key, value = (
        torch.cat([*(getattr(some, name).to(part.dtype) for some in sources), part], dim=2).index_select(2, order)
        for name, part in (("key", key), ("value", value))
    )
    boundaries = boundaries + nn.functional.pad(prompts_before, (1, 0)).to(boundaries.dtype)
    return key, value, boundaries, max(lengths)


def _attend_in_window(
    module: nn.Module,
    prompts: PromptKV,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: dict[str, Any],
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Attends to prompts and to a sliding window of tokens: by "sdpa" with a mask, since flash attention cannot."""
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} combines a sliding window, shorter than the {key.shape[2]} tokens, with "
                f"{name}, which attn_implementation={attention_implementation(module)!r} cannot do with prompts. "
                f"Use model.set_attn_implementation('eager')."
            )
    keys = torch.arange(key.shape[2], device=key.device)
    queries = keys[-query.shape[2] :]
    if packing:
        ends_of_queries, ends_of_keys = (packing[f"cu_seq_lens_{name}"][1:].long() for name in ("q", "k"))
        queries = torch.arange(query.shape[2], device=key.device)
        sequences = torch.searchsorted(ends_of_queries, queries, right=True)
        # The last query of each sequence belongs to its last key.
        queries = queries + (ends_of_keys - ends_of_queries)[sequences]
    distance = queries[:, None] - keys
    nearest = 0 if is_causal(module, kwargs) else 1 - kwargs["sliding_window"]
    visible = (distance >= nearest) & (distance < kwargs["sliding_window"])
    if packing:
        visible = visible & (sequences[:, None] == torch.searchsorted(ends_of_keys, keys, right=True))
    visible = visible[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None].bool()
    arguments = {name: kwargs[name] for name in ("dropout", "scaling") if name in kwargs}
    return attend_masked(sdpa_attention_forward, module, prompts, query, key, value, visible, **arguments)
