"""
What M2PT adds at the entrance of a model and of its towers.

Both additions are hooks, and both leave the numbers of the base model as they are.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .arguments import Role
from .base import M2PTLayer
from .upstream import checkpoints_reentrantly


class LetGradientsIn:
    """
    Lets reentrant gradient checkpointing find the prompts of a tower.

    It passes gradients through a layer only if the layer's input asks for some, which that of a frozen tower does not.
    This is a forward hook for the modules in front of the layers.

    Args:
        holders (`list[nn.Module]`):
            The tower, and the modules in it around a layer, the layer included.
    """

    def __init__(self, holders: list[nn.Module]) -> None:
        self.holders = holders

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        wants_none = isinstance(output, torch.Tensor) and output.is_floating_point() and not output.requires_grad
        if wants_none and torch.is_grad_enabled() and any(map(checkpoints_reentrantly, self.holders)):
            # A copy, since no leaf may be written into.
            return output.requires_grad_().clone()
        return None

    def register(self) -> list[RemovableHandle]:
        """Hangs itself on the modules beside the layers."""
        handles = []
        for holder in self.holders[:-1]:
            children = [] if isinstance(holder, nn.ModuleList) else holder.children()
            for child in children:
                is_around = any(child is other for other in self.holders)
                if not is_around and any(True for _ in child.parameters()):
                    handles.append(child.register_forward_hook(self))
        return handles


def let_gradients_in(model: nn.Module, tower_path: str, layer_path: str) -> list[RemovableHandle]:
    """
    Prepares a tower for reentrant gradient checkpointing.

    Args:
        model (`nn.Module`):
            The model.
        tower_path (`str`):
            Module path of the tower.
        layer_path (`str`):
            Module path of something in its first layer with prompts.

    Returns:
        `list[RemovableHandle]`: The hooks.
    """
    parts = layer_path.removeprefix(tower_path).strip(".").split(".")
    end = next(i for i, part in enumerate(parts) if part.isdigit()) + 1
    paths = [".".join([tower_path, *parts[:i]]).strip(".") for i in range(end + 1)]
    return LetGradientsIn([model.get_submodule(path) for path in paths]).register()


class CountFromFirstToken:
    """
    Lets positions of padded samples count from their first token, where nobody says how they count.

    Without positions, a language model counts padding on the left too. Its tokens only look at how far they are from
    each other, but prompts stand in front of the first token, not in front of the padding. This is a forward pre-hook
    for the outermost module that takes positions.

    Args:
        layer ([`~peft_m2pt.base.M2PTLayer`]):
            A layer with prompts.
        argument_names (`list[str]`):
            Names of the model's arguments.
    """

    def __init__(self, layer: M2PTLayer, argument_names: list[str]) -> None:
        self.layer = layer
        self.argument_names = argument_names

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = {**dict(zip(self.argument_names, args)), **kwargs}
        mask, tokens = arguments.get("attention_mask"), arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        if tokens is None or arguments.get("position_ids") is not None or not self.layer.is_active:
            return None
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return None
        position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return (), {**arguments, "position_ids": position_ids[:, -tokens.shape[1] :]}


def count_from_first_token(model: nn.Module, layer: M2PTLayer) -> list[RemovableHandle]:
    """
    Prepares a model for padding on the left.

    Args:
        model (`nn.Module`):
            The model.
        layer ([`~peft_m2pt.base.M2PTLayer`]):
            A layer of its language model.

    Returns:
        `list[RemovableHandle]`: The hooks. None if the model has no rotations, if it computes positions from the
        attention mask and the images, as those with several axes of positions do, or if it selects keys by their
        positions, since these are the places of the keys then.
    """
    parts = layer.site.path.split(".")[:-1]
    around = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    rotary = layer.site.rotary
    rotates = rotary is not None or layer.signature.takes(Role.POSITIONS)
    has_axes = rotary is not None and rotary.num_axes > 1
    computes_positions = has_axes and any(hasattr(module, "get_rope_index") for module in around)
    if not rotates or computes_positions or _selects_by_position(model):
        return []
    for module in around:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        if "decoder_position_ids" in names:
            # Positions are counted in two places, which must agree.
            return []
        if {"position_ids", "attention_mask"} <= set(names):
            return [module.register_forward_pre_hook(CountFromFirstToken(layer, names), with_kwargs=True)]
    return []


def _selects_by_position(model: nn.Module) -> bool:
    """Whether layers select blocks of keys, which they find by position."""
    return any(hasattr(module, "build_block_mask") for module in model.modules())
