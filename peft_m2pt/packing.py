"""Several sequences in one row of a batch: what keeps them apart must be there."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.hooks import RemovableHandle

from .arguments import Role
from .errors import UnsupportedModelError
from .upstream import attention_implementation


if TYPE_CHECKING:
    from .layer import M2PTAttention

# Implementations that know of packed sequences only by their mask.
BY_MASK = ("eager", "sdpa", "flex_attention")


def refuse_mixed_sequences(layer: M2PTAttention) -> list[RemovableHandle]:
    """
    Lets the language model refuse sequences that share a row and would see each other.

    Every token sees all prompts, whatever the sequence that it belongs to, so a packed sequence has the logits that it
    has alone if nothing else mixes them. All but flash attention know of packing only by their mask, which
    transformers does not make for some models, nor for any if there is a cache.

    Args:
        layer ([`~peft_m2pt.layer.M2PTAttention`]):
            The first layer with prompts in the language model. The others get the same mask.

    Returns:
        `list[RemovableHandle]`: The hooks.
    """
    return [layer.register_forward_pre_hook(_check_packing, with_kwargs=True)]


def refuse_boundaries_of_text(tower: nn.Module, layer: M2PTAttention) -> list[RemovableHandle]:
    """
    Lets the vision encoder refuse the boundaries of packed text (`cu_seq_lens_*`), which transformers 5.24 hands to it
    as well. Flash attention would take them for those of the images.

    Args:
        tower (`nn.Module`):
            The vision encoder.
        layer ([`~peft_m2pt.layer.M2PTAttention`]):
            The first layer with prompts in it.

    Returns:
        `list[RemovableHandle]`: The hooks.
    """
    return [tower.register_forward_pre_hook(partial(_check_boundaries, layer), with_kwargs=True)]


def _check_boundaries(layer: M2PTAttention, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    implementation = attention_implementation(layer.base_layer)
    if kwargs.get("cu_seq_lens_q") is not None and implementation not in BY_MASK and layer.is_active:
        raise UnsupportedModelError(
            f"{type(tower).__name__} got the boundaries of packed text, which transformers {transformers.__version__} "
            f"hands to the vision encoder too, with an adapter or without. Leave cu_seq_lens_* and max_length_* out: "
            f"position_ids tell of packing as well."
        )


def _check_packing(layer: M2PTAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not layer.is_active:
        return
    implementation = attention_implementation(layer.base_layer)
    if implementation not in BY_MASK:
        return
    signature = layer.signature
    arguments = signature.bind(args, kwargs)
    attention_mask, boundaries = signature.find(Role.MASK, arguments), arguments.get("cu_seq_lens_q")
    tokens = arguments[signature.input_name]
    if torch.compiler.is_compiling() or tokens.is_meta:
        # What is in a tensor is not known then.
        mixes = boundaries is not None and len(boundaries) > 2 and attention_mask is None
    else:
        starts = _find_starts(boundaries, signature.find(Role.POSITIONS, arguments), tokens.shape[:2])
        mixes = len(starts) > 0 and _mixes(attention_mask, starts)
    if mixes:
        raise UnsupportedModelError(
            f"The batch has several sequences packed into one row, but with attn_implementation={implementation!r} "
            f"this model makes no mask for '{layer.site.path}' that keeps them apart, so their tokens would see each "
            f"other. Call it with use_cache=False, since transformers looks for packed sequences only then. If that "
            f"is not enough, train with packing=False and padding_free=False, or with "
            f"attn_implementation='flash_attention_2'."
        )


def _find_starts(
    boundaries: torch.Tensor | None, position_ids: torch.Tensor | None, shape: tuple[int, int]
) -> torch.Tensor | list[int]:
    """Where each sequence behind the first one starts."""
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
