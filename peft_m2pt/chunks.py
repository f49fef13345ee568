"""
Language models with layers whose tokens do not see those of other chunks (Llama 4): the end of a chunk looks like that
of a sequence there, so a sequence that begins with a chunk is refused where nothing tells one from the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from .errors import UnsupportedModelError
from .sight import look
from .upstream import chunk_length
from .wrappers import own_part


if TYPE_CHECKING:
    from .layer import M2PTAttention


def refuse_unclear_chunks(model: nn.Module, layer: M2PTAttention) -> list[RemovableHandle]:
    """
    Lets the module that makes the masks of the language model refuse what hides where a sequence begins.

    It makes none where it is given one for each token, so that no chunks are hidden from each other there, which its
    layers cannot know. Positions in packed sequences, by which it counts chunks, it does not hand on to them.

    Args:
        model (`nn.Module`):
            The model.
        layer ([`~peft_m2pt.layer.M2PTAttention`]):
            The first layer with prompts in the language model.

    Returns:
        `list[RemovableHandle]`: The hook. None for models without chunks.
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
        # Of those that `generate` makes, this one hides no chunks.
        mask = mask.get("full_attention", next(iter(mask.values())))
    cache = next((value for value in arguments.values() if isinstance(value, Cache)), None)
    in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing() or tokens.is_meta
    if mask is None and cache is None and positions is not None:
        what, is_unclear = "position_ids by which", _is_unclear_by_positions(positions, chunk)
    elif mask is not None and (isinstance(mask, BlockMask) or mask.dim() > 2):
        what = f"a mask of shape {tuple(mask.shape)} in which"
        is_unclear = in_graph or _is_unclear_by_mask(mask, tokens.shape[:2], cache, positions, chunk)
    else:
        return
    error = UnsupportedModelError(
        f"The language model '{path}' ({type(decoder).__name__}) got {what} a sequence may begin where a chunk of "
        f"{chunk} tokens does, so that M2PT does not know where prompts stand. Give position_ids that start at 0 with "
        f"each sequence."
    )
    if isinstance(is_unclear, torch.Tensor) and in_graph:
        torch._assert_async(~is_unclear, error.reason)
    elif is_unclear:
        raise error


def _is_unclear_by_positions(positions: torch.Tensor, chunk: int) -> torch.Tensor:
    """Whether packed sequences start at different positions, or not with a chunk."""
    first, is_start = positions[..., :1], positions.diff() != 1
    starts_elsewhere = is_start & ((positions[..., 1:] != first) | (first % chunk != 0))
    return starts_elsewhere.any()


def _is_unclear_by_mask(
    mask: torch.Tensor | BlockMask,
    shape: tuple[int, int],
    cache: Cache | None,
    positions: torch.Tensor | None,
    chunk: int,
) -> bool:
    """Whether layers would take the start of a sequence for that of a chunk, and it matters."""
    past = 0 if cache is None else int(cache.get_seq_length())
    is_start, is_seen = (look(mask, *shape, past, (None, reach), False).is_start for reach in (None, chunk))
    if bool((is_start == is_seen).all()):
        return False
    if positions is None or past > 0:
        return True
    positions, is_start = torch.broadcast_tensors(positions, is_start)
    return any(len(of_row[starts].unique()) > 1 for of_row, starts in zip(positions, is_start))
