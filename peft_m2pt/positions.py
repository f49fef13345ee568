"""
Where prompts stand: the arguments with which an attention module computes their keys.

Textual prompts stand right in front of the first token: n of them at p - n ... p - 1, where p is its position. That
differs between samples, and mostly shows in nothing but the rotations of the tokens. So prompts are rotated by -k,
which is the same for all, and on by the rotation of p. Visual prompts have no place in the image, and are not rotated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from .arguments import Role, Signature
from .starts import Starts
from .wrappers import own_part


# Towers with several rotary modules: the attribute that names a layer's, and what its values stand for.
ROTARY_BY_LAYER = {"rope_types": {"scaled": "rotary_emb", "unscaled": "rotary_emb_unscaled"}}


@dataclass(frozen=True)
class Rotary:
    """
    Computes rotations from positions, as the language model does.

    Args:
        module (`nn.Module`):
            The rotary embedding of the language model.
        layer_type (`str`, *optional*):
            What it is asked for, where it has other frequencies for each type of layer.
        num_axes (`int`, defaults to 1):
            How many axes positions have: several in models that place image patches by time, height and width. A
            prompt stands at the same position on each.
    """

    module: nn.Module
    layer_type: str | None = None
    num_axes: int = 1

    def __call__(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> Any:
        if self.num_axes > 1:
            position_ids = position_ids.expand(self.num_axes, *position_ids.shape)
        # The function below the decorators: these adapt the frequencies of some rotaries to the longest position they
        # see. The frequencies in use are those of the tokens, and so must be those of the prompts.
        forward = inspect.unwrap(type(self.module).forward)
        layer_type = () if self.layer_type is None else (self.layer_type,)
        return forward(self.module, hidden_states, position_ids, *layer_type)


def find_rotary(model: nn.Module, path: str, attention: nn.Module, layer: int) -> Rotary | None:
    """
    Finds the rotary embedding of a layer of the language model: that of the nearest module around it which has one.

    Args:
        model (`nn.Module`):
            The model.
        path (`str`):
            Module path of the attention.
        attention (`nn.Module`):
            The attention module.
        layer (`int`):
            Index of the layer.

    Returns:
        [`Rotary`], or `None` if there is none.
    """
    while path:
        path = path.rpartition(".")[0]
        holder = own_part(model, path)
        rotaries = {name: child for name, child in holder.named_children() if name.startswith("rotary")}
        if rotaries:
            return _rotary(_choose_rotary(rotaries, holder, layer), attention, layer)
    return None


def _choose_rotary(rotaries: dict[str, nn.Module], holder: nn.Module, layer: int) -> nn.Module:
    for attribute, names in ROTARY_BY_LAYER.items():
        if hasattr(holder, attribute):
            return rotaries[names[getattr(holder, attribute)[layer]]]
    return next(iter(rotaries.values()))


def _rotary(module: nn.Module, attention: nn.Module, layer: int) -> Rotary:
    layer_type = None
    if "layer_type" in inspect.signature(type(module).forward).parameters:
        layer_type = getattr(attention, "layer_type", None) or attention.config.layer_types[layer]
    parameters = getattr(attention.config, "rope_parameters", None) or {}
    parameters = parameters.get(layer_type) or parameters
    return Rotary(module, layer_type, len(parameters.get("mrope_section", [1])))


@dataclass(frozen=True)
class _Prompts:
    """
    The prompt rows whose keys and values are computed, the tokens in whose place they stand, and where they stand: in
    front of which tokens, and how far (-1: right in front).
    """

    hidden_states: torch.Tensor
    num_rows: int
    num_tokens: int
    distances: torch.Tensor | None
    rotary: Rotary | None
    starts: Starts | None

    @property
    def num_batches(self) -> int:
        return 1 if self.starts is None else self.starts.count


def prompt_arguments(
    signature: Signature,
    arguments: dict[str, Any],
    prompts: torch.Tensor,
    lengths: tuple[int, ...] | None,
    rotary: Rotary | None,
    starts: Starts | None,
) -> dict[str, Any]:
    """
    The arguments with which an attention module computes keys and values of prompts, in a batch for each start.

    Args:
        signature ([`~peft_m2pt.arguments.Signature`]):
            What the arguments of the attention module are.
        arguments (`dict[str, Any]`):
            Its arguments for the tokens.
        prompts (`torch.Tensor` of shape `(num_rows, width)`):
            What takes the place of its input.
        lengths (`tuple[int, ...]`, *optional*):
            How many of the rows belong to each adapter. Each adapter's stand in front of the first token on their own.
            `None` for prompts without a position.
        rotary ([`Rotary`], *optional*):
            The rotary embedding, if there is one outside of the attention module.
        starts ([`~peft_m2pt.starts.Starts`], *optional*):
            The tokens that they stand in front of. `None` if nothing tells the module of positions.

    Returns:
        `dict[str, Any]`
    """
    tokens = arguments[signature.input_name]
    distances = None
    if lengths is not None:
        distances = torch.cat([torch.arange(-length, 0, device=tokens.device) for length in lengths])[None]
    of_prompts = _Prompts(prompts, len(prompts), tokens.shape[-2], distances, rotary, starts)

    result = {argument.name: None for argument in signature.arguments if argument.is_required}
    hidden_states = prompts.reshape(*[1] * (tokens.dim() - 2), *prompts.shape)
    if starts is not None:
        hidden_states = hidden_states.expand(starts.count, -1, -1)
    result[signature.input_name] = hidden_states
    for name, value in arguments.items():
        role = signature.roles.get(name)
        if starts is not None and name in starts.places:
            result[name] = starts.make((name, lengths, rotary), lambda: MOVERS[role](starts.places[name], of_prompts))
        elif role in SETTERS and value is not None and not isinstance(value, BlockMask):
            result[name] = SETTERS[role](value, of_prompts)
    return result


def _see_all(mask: torch.Tensor, prompts: _Prompts) -> torch.Tensor:
    # Some modules (DeepSeek's indexer) read it even if there is nothing to hide, to select keys by themselves.
    shape = (prompts.num_batches, *([] if mask.dim() == 2 else [1, prompts.num_rows]), prompts.num_rows)
    # `new_full` with a truth value is nothing that `torch.jit.trace` can write down.
    return mask.new_ones(shape) if mask.dim() == 2 or mask.dtype == torch.bool else mask.new_zeros(shape)


def _select_all(indices: torch.Tensor, prompts: _Prompts) -> torch.Tensor:
    rows = torch.arange(prompts.num_rows, device=indices.device)
    return rows.expand(prompts.num_batches, *[1] * (indices.dim() - 3), prompts.num_rows, -1)


def _stand_in_front(position_ids: torch.Tensor, prompts: _Prompts) -> torch.Tensor:
    if prompts.distances is None:
        return _for_rows(position_ids, prompts, 0)
    return prompts.distances.expand(*position_ids.shape[:-2], prompts.num_batches, -1)


def _rotate(rotations: Any, prompts: _Prompts) -> Any:
    if isinstance(rotations, (tuple, list)):
        cos, sin = rotations
        return _for_rows(cos, prompts, 1), _for_rows(sin, prompts, 0)
    # A complex number of length 1, or an angle.
    return _for_rows(rotations, prompts, 1 if rotations.is_complex() else 0)


def _rotate_on(places: Any, prompts: _Prompts) -> Any:
    """The rotations of positions right in front of others, of which the rotations are given."""
    # Position 0 first: what is no rotation there is a factor of all.
    distances = torch.nn.functional.pad(prompts.distances, (1, 0))
    rotations = prompts.rotary(prompts.hidden_states[None], distances)
    if not isinstance(places, (tuple, list)):
        if not places.is_complex():
            return places + rotations[..., 1:, :]
        return places / rotations[..., :1, :] * rotations[..., 1:, :]
    cos, sin = (part.float() for part in rotations)
    factor, cos, sin = cos[..., :1, :], cos[..., 1:, :], sin[..., 1:, :]
    cos_of_start, sin_of_start = (part.float() / factor for part in places)
    return (
        (cos_of_start * cos - sin_of_start * sin).to(places[0].dtype),
        (sin_of_start * cos + cos_of_start * sin).to(places[1].dtype),
    )


def _for_rows(of_tokens: torch.Tensor, prompts: _Prompts, value: float) -> torch.Tensor:
    """A tensor like one that speaks of every token, for prompt rows in a batch of 1, filled with one value."""
    shape = list(of_tokens.shape)
    axes = [of_tokens.dim() - 2, *range(of_tokens.dim())]
    # Some (Radio, DINOv3) speak of the patches alone, not of the class token in front of them.
    axis = next((axis for axis in axes if shape[axis] == prompts.num_tokens), axes[0])
    return of_tokens.new_full((*[1] * axis, prompts.num_rows, *shape[axis + 1 :]), value)


# What prompts get in the place of an argument of the tokens. Without an entry, they get nothing.
SETTERS: dict[Role | None, Callable[[Any, _Prompts], Any]] = {
    Role.BOUNDARIES: lambda boundaries, prompts: boundaries.new_tensor([0, prompts.num_rows]),
    Role.MASK: _see_all,
    Role.MAX_LENGTH: lambda length, prompts: prompts.num_rows,
    Role.POSITIONS: _stand_in_front,
    Role.ROTATIONS: _rotate,
    Role.SELECTED_KEYS: _select_all,
    Role.SHARED_KV: lambda states, prompts: {},
}

# The same for arguments that tell where prompts start.
MOVERS: dict[Role | None, Callable[[Any, _Prompts], Any]] = {
    Role.POSITIONS: lambda position_ids, prompts: position_ids + prompts.distances,
    Role.ROTATIONS: _rotate_on,
}
