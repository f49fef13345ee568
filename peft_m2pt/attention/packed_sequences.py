"""Sequences packed into one row: finds where each begins, and refuses those that would see each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from ..anatomy.arguments import Role, Signature
from ..errors import UnsupportedModelError
from ..upstream import attention_implementation


# The boundaries of packed sequences, and the greatest length, as transformers calls them.
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


# Implementations that separate packed sequences by the mask alone.
MASK_BASED = ("eager", "sdpa", "flex_attention")


def find_packing(batch_size: int, num_tokens: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Finds packed sequences as transformers does: by boundaries, or by position ids that restart.

    Args:
        batch_size (`int`), num_tokens (`int`):
            The number of rows, and of tokens in each.
        kwargs (`dict[str, Any]`):
            The keyword arguments of the attention function.

    Returns:
        `dict[str, Any]`: The `PACKING_ARGUMENTS`. Empty for a single sequence.
    """
    packing = {name: kwargs.get(name) for name in PACKING_ARGUMENTS}
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
    return dict(zip(PACKING_ARGUMENTS, (boundaries, boundaries, max_length, max_length)))


def check_packing(attention: nn.Module, path: str, signature: Signature, arguments: dict[str, Any]) -> None:
    """
    Refuses packed sequences that would see each other.

    Every token sees all prompts, so a packed sequence gives what it gives alone if nothing else mixes the sequences.
    All implementations but flash attention rely on the mask for that, which transformers does not make for every
    model, nor with a cache.

    Raises:
        UnsupportedModelError: If the mask does not separate packed sequences.
    """
    implementation = attention_implementation(attention)
    if implementation not in MASK_BASED:
        return
    mask, boundaries = signature.find(Role.MASK, arguments), arguments.get("cu_seq_lens_q")
    tokens = arguments[signature.input_name]
    if torch.compiler.is_compiling() or tokens.is_meta:
        # Values of tensors are not available.
        mixes = boundaries is not None and len(boundaries) > 2 and mask is None
    else:
        starts = _later_starts(boundaries, signature.find(Role.POSITIONS, arguments), tokens.shape[:2])
        mixes = len(starts) > 0 and _mixes(mask, starts)
    if mixes:
        raise UnsupportedModelError(
            f"The batch has several sequences packed into one row, but with attn_implementation={implementation!r} "
            f"this model makes no mask for '{path}' that keeps them apart, so their tokens would see each "
            f"other. Call it with use_cache=False, since transformers looks for packed sequences only then. If that "
            f"is not enough, train with packing=False and padding_free=False, or with "
            f"attn_implementation='flash_attention_2'."
        )


def _later_starts(
    boundaries: torch.Tensor | None, position_ids: torch.Tensor | None, shape: tuple[int, int]
) -> torch.Tensor | list[int]:
    """Where each sequence after the first begins."""
    batch_size, num_tokens = shape
    if boundaries is not None:
        return boundaries[(boundaries > 0) & (boundaries < num_tokens)].long()
    if position_ids is None or position_ids.dim() != 2 or batch_size > 1 or num_tokens == 1:
        return []
    return (position_ids[0].diff() < 0).nonzero().flatten() + 1


def _mixes(attention_mask: torch.Tensor | BlockMask | None, starts: torch.Tensor) -> bool:
    """Whether the first token of a sequence sees the last one of the sequence before."""
    if attention_mask is None:
        return True
    if isinstance(attention_mask, BlockMask):
        first = torch.zeros_like(starts)
        return bool(attention_mask.mask_mod(first, first, starts, starts - 1).any())
    entries = attention_mask[0, 0, starts, starts - 1]
    return bool((entries if entries.dtype == torch.bool else entries == 0).any())
