"""Packed text, whose boundaries transformers 5.24 also passes to the vision encoder."""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..attention.packed_sequences import MASK_BASED
from ..errors import UnsupportedModelError
from ..layers.attention import M2PTAttention
from ..upstream import attention_implementation


def refuse_text_boundaries(tower: nn.Module, layer: M2PTAttention) -> list[RemovableHandle]:
    """
    Makes the vision encoder refuse the boundaries of packed text (`cu_seq_lens_*`), which flash attention would use as
    boundaries of images.
    """
    return [tower.register_forward_pre_hook(partial(_check_boundaries, layer), with_kwargs=True)]


def _check_boundaries(layer: M2PTAttention, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    implementation = attention_implementation(layer.base_layer)
    if kwargs.get("cu_seq_lens_q") is not None and implementation not in MASK_BASED and layer.is_active:
        raise UnsupportedModelError(
            f"{type(tower).__name__} got the boundaries of packed text, which transformers {transformers.__version__} "
            f"also passes to the vision encoder, with or without an adapter. Leave out cu_seq_lens_* and "
            f"max_length_*: position_ids are enough for packing."
        )
