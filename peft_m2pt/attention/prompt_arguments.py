"""
The arguments with which an attention module computes the keys and values of prompts.

Textual prompts stand right before the first token: n of them at p - n ... p - 1, where p is its position. p differs
between samples, and mostly shows in nothing but the rotations of the tokens. So prompts get the rotation of -k, which
is the same for all, and then that of p. Visual prompts have no place in the image, and are not rotated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from ..anatomy.arguments import Role, Signature
from ..anatomy.rotary import Rotary
from .first_tokens import FirstTokens


@dataclass(frozen=True)
class _Prompts:
    """Normed prompts, the number of tokens in whose place they are, and where they stand."""

    hidden_states: torch.Tensor
    num_tokens: int
    distances: torch.Tensor | None
    """From the first token, -1 for the prompt right before it. `None` without positions."""
    rotary: Rotary | None
    batch_size: int

    @property
    def count(self) -> int:
        return len(self.hidden_states)


def prompt_arguments(
    signature: Signature,
    arguments: dict[str, Any],
    prompts: torch.Tensor,
    lengths: tuple[int, ...] | None,
    rotary: Rotary | None,
    first: FirstTokens | None,
) -> dict[str, Any]:
    """
    Makes the arguments with which an attention module computes keys and values of prompts.

    Args:
        signature ([`~peft_m2pt.anatomy.arguments.Signature`]):
            What the arguments of the attention module are.
        arguments (`dict[str, Any]`):
            Its arguments for the tokens.
        prompts (`torch.Tensor` of shape `(num_prompts, width)`):
            The normed prompts, which take the place of its input.
        lengths (`tuple[int, ...]`, *optional*):
            The number of prompts of each adapter, all of which stand right before the first token. `None` for prompts
            without a position.
        rotary ([`~peft_m2pt.anatomy.rotary.Rotary`], *optional*):
            The rotary embedding, if there is one outside the attention module.
        first ([`~peft_m2pt.attention.first_tokens.FirstTokens`], *optional*):
            The first tokens, each an element of the batch. `None` if the module gets no positions.

    Returns:
        `dict[str, Any]`
    """
    tokens = arguments[signature.input_name]
    distances = None
    if lengths is not None:
        distances = torch.cat([torch.arange(-length, 0, device=tokens.device) for length in lengths])[None]
    batch_size = 1 if first is None else first.count
    of_prompts = _Prompts(prompts, tokens.shape[-2], distances, rotary, batch_size)

    result = {argument.name: None for argument in signature.arguments if argument.is_required}
    hidden_states = prompts.reshape(*[1] * (tokens.dim() - 2), *prompts.shape)
    result[signature.input_name] = hidden_states if first is None else hidden_states.expand(batch_size, -1, -1)
    for name, value in arguments.items():
        role = signature.roles.get(name)
        if first is not None and name in first.positions:
            key, start = (name, lengths, rotary), first.positions[name]
            result[name] = first.compute_once(key, lambda: MOVERS[role](start, of_prompts))
        elif role in SETTERS and value is not None and not isinstance(value, BlockMask):
            result[name] = SETTERS[role](value, of_prompts)
    return result


def _see_all(mask: torch.Tensor, prompts: _Prompts) -> torch.Tensor:
    # A mask, since DeepSeek's indexer reads it even if it hides nothing, to select keys.
    shape = (prompts.batch_size, *([] if mask.dim() == 2 else [1, prompts.count]), prompts.count)
    # `torch.jit.trace` cannot record `new_full` with a boolean.
    return mask.new_ones(shape) if mask.dim() == 2 or mask.dtype == torch.bool else mask.new_zeros(shape)


def _select_all(indices: torch.Tensor, prompts: _Prompts) -> torch.Tensor:
    keys = torch.arange(prompts.count, device=indices.device)
    return keys.expand(prompts.batch_size, *[1] * (indices.dim() - 3), prompts.count, -1)


def _place(position_ids: torch.Tensor, prompts: _Prompts) -> torch.Tensor:
    if prompts.distances is None:
        return _fill(position_ids, prompts, 0)
    return prompts.distances.expand(*position_ids.shape[:-2], prompts.batch_size, -1)


def _leave_unrotated(rotations: Any, prompts: _Prompts) -> Any:
    if isinstance(rotations, (tuple, list)):
        cos, sin = rotations
        return _fill(cos, prompts, 1), _fill(sin, prompts, 0)
    # A complex number of length 1, or an angle.
    return _fill(rotations, prompts, 1 if rotations.is_complex() else 0)


def _rotate_on(start: Any, prompts: _Prompts) -> Any:
    """The rotations of prompts before a first token, whose own rotation is given."""
    # Includes that of distance 0, in which all but a scaling factor is the identity.
    distances = torch.nn.functional.pad(prompts.distances, (1, 0))
    rotations = prompts.rotary(prompts.hidden_states[None], distances)
    if not isinstance(start, (tuple, list)):
        if not start.is_complex():
            return start + rotations[..., 1:, :]
        return start / rotations[..., :1, :] * rotations[..., 1:, :]
    cos, sin = (part.float() for part in rotations)
    factor, cos, sin = cos[..., :1, :], cos[..., 1:, :], sin[..., 1:, :]
    start_cos, start_sin = (part.float() / factor for part in start)
    return (
        (start_cos * cos - start_sin * sin).to(start[0].dtype),
        (start_sin * cos + start_cos * sin).to(start[1].dtype),
    )


def _fill(of_tokens: torch.Tensor, prompts: _Prompts, value: float) -> torch.Tensor:
    """A tensor like one with an entry for each token, for prompts in a batch of 1, filled with one value."""
    shape = list(of_tokens.shape)
    axes = [of_tokens.dim() - 2, *range(of_tokens.dim())]
    # Radio and DINOv3 have entries for the patches alone, not for the class token before them.
    axis = next((axis for axis in axes if shape[axis] == prompts.num_tokens), axes[0])
    return of_tokens.new_full((*[1] * axis, prompts.count, *shape[axis + 1 :]), value)


# What prompts get for an argument of the tokens. They get nothing for those that are missing here.
SETTERS: dict[Role | None, Callable[[Any, _Prompts], Any]] = {
    Role.BOUNDARIES: lambda boundaries, prompts: boundaries.new_tensor([0, prompts.count]),
    Role.MASK: _see_all,
    Role.MAX_LENGTH: lambda length, prompts: prompts.count,
    Role.POSITIONS: _place,
    Role.ROTATIONS: _leave_unrotated,
    Role.SELECTED_KEYS: _select_all,
    Role.SHARED_KV: lambda states, prompts: {},
}


# The same for arguments that carry the positions of first tokens.
MOVERS: dict[Role | None, Callable[[Any, _Prompts], Any]] = {
    Role.POSITIONS: lambda position_ids, prompts: position_ids + prompts.distances,
    Role.ROTATIONS: _rotate_on,
}
