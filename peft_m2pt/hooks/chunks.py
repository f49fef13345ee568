"""
Chunked attention (Llama 4): a mask may not tell where a chunk starts from where a sequence does. Such masks are
refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from ..anatomy.modules import own_part
from ..attention.module_call import is_in_graph
from ..attention.visibility import read_visibility
from ..errors import UnsupportedModelError
from ..layers.attention import M2PTAttention
from ..upstream import chunk_length


def refuse_ambiguous_chunks(model: nn.Module, layer: M2PTAttention) -> list[RemovableHandle]:
    """
    Makes the decoder refuse masks and positions that hide where a sequence starts.

    Layers cannot do that: given a mask of more than two dimensions, the decoder builds none, so no chunks are masked,
    and it does not pass on the positions by which it finds packed sequences.

    Args:
        model (`nn.Module`):
            The model.
        layer ([`~peft_m2pt.layers.attention.M2PTAttention`]):
            The first layer with prompts in the language model.

    Returns:
        `list[RemovableHandle]`: The hook. Empty for models without chunked attention.
    """
    chunk = chunk_length(layer.base_layer.config)
    if chunk is None:
        return []
    parts = layer.site.path.split(".")
    path = ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit()) - 1])
    decoder = own_part(model, path)
    names = list(inspect.signature(decoder.forward).parameters)
    return [decoder.register_forward_pre_hook(partial(_check, path, chunk, layer, names), with_kwargs=True)]


def _check(
    path: str,
    chunk: int,
    layer: M2PTAttention,
    names: Sequence[str],
    decoder: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    arguments = {**dict(zip(names, args)), **kwargs}
    ids = arguments.get("input_ids")
    tokens = arguments["inputs_embeds"] if ids is None else ids
    if not layer.is_active or tokens.shape[1] == 1:
        return
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if isinstance(mask, dict):
        # Made by `generate`, one for each layer type: this one does not mask chunks.
        mask = mask.get("full_attention", next(iter(mask.values())))
    cache = next((value for value in arguments.values() if isinstance(value, Cache)), None)
    in_graph = is_in_graph(tokens)
    if mask is None and cache is None and positions is not None:
        what, is_ambiguous = "position_ids by which", _are_positions_ambiguous(positions, chunk)
    elif mask is not None and (isinstance(mask, BlockMask) or mask.dim() > 2):
        what = f"a mask of shape {tuple(mask.shape)} in which"
        is_ambiguous = in_graph or _is_mask_ambiguous(mask, tokens.shape[:2], cache, positions, chunk)
    else:
        return
    error = UnsupportedModelError(
        f"The language model '{path}' ({type(decoder).__name__}) got {what} a sequence may begin where a chunk of "
        f"{chunk} tokens does, so M2PT does not know where prompts stand. Pass position_ids that start at 0 for each "
        f"sequence."
    )
    if isinstance(is_ambiguous, torch.Tensor) and in_graph:
        torch._assert_async(~is_ambiguous, error.reason)
    elif is_ambiguous:
        raise error


def _are_positions_ambiguous(positions: torch.Tensor, chunk: int) -> torch.Tensor:
    """Whether packed sequences start at different positions, or not at the start of a chunk."""
    first, is_start = positions[..., :1], positions.diff() != 1
    starts_elsewhere = is_start & ((positions[..., 1:] != first) | (first % chunk != 0))
    return starts_elsewhere.any()


def _is_mask_ambiguous(
    mask: torch.Tensor | BlockMask,
    shape: tuple[int, int],
    cache: Cache | None,
    positions: torch.Tensor | None,
    chunk: int,
) -> bool:
    """Whether layers would take the start of a sequence for that of a chunk, with different positions."""
    past = 0 if cache is None else int(cache.get_seq_length())
    is_start, is_seen = (read_visibility(mask, *shape, past, (None, reach), False).is_start for reach in (None, chunk))
    if bool((is_start == is_seen).all()):
        return False
    if positions is None or past > 0:
        return True
    positions, is_start = torch.broadcast_tensors(positions, is_start)
    return any(len(of_row[starts].unique()) > 1 for of_row, starts in zip(positions, is_start))
