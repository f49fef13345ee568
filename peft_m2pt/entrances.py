"""
What M2PT adds at the entrance of a model and of its towers, and at the exit of the language model.

All additions are hooks, and all leave the numbers of the base model as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed, nn
from torch.utils.hooks import RemovableHandle

from .base import M2PTLayer, M2PTPrompt
from .positions import takes


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
        if wants_none and torch.is_grad_enabled() and any(map(_checkpoints_reentrantly, self.holders)):
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


def _checkpoints_reentrantly(module: nn.Module) -> bool:
    function = getattr(module, "_gradient_checkpointing_func", None)
    is_on = module.training and getattr(module, "gradient_checkpointing", False)
    return is_on and getattr(function, "keywords", {}).get("use_reentrant", False)


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


class TakePart:
    """
    Lets what is trained in front of the language model take part in a step without images.

    Processes that train together exchange the gradients of all weights, and wait for each other. So if a part of the
    model was not called by this process, its weights are added to the input of the language model, in a way that
    leaves nothing of them but a gradient of zero. That is in front of all layers, so checkpointing does not repeat it,
    and gradients leave the layers in the same order in all processes. This is a forward hook for a module that is
    called whenever the part is.

    Args:
        part (`nn.Module`):
            The vision encoder, or the connector.
    """

    def __init__(self, part: nn.Module) -> None:
        self.part = part
        self.takes_part = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _in_several_processes():
            self.takes_part = True

    def begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook for the model."""
        if _in_several_processes():
            self.takes_part = False

    def enter(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook for the language model."""
        if kwargs.get("inputs_embeds") is None:
            return None
        return args, {**kwargs, "inputs_embeds": self._take_part(kwargs["inputs_embeds"])}

    def leave(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A forward hook for the language model, which may embed its tokens itself."""
        return self._take_part(output)

    def _take_part(self, states: Any) -> Any:
        if not _in_several_processes() or self.takes_part or not torch.is_grad_enabled():
            return states
        self.takes_part = True
        # Sums over nothing, so that no value of a weight can spoil the states.
        zeros = [weight.flatten()[:0].sum() for weight in _weights(self.part) if weight.requires_grad]
        return _plus(states, sum(zero.to(zeros[0]) for zero in zeros)) if zeros else states


def let_take_part(model: nn.Module, part: nn.Module, watched: nn.Module, decoder: nn.Module) -> list[RemovableHandle]:
    """
    Prepares a part of a model for training in several processes, some of which may have no images in a step.

    Args:
        model (`nn.Module`):
            The model.
        part (`nn.Module`):
            The part: the vision encoder, or the connector.
        watched (`nn.Module`):
            A module that is called whenever the part is.
        decoder (`nn.Module`):
            The language model.

    Returns:
        `list[RemovableHandle]`: The hooks. None if the module is watched already.
    """
    if any(isinstance(hook, TakePart) for hook in watched._forward_hooks.values()):
        return []
    hook = TakePart(part)
    return [
        model.register_forward_pre_hook(hook.begin),
        watched.register_forward_hook(hook),
        decoder.register_forward_pre_hook(hook.enter, with_kwargs=True),
        decoder.register_forward_hook(hook.leave),
    ]


def _in_several_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _weights(part: nn.Module) -> Iterator[torch.Tensor]:
    """The weights that adapters have in a part of a model."""
    for layer in part.modules():
        if not isinstance(layer, M2PTLayer):
            continue
        for layer_name in layer.adapter_layer_names:
            for module in getattr(layer, layer_name).values():
                # Sharded training gathers a prompt when it is called.
                yield from [module()] if isinstance(module, M2PTPrompt) else module.parameters()


def _plus(states: Any, zero: torch.Tensor) -> Any:
    """Adds a zero to what a model takes, or returns first."""
    if isinstance(states, torch.Tensor):
        return states + zero.to(states)
    if isinstance(states, tuple):
        return (_plus(states[0], zero), *states[1:])
    name = next(iter(states))
    states[name] = _plus(states[name], zero)
    return states


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
    rotates = rotary is not None or takes(layer.base_layer, "position_ids")
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
