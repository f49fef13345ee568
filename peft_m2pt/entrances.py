"""
What M2PT adds at the entrance of a tower: hooks that leave the numbers of the base model as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .upstream import checkpoints_reentrantly
from .wrappers import own_module, own_part


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
                is_around = any(own_module(child) is other for other in self.holders)
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
    return LetGradientsIn([own_part(model, path) for path in paths]).register()
