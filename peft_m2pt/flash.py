"""
Prompt rows in flash attention.

It lines up the last query with the last key, so rows in front leave it right what is causal. What needs care: its mask
has two dimensions and only says which keys are padding; several sequences can be packed into one, each of which needs
rows of its own in front; and a sliding window would hide the rows from the queries that are far from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .dense import attend_masked, is_causal
from .errors import UnsupportedModelError
from .rows import Rows
from .upstream import attention_implementation


# Arguments that tell where packed sequences begin, and how long the longest is.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def attend_flash(
    attend: Callable,
    module: nn.Module,
    rows: Rows | Sequence[Rows | None],
    query,
    key,
    value,
    attention_mask,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attends with rows in front of key and value of each sequence.

    Args:
        rows ([`Rows`] or `Sequence[Rows | None]`):
            The rows, or those of each of the packed sequences.
        attention_mask (`torch.Tensor` of shape `(batch_size, key_length)`, *optional*):
            1 for tokens, 0 for padding.
    """
    packing: dict[str, Any] = {}
    if attention_mask is None:
        packing = find_packed(len(query), query.shape[2], kwargs)
        # Positions have nothing more to tell, and would not fit to keys with rows in front.
        kwargs = {**kwargs, **dict.fromkeys(PACKING), **packing, "position_ids": None}
    else:
        # Keys behind the mask are those of an empty static cache; transformers cuts them off the same way.
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
    boundaries, max_length = packing.get("cu_seq_lens_k"), packing.get("max_length_k", key.shape[2])
    if (window := kwargs.get("sliding_window")) is not None:
        if max_length > window:
            return _attend_in_window(module, rows, query, key, value, attention_mask, boundaries, kwargs)
        kwargs["sliding_window"] = None
    if boundaries is not None:
        key, value, boundaries, num_rows = _put_in_front_of_each(rows, key, value, boundaries)
        kwargs |= {"cu_seq_lens_k": boundaries, "max_length_k": max_length + num_rows}
        return attend(module, query, key, value, None, **kwargs)
    if attention_mask is None and rows.visible is not None:
        attention_mask = key.new_ones(key.shape[0], key.shape[2], dtype=torch.long)
    if attention_mask is not None:
        visible = attention_mask.new_ones(len(attention_mask), len(rows))
        visible = visible if rows.visible is None else rows.visible[:, 0]
        attention_mask = torch.cat([visible.to(attention_mask.dtype), attention_mask], dim=1)
    key, value = rows.put_in_front(key, value)
    return attend(module, query, key, value, attention_mask, **kwargs)


def find_packed(batch_size: int, num_tokens: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Finds sequences that are packed into one, as transformers does: by arguments, or by positions that start anew.

    Args:
        batch_size (`int`), num_tokens (`int`):
            How many rows there are, and how many tokens in each.
        kwargs (`dict[str, Any]`):
            What attention is told.

    Returns:
        `dict[str, Any]`: The arguments that tell it: boundaries of queries and of keys, and the greatest lengths.
        Empty if there is one sequence.
    """
    packing = {name: kwargs.get(name) for name in PACKING}
    if all(value is not None for value in packing.values()):
        return packing
    position_ids = kwargs.get("position_ids")
    if position_ids is None or position_ids.dim() != 2 or batch_size > 1 or num_tokens == 1:
        return {}
    starts = (position_ids[0] == position_ids.min()).nonzero().flatten()
    if len(starts) == 1:
        return {}
    boundaries = nn.functional.pad(starts, (0, 1), value=num_tokens).to(torch.int32)
    max_length = int(boundaries.diff().max())
    return dict(zip(PACKING, (boundaries, boundaries, max_length, max_length)))


def _put_in_front_of_each(
    rows: Rows | Sequence[Rows | None], key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Puts rows in front of each packed sequence. Returns key, value, boundaries and the greatest number of rows."""
    num_sequences, num_tokens = len(boundaries) - 1, key.shape[2]
    of_each = [rows] * num_sequences if isinstance(rows, Rows) else rows
    sources = list({id(some): some for some in of_each if some is not None}.values())
    starts = dict(zip(map(id, sources), accumulate(map(len, sources), initial=0)))
    lengths = [0 if some is None else len(some) for some in of_each]
    num_source_rows, num_rows = sum(map(len, sources)), sum(lengths)
    device = boundaries.device
    counts = torch.tensor(lengths, device=device)
    rows_before = counts.cumsum(0)

    # Where each row comes from, and where rows and tokens go to.
    sequence_of_row = torch.arange(num_sequences, device=device).repeat_interleave(counts, output_size=num_rows)
    first_rows = torch.tensor([starts.get(id(some), 0) for some in of_each], device=device) - rows_before + counts
    row_numbers, tokens = torch.arange(num_rows, device=device), torch.arange(num_tokens, device=device)
    sequence_of_token = torch.searchsorted(boundaries[1:].long(), tokens, right=True).clamp(max=num_sequences - 1)
    order = torch.empty(num_rows + num_tokens, device=device, dtype=torch.long)
    order[boundaries.long()[sequence_of_row] + row_numbers] = row_numbers + first_rows[sequence_of_row]
    order[tokens + rows_before[sequence_of_token]] = num_source_rows + tokens
    key, value = (
        torch.cat([*(getattr(some, name).to(part.dtype) for some in sources), part], dim=2).index_select(2, order)
        for name, part in (("key", key), ("value", value))
    )
    boundaries = boundaries + nn.functional.pad(rows_before, (1, 0)).to(boundaries.dtype)
    return key, value, boundaries, max(lengths)


def _attend_in_window(
    module: nn.Module,
    rows: Rows,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    boundaries: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """
    Attends to rows and to a sliding window of tokens. Flash attention has no way to say that, but `sdpa` takes a mask
    that does.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} combines a sliding window, shorter than the {key.shape[2]} tokens, with "
                f"{name}, which attn_implementation={attention_implementation(module)!r} cannot do with prompts. "
                f"Use model.set_attn_implementation('eager')."
            )
    keys = torch.arange(key.shape[2], device=key.device)
    distance = keys[-query.shape[2] :, None] - keys
    nearest = 0 if is_causal(module, kwargs) else 1 - kwargs["sliding_window"]
    visible = (distance >= nearest) & (distance < kwargs["sliding_window"])
    if boundaries is not None:
        sequence = torch.searchsorted(boundaries[1:].long(), keys, right=True)
        visible = visible & (sequence[:, None] == sequence)
    visible = visible[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None].bool()
    arguments = {name: kwargs[name] for name in ("dropout", "scaling") if name in kwargs}
    return attend_masked(sdpa_attention_forward, module, rows, query, key, value, visible, **arguments)
