"""
Prompts in flex attention.

A `BlockMask` says which blocks of keys each block of queries sees, and has a function for what holds within a block.
Prompts get whole blocks of their own, so those of the tokens do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from .eager_sdpa import attend_masked
from .prompt_kv import PromptKV, pad_length


def attend_flex(
    attend: Callable, module: nn.Module, prompts: PromptKV, query, key, value, attention_mask, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends with prompts in front of key and value."""
    if not isinstance(attention_mask, BlockMask):
        return attend_masked(attend, module, prompts, query, key, value, attention_mask, **kwargs)
    block_mask, length = widen_block_mask(attention_mask, len(prompts), prompts.visible)
    padded = PromptKV(pad_length(prompts.key, length), pad_length(prompts.value, length))
    key, value = padded.prepend_to(key, value)
    return attend(module, query, key, value, block_mask, **kwargs)


def widen_block_mask(
    block_mask: BlockMask, num_prompts: int, visible: torch.Tensor | None = None
) -> tuple[BlockMask, int]:
    """
    Adds blocks on the left of a block mask, in which queries see prompts.

    Args:
        block_mask (`BlockMask`):
            The mask of the tokens.
        num_prompts (`int`):
            Number of prompts.
        visible (`torch.Tensor` of shape `(batch_size, 1 or num_tokens, num_prompts)`, *optional*):
            Which prompts each token sees. `None` if it sees all.

    Returns:
        `tuple[BlockMask, int]`: The mask of prompts, padding and tokens, and the length of prompts and padding.
    """
    block_size = block_mask.BLOCK_SIZE[1]
    num_blocks = -(-num_prompts // block_size)
    start = num_blocks * block_size
    if visible is not None:
        visible = nn.functional.pad(visible, (0, start - num_prompts))
        last_query = visible.shape[1] - 1

    def mask_mod(batch, head, query, key):
        sees_prompt = (
            key < num_prompts
            if visible is None
            else visible[batch, query.clamp(max=last_query), key.clamp(max=start - 1)]
        )
        sees_token = block_mask.mask_mod(batch, head, query, (key - start).clamp(min=0))
        return torch.where(key < start, sees_prompt, sees_token)

    indices = block_mask.kv_indices
    new_blocks = torch.arange(num_blocks, device=indices.device, dtype=indices.dtype).expand(*indices.shape[:-1], -1)
    full = {}
    if block_mask.full_kv_indices is not None:
        # Blocks of prompts are never among the full ones. Indices behind the number of blocks are not read.
        full_indices = torch.cat([block_mask.full_kv_indices + num_blocks, torch.zeros_like(new_blocks)], dim=-1)
        full = {"full_kv_num_blocks": block_mask.full_kv_num_blocks, "full_kv_indices": full_indices}
    num_queries, num_keys = block_mask.seq_lengths
    widened = BlockMask.from_kv_blocks(
        block_mask.kv_num_blocks + num_blocks,
        torch.cat([new_blocks, indices + num_blocks], dim=-1),
        **full,
        BLOCK_SIZE=block_mask.BLOCK_SIZE,
        mask_mod=mask_mod,
        seq_lengths=(num_queries, start + num_keys),
    )
    return widened, start
