"""
Where prompts stand: the arguments with which an attention module computes their keys.

Textual prompts stand right in front of the first token, at -n ... -1. Visual prompts have no place in the image, so
they are not rotated.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from .errors import UnsupportedModelError


# Arguments of attention modules that hold rotations, computed from positions outside of the module.
ROTATIONS = ("position_embeddings", "freqs_ci", "rotary_pos_emb")

# Arguments that speak of the tokens alone: what they see, and what was computed for them before. Prompts go without.
OF_TOKENS = (
    "cache_position",
    "encoder_attention_mask",
    "encoder_hidden_states",
    "head_mask",
    "input_features_mask",
    "key_value_states",
    "layer_head_mask",
    "mask",
    "output_attentions",
    "past_key_value",
    "past_key_values",
    "use_cache",
)
KNOWN = {
    *ROTATIONS,
    *OF_TOKENS,
    "attention_mask",
    "cu_seqlens",
    "max_seqlen",
    "position_ids",
    "prev_topk_indices",
    "shared_kv_states",
}

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


class Argument(NamedTuple):
    """A named argument of an attention module."""

    name: str
    is_required: bool


def find_arguments(attention: nn.Module) -> tuple[Argument, ...]:
    """Lists the named arguments of an attention module. The first is its input."""
    parameters = list(inspect.signature(type(attention).forward).parameters.values())[1:]
    named = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    return tuple(Argument(parameter.name, parameter.default is parameter.empty) for parameter in named)


def takes(attention: nn.Module, name: str) -> bool:
    """Whether an attention module has an argument of this name."""
    return any(argument.name == name for argument in find_arguments(attention))


def check_arguments(attention: nn.Module, path: str, way_out: str) -> None:
    """
    Checks that M2PT knows what an attention module's arguments mean for prompts.

    Raises:
        UnsupportedModelError: If it does not.
    """
    if unknown := sorted({argument.name for argument in find_arguments(attention)[1:]} - KNOWN):
        raise UnsupportedModelError(
            f"The attention '{path}' ({type(attention).__name__}) takes {unknown}, of which it is not known what they "
            f"mean for prompts. {way_out}"
        )


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
        holder = model.get_submodule(path)
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


def prompt_arguments(
    named: Sequence[Argument],
    arguments: dict[str, Any],
    prompts: torch.Tensor,
    lengths: list[int] | None,
    rotary: Rotary | None,
) -> dict[str, Any]:
    """
    The arguments with which an attention module computes keys and values of prompts, in a batch of 1.

    Args:
        named (`Sequence[Argument]`):
            The named arguments of the attention module.
        arguments (`dict[str, Any]`):
            Its arguments for the tokens.
        prompts (`torch.Tensor` of shape `(num_rows, width)`):
            What takes the place of its input.
        lengths (`list[int]`, *optional*):
            How many of the rows belong to each adapter. Each adapter's stand in front of the first token on their own.
            `None` for prompts without a position.
        rotary ([`Rotary`], *optional*):
            The rotary embedding, if there is one outside of the attention module.

    Returns:
        `dict[str, Any]`
    """
    tokens = arguments[named[0].name]
    hidden_states = prompts.reshape(*[1] * (tokens.dim() - 2), *prompts.shape)
    num_rows, num_tokens = len(prompts), tokens.shape[-2]
    position_ids = None
    if lengths is not None:
        position_ids = torch.cat([torch.arange(-length, 0, device=tokens.device) for length in lengths])[None]

    result = {named[0].name: hidden_states}
    for name, is_required in named[1:]:
        value = arguments.get(name)
        if value is None:
            if is_required:
                result[name] = None
        elif name == "shared_kv_states":
            # Into this, modules write keys and values of the tokens, which later layers share.
            result[name] = {}
        elif name == "attention_mask" and not isinstance(value, BlockMask):
            # Some modules read it even if there is nothing to hide, to select keys by themselves.
            shape = (1, num_rows) if value.dim() == 2 else (1, 1, num_rows, num_rows)
            result[name] = value.new_full(shape, value.dim() == 2 or value.dtype == torch.bool)
        elif name == "prev_topk_indices":
            result[name] = torch.arange(num_rows, device=value.device).expand(*[1] * (value.dim() - 2), num_rows, -1)
        elif name == "attention_mask" or name in OF_TOKENS:
            if is_required:
                result[name] = None
        elif name == "cu_seqlens":
            result[name] = value.new_tensor([0, num_rows])
        elif name == "max_seqlen":
            result[name] = num_rows
        elif name == "position_ids":
            if position_ids is None:
                result[name] = _for_rows(value, num_tokens, num_rows, 0)
            else:
                result[name] = position_ids.expand(*value.shape[:-2], 1, -1)
        elif position_ids is not None:
            result[name] = rotary(hidden_states, position_ids)
        elif isinstance(value, (tuple, list)):
            cos, sin = value
            result[name] = (_for_rows(cos, num_tokens, num_rows, 1), _for_rows(sin, num_tokens, num_rows, 0))
        else:
            # A complex number of length 1, or an angle.
            result[name] = _for_rows(value, num_tokens, num_rows, 1 if value.is_complex() else 0)
    return result


def _for_rows(of_tokens: torch.Tensor, num_tokens: int, num_rows: int, value: float) -> torch.Tensor:
    """A tensor like one that speaks of every token, for prompt rows in a batch of 1, filled with one value."""
    shape = list(of_tokens.shape)
    axes = [of_tokens.dim() - 2, *range(of_tokens.dim())]
    # Some speak of the patches alone, not of the class token in front of them.
    axis = next((axis for axis in axes if shape[axis] == num_tokens), axes[0])
    return of_tokens.new_full((*[1] * axis, num_rows, *shape[axis + 1 :]), value)
