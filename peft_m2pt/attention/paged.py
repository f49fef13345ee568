"""
Prompts in continuous batching, which packs the tokens of several requests into one row and keeps their keys and values
in a paged cache.

Every request starts at position 0, so the keys and values of prompts, at positions -n ... -1, are the same for all of
them. Attention with a mask takes them once for all requests, flash attention in front of each. The cache never holds
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..anatomy.arguments import Role, Signature
from ..anatomy.rotary import Rotary
from ..errors import UnsupportedModelError
from ..upstream import local_reach, paged_lengths, update_paged_cache
from .find_first_tokens import given_positions
from .first_tokens import FirstTokens, Positions, differ_from_first, position_tensors
from .prompt_kv import PromptKV


# The attribute of a paged cache that holds the prompts of its requests.
PROMPTS = "m2pt_prompts"


def prompts_in_cache(cache: Any, make: bool = False) -> dict[str, Any] | None:
    """
    The prompts that each attention module has put in front of the requests in a paged cache, by module path.

    Args:
        cache (`Any`):
            The paged cache.
        make (`bool`, defaults to `False`):
            Whether to let the cache hold prompts. The caller makes sure that a refusal does not stop the worker.

    Returns:
        `dict[str, Any]`, or `None` if the cache may not hold prompts.
    """
    if make and not hasattr(cache, PROMPTS):
        setattr(cache, PROMPTS, {})
    return getattr(cache, PROMPTS, None)


def check_requests(
    attention: nn.Module, path: str, signature: Signature, arguments: dict[str, Any], rotary: Rotary | None
) -> None:
    """
    Checks that the tokens of each request have positions 0, 1, ..., by the arguments of an attention module.

    Args:
        attention (`nn.Module`):
            The attention module.
        path (`str`):
            Its module path, for the error message.
        signature ([`~peft_m2pt.anatomy.arguments.Signature`]):
            The roles of its arguments.
        arguments (`dict[str, Any]`):
            Its arguments in this call.
        rotary ([`~peft_m2pt.anatomy.rotary.Rotary`], *optional*):
            The rotary embedding, if there is one outside of the attention module.

    Raises:
        UnsupportedModelError: If there are other positions, or if the decode fast path is used.
    """
    if arguments.get("block_table") is not None:
        raise UnsupportedModelError(
            f"The attention '{path}' ({type(attention).__name__}) got a block_table: on its decode fast path, flash "
            f"attention reads keys and values from the pages of the cache, where no prompts are. Set "
            f"max_blocks_per_request=0 in ContinuousBatchingConfig."
        )
    given = given_positions(signature, arguments)
    source = next(position_tensors(given), None)
    if source is None or source in _checked:
        return
    tokens = arguments[signature.input_name]
    boundaries, num_before, are_all = paged_lengths(arguments)
    columns = torch.arange(tokens.shape[-2], device=tokens.device)
    requests = torch.searchsorted(boundaries[1:].contiguous(), columns, right=True).clamp(max=len(num_before) - 1)
    expected = _positions(
        signature, given, tokens, (columns - boundaries[requests] + num_before[requests])[None], rotary
    )
    is_wrong = differ_from_first(given, expected)
    if not are_all:
        # Lengths leave out tokens beyond the sliding window. Such requests were checked when they were shorter.
        is_wrong = is_wrong & (num_before < local_reach(attention)[0] - 1)[requests]
    if bool(is_wrong.any() | (boundaries[-1] != len(columns))):
        raise UnsupportedModelError(
            f"The attention '{path}' ({type(attention).__name__}) got requests of continuous batching whose positions "
            f"do not start at 0, so M2PT does not know the positions of their prompts. Use generate(...)."
        )
    _checked[source] = True


# Positions that an earlier layer has checked. Models compute them anew in every forward pass.
_checked: WeakIdKeyDictionary = WeakIdKeyDictionary()


def first_token_of_requests(
    signature: Signature, arguments: dict[str, Any], rotary: Rotary | None
) -> FirstTokens | None:
    """The first token of every request, at position 0. `None` if no argument carries positions."""
    given = given_positions(signature, arguments)
    tokens = arguments[signature.input_name]
    zero = torch.zeros(1, 1, dtype=torch.long, device=tokens.device)
    return FirstTokens(_positions(signature, given, tokens, zero, rotary)) if given else None


def _positions(
    signature: Signature, given: Positions, tokens: torch.Tensor, positions: torch.Tensor, rotary: Rotary | None
) -> Positions:
    """The values of the arguments that carry positions, for tokens at `positions`, of shape `(1, length)`."""
    return {
        name: rotary(tokens, positions)
        if signature.roles[name] is Role.ROTATIONS
        else positions.expand(*value.shape[:-2], *positions.shape)
        for name, value in given.items()
    }


def attend_paged(
    extension: Callable,
    attend: Callable,
    module: nn.Module,
    prompts: PromptKV,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attends with prompts in front of the keys and values of requests.

    Args:
        extension (`Callable`):
            How prompts get into the attention implementation.
        attend (`Callable`):
            The attention function.
    """
    key, value = update_paged_cache(module, key, value, kwargs)
    return extension(attend, module, prompts, query, key, value, attention_mask, **kwargs)
