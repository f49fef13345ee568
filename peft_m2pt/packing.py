"""Several sequences in one row of a batch: what keeps them apart must be there."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from .errors import UnsupportedModelError


# Implementations that know of packed sequences only by their mask.
BY_MASK = ("eager", "sdpa", "flex_attention")


def check_packing(attention: nn.Module, path: str, arguments: dict[str, Any]) -> None:
    """
    Checks that sequences that share a row do not see each other.

    Every token sees all prompts, whatever the sequence that it belongs to, so a packed sequence has the logits that it
    has alone if nothing else mixes them. All but flash attention know of packing only by their mask, which some
    models, such as those with several axes of positions, do not make for it.

    Args:
        attention (`nn.Module`):
            An attention module of the language model.
        path (`str`):
            Its module path, for the error message.
        arguments (`dict[str, Any]`):
            What it is called with.

    Raises:
        UnsupportedModelError: If they would.
    """
    boundaries = arguments.get("cu_seq_lens_q")
    if boundaries is None or len(boundaries) <= 2:
        return
    implementation = attention.config._attn_implementation
    if implementation in BY_MASK and _mixes(arguments.get("attention_mask"), boundaries):
        raise UnsupportedModelError(
            f"The batch has {len(boundaries) - 1} sequences packed into one row, but with attn_implementation="
            f"{implementation!r} this model makes no mask for '{path}' that keeps them apart, so their tokens would "
            f"see each other. Call it with use_cache=False, since transformers looks for packed sequences only then. "
            f"If that is not enough, train with packing=False and padding_free=False, or with "
            f"attn_implementation='flash_attention_2'."
        )


def _mixes(attention_mask: torch.Tensor | BlockMask | None, boundaries: torch.Tensor) -> bool:
    """Whether the first token of the second sequence sees the last one of the first."""
    if attention_mask is None:
        return True
    if torch.compiler.is_compiling():
        # What is in a mask is not known then.
        return False
    token = boundaries[1]
    if isinstance(attention_mask, BlockMask):
        first = torch.zeros_like(token)
        return bool(attention_mask.mask_mod(first, first, token, token - 1))
    entry = attention_mask[0, 0, token, token - 1]
    return bool(entry) if entry.dtype == torch.bool else bool(entry == 0)
