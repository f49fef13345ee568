"""Reentrant gradient checkpointing: hooks in front of the first layer of a tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..anatomy.modules import own_module, own_part
from ..upstream import checkpoints_reentrantly


class RequireInputGrads:
    """
    Makes the input of a tower's layers require gradients. Otherwise, reentrant gradient checkpointing computes none
    for the prompts of a frozen tower. Like PEFT's `enable_input_require_grads`, but for each tower and only while
    checkpointing is on.

    This is a forward hook for the modules in front of the layers.

    Args:
        holders (`list[nn.Module]`):
            The modules on the path from the tower to its first layer with prompts, both included.
    """

    def __init__(self, holders: list[nn.Module]) -> None:
        self.holders = holders

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        is_frozen = isinstance(output, torch.Tensor) and output.is_floating_point() and not output.requires_grad
        if is_frozen and torch.is_grad_enabled() and any(map(checkpoints_reentrantly, self.holders)):
            # Cloned, since a leaf must not be modified in place.
            return output.requires_grad_().clone()
        return None

    def register(self) -> list[RemovableHandle]:
        """Registers itself on the modules in front of the layers."""
        handles = []
        for holder in self.holders[:-1]:
            children = [] if isinstance(holder, nn.ModuleList) else holder.children()
            for child in children:
                is_holder = any(own_module(child) is other for other in self.holders)
                if not is_holder and any(True for _ in child.parameters()):
                    handles.append(child.register_forward_hook(self))
        return handles


def require_input_grads(model: nn.Module, tower_path: str, layer_path: str) -> list[RemovableHandle]:
    """
    Registers [`RequireInputGrads`] on a tower.

    Args:
        model (`nn.Module`):
            The model.
        tower_path (`str`):
            Module path of the tower.
        layer_path (`str`):
            Path of a module in its first layer with prompts.
    """
    parts = layer_path.removeprefix(tower_path).strip(".").split(".")
    end = next(i for i, part in enumerate(parts) if part.isdigit()) + 1
    paths = [".".join([tower_path, *parts[:i]]).strip(".") for i in range(end + 1)]
    return RequireInputGrads([own_part(model, path) for path in paths]).register()
