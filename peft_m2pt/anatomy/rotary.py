"""The rotary embedding of a layer of the language model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .modules import own_part


# Towers with several rotary modules: the attribute that chooses one for each layer, and what its values stand for.
ROTARY_BY_LAYER = {"rope_types": {"scaled": "rotary_emb", "unscaled": "rotary_emb_unscaled"}}


@dataclass(frozen=True)
class Rotary:
    """
    Computes rotations of positions as the language model does.

    Args:
        module (`nn.Module`):
            The rotary embedding of the language model.
        layer_type (`str`, *optional*):
            The type of the layer, if each type has its own frequencies.
        num_axes (`int`, defaults to 1):
            The number of position axes: 3 for M-RoPE (time, height, width). A prompt has the same position on each.
    """

    module: nn.Module
    layer_type: str | None = None
    num_axes: int = 1

    def __call__(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> Any:
        if self.num_axes > 1:
            position_ids = position_ids.expand(self.num_axes, *position_ids.shape)
        # Without its decorators, which adapt the frequencies (dynamic NTK, LongRoPE) to the longest position they see:
        # prompts need the frequencies of the tokens.
        forward = inspect.unwrap(type(self.module).forward)
        layer_type = () if self.layer_type is None else (self.layer_type,)
        return forward(self.module, hidden_states, position_ids, *layer_type)


def find_rotary(model: nn.Module, path: str, attention: nn.Module, layer: int) -> Rotary | None:
    """
    Finds the rotary embedding of a layer of the language model, in the nearest module around it that has one.

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
