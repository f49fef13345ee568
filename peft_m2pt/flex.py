"""
Prompt rows in flex attention.

Its mask is a `BlockMask`, which says for each block of queries which blocks of keys it sees, and has a function for
what holds inside of a block. Rows get whole blocks of their own, so that those of the tokens stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from .dense import attend_masked
from .rows import Rows, pad_rows


def attend_flex(
    attend: Callable, module: nn.Module, rows: Rows, query, key, value, attention_mask, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends with rows in front of key and value."""
    if not isinstance(attention_mask, BlockMask):
        return attend_masked(attend, module, rows, query, key, value, attention_mask, **kwargs)
    block_mask, num_rows = widen_block_mask(attention_mask, len(rows), rows.visible)
    key, value = Rows(pad_rows(rows.key, num_rows), pad_rows(rows.value, num_rows)).put_in_front(key, value)
    return attend(module, query, key, value, block_mask, **kwargs)


def widen_block_mask(
    block_mask: BlockMask, num_rows: int, visible: torch.Tensor | None = None
) -> tuple[BlockMask, int]:
    """
    Adds blocks of keys on the left of a mask, in which queries see the prompt rows.

    Args:
        block_mask (`BlockMask`):
            The mask of the tokens.
        num_rows (`int`):
            Number of prompt rows.
        visible (`torch.Tensor` of shape `(batch_size, 1 or num_tokens, num_rows)`, *optional*):
            Which rows each token sees. `None` if it sees all.

    Returns:
        `tuple[BlockMask, int]`: The mask of rows, padding and tokens, and the number of rows and padding together.
    """
    block_size = block_mask.BLOCK_SIZE[1]
    num_blocks = -(-num_rows // block_size)
    start = num_blocks * block_size
    if visible is not None:
        visible = nn.functional.pad(visible, (0, start - num_rows))
        last_query = visible.shape[1] - 1

    def mask_mod(batch, head, query, key):
        sees_row = (
            key < num_rows
            if visible is None
            else visible[batch, query.clamp(max=last_query), key.clamp(max=start - 1)]
        )
        sees_token = block_mask.mask_mod(batch, head, query, (key - start).clamp(min=0))
        return torch.where(key < start, sees_row, sees_token)

    row_blocks = torch.arange(num_blocks, device=block_mask.kv_indices.device, dtype=block_mask.kv_indices.dtype)
    row_blocks = row_blocks.expand(*block_mask.kv_indices.shape[:-1], -1)
    full = {}
    if block_mask.full_kv_indices is not None:
        # The blocks of rows are none of those that need no look inside. Behind the last of these, anything may stand.
        indices = torch.cat([block_mask.full_kv_indices + num_blocks, torch.zeros_like(row_blocks)], dim=-1)
        full = {"full_kv_num_blocks": block_mask.full_kv_num_blocks, "full_kv_indices": indices}
    num_queries, num_keys = block_mask.seq_lengths
    widened = BlockMask.from_kv_blocks(
        block_mask.kv_num_blocks + num_blocks,
        torch.cat([row_blocks, block_mask.kv_indices + num_blocks], dim=-1),
        **full,
        BLOCK_SIZE=block_mask.BLOCK_SIZE,
        mask_mod=mask_mod,
        seq_lengths=(num_queries, start + num_keys),
    )
    return widened, start
