"""
Prompt rows in "eager" and "sdpa" attention.

Both take a mask with a number for each query and key, which gets columns for the rows, or none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .rows import Rows


def attend_masked(
    attend: Callable, module: nn.Module, rows: Rows, query, key, value, attention_mask, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends with rows in front of key and value. Without a mask, every query sees every key."""
    attention_mask = _mask_with_rows(rows, query, key, attention_mask)
    key, value = rows.put_in_front(key, value)
    return attend(module, query, key, value, attention_mask, **kwargs)


def attend_eager(
    attend: Callable, module: nn.Module, rows: Rows, query, key, value, attention_mask, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends with rows in front of key and value, with the attention function of a model's own file."""
    output, weights = attend_masked(attend, module, rows, query, key, value, attention_mask, **kwargs)
    # Some modules arrange the weights by their tokens, which know nothing of prompts.
    return output, None if weights is None else weights[..., len(rows) :]


def attend_sdpa(
    attend: Callable, module: nn.Module, rows: Rows, query, key, value, attention_mask, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attends with rows in front of key and value, with torch's `scaled_dot_product_attention` or by its equation."""
    is_plain = not kwargs.get("dropout") and kwargs.get("softcap") is None and kwargs.get("position_bias") is None
    if query.shape[2] == 1 and attend is sdpa_attention_forward and is_plain:
        attention_mask = _mask_with_rows(rows, query, key, attention_mask)
        return _attend_one_query(rows, query, key, value, attention_mask, kwargs.get("scaling")), None
    if attention_mask is not None or query.shape[2] == 1 or not is_causal(module, kwargs):
        return attend_masked(attend, module, rows, query, key, value, attention_mask, **kwargs)
    # Keys behind the last query are those of an empty static cache; transformers cuts them off the same way.
    key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if rows.visible is not None:
        hidden = query.new_full((1, 1, query.shape[2], key.shape[2]), torch.finfo(query.dtype).min).triu(1)
        return attend_masked(attend, module, rows, query, key, value, hidden, **kwargs)
    # Causal without a mask: torch lines up the first query with the first key. As many dummy queries as rows make that
    # right again, and keep the fast kernels, which take no mask.
    dummies = query.new_zeros(query.shape[0], query.shape[1], len(rows), query.shape[3])
    key, value = rows.put_in_front(key, value)
    output, weights = attend(module, torch.cat([dummies, query], dim=2), key, value, None, **kwargs)
    return output[:, len(rows) :], weights


def _attend_one_query(
    rows: Rows,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """
    Attends with one query for each sample, to rows and tokens side by side.

    While tokens are decoded, there is one query and a long cache. To put rows in front of that would copy all of it
    for every token, which takes more time than to attend to it. As in "eager" attention, scores are rounded to the
    precision of the queries.
    """
    batch_size, num_heads, _, head_dim = query.shape
    num_rows = len(rows)
    # Heads that share a key stand side by side, as several queries of one.
    query = (query * (head_dim**-0.5 if scaling is None else scaling)).reshape(batch_size * key.shape[1], -1, head_dim)
    keys_of_rows, values_of_rows = (
        tensor.to(query.dtype).expand(batch_size, -1, -1, -1).flatten(0, 1) for tensor in (rows.key, rows.value)
    )
    scores = torch.cat([torch.bmm(query, keys_of_rows.mT), torch.bmm(query, key.flatten(0, 1).mT)], dim=-1)
    if attention_mask is not None:
        by_head = scores.view(batch_size, num_heads, 1, -1)
        if attention_mask.dtype == torch.bool:
            by_head = by_head.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            by_head = by_head + attention_mask
        scores = by_head.reshape_as(scores)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    output = torch.bmm(weights[..., num_rows:], value.flatten(0, 1))
    output = torch.baddbmm(output, weights[..., :num_rows], values_of_rows)
    return output.view(batch_size, 1, num_heads, -1)


def _mask_with_rows(
    rows: Rows, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """The mask for keys with rows in front of them. `None` if every query sees every key."""
    if attention_mask is None:
        if rows.visible is None:
            return None
        attention_mask = query.new_zeros(1, 1, query.shape[2], key.shape[2])
    return widen_mask(attention_mask, len(rows), key.shape[2], rows.visible)


def is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether an attention module hides keys behind each query, as transformers decides it."""
    argument = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if argument is None else argument


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
        visible (`torch.Tensor` of shape `(batch_size, 1 or query_length, num_rows)`, *optional*):
            Which rows each query sees. `None` if it sees all.

    Returns:
        `torch.Tensor` of shape `(..., query_length, num_rows + key_length)`.
    """
    if attention_mask.shape[-1] == 1:
        attention_mask = attention_mask.expand(*attention_mask.shape[:-1], key_length)
    is_boolean = attention_mask.dtype == torch.bool
    # `new_full` with a truth value is nothing that `torch.jit.trace` can write down.
    new = attention_mask.new_ones if is_boolean else attention_mask.new_zeros
    columns = new(*attention_mask.shape[:-1], num_rows)
    if visible is not None:
        hidden = False if is_boolean else torch.finfo(attention_mask.dtype).min
        columns = torch.where(visible[:, None], columns, hidden)
        attention_mask = attention_mask.expand(*columns.shape[:-1], -1)
    return torch.cat([columns, attention_mask], dim=-1)
