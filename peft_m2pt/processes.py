"""Training steps without images, in one process and in several, which need not all have images in every step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import distributed, nn
from torch.utils.hooks import RemovableHandle

from .base import M2PTLayer
from .prompt import M2PTPrompt
from .upstream import weights_come_from_first_process


class TakePart:
    """
    Lets what is trained in front of the language model take part in a step without images.

    Processes that train together exchange the gradients of all weights, and wait for each other. So if a part of the
    model was not called by this process, its weights are added to the input of the language model, in a way that
    leaves nothing of them but a gradient of zero. That is in front of all layers, so checkpointing does not repeat it,
    and gradients leave the layers in the same order in all processes. This is a forward hook for a module that is
    called whenever the part is.

    In one process, nothing waits, and a weight without a gradient is left as it is. But if no weight is needed at all,
    since nothing in the language model is trained, the loss would have nothing to go back to. All weights have a
    gradient of zero then.

    Args:
        model (`nn.Module`):
            The model.
        part (`nn.Module`):
            The vision encoder, or the connector.
    """

    def __init__(self, model: nn.Module, part: nn.Module) -> None:
        self.model = model
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
        if not _in_several_processes():
            # Its input may ask for gradients without a weight behind it, for reentrant checkpointing.
            is_trained = any(weight.requires_grad for weight in decoder.parameters())
            return output if is_trained or not torch.is_grad_enabled() else _plus_zeros(output, self.model)
        return self._take_part(output)

    def _take_part(self, states: Any) -> Any:
        if not _in_several_processes() or self.takes_part or not torch.is_grad_enabled():
            return states
        self.takes_part = True
        return _plus_zeros(states, self.part)


def let_take_part(model: nn.Module, part: nn.Module, watched: nn.Module, decoder: nn.Module) -> list[RemovableHandle]:
    """
    Prepares a part of a model for training steps without images, in all processes or in some of them.

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
    hook = TakePart(model, part)
    return [
        model.register_forward_pre_hook(hook.begin),
        watched.register_forward_hook(hook),
        decoder.register_forward_pre_hook(hook.enter, with_kwargs=True),
        decoder.register_forward_hook(hook.leave),
    ]


def agree_on_scales(model: nn.Module, adapter_name: str) -> None:
    """
    Gives all processes the units of the first one's prompts, where only that one has the weights of the model.

    FSDP brings the others all weights, but no buffers.

    Args:
        model (`nn.Module`):
            The model.
        adapter_name (`str`):
            Name of a new adapter. All processes add it.
    """
    if not weights_come_from_first_process():
        return
    prompts = [
        prompts[adapter_name]
        for layer in model.modules()
        if isinstance(layer, M2PTLayer)
        for prompts in (getattr(layer, layer_name) for layer_name in layer.adapter_layer_names)
        if adapter_name in prompts and isinstance(prompts[adapter_name], M2PTPrompt)
    ]
    scales = broadcast_object_list([prompt.scale.cpu() for prompt in prompts])
    for prompt, scale in zip(prompts, scales):
        prompt.scale.copy_(scale)


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


def _plus_zeros(states: Any, part: nn.Module) -> Any:
    """Adds the weights of a part in a way that leaves nothing of them but a gradient of zero."""
    # Sums over nothing, so that no value of a weight can spoil the states.
    zeros = [weight.flatten()[:0].sum() for weight in _weights(part) if weight.requires_grad]
    return _plus(states, sum(zero.to(zeros[0]) for zero in zeros)) if zeros else states


def _plus(states: Any, zero: torch.Tensor) -> Any:
    """Adds a zero to what a model takes, or returns first."""
    if isinstance(states, torch.Tensor):
        return states + zero.to(states)
    if isinstance(states, tuple):
        return (_plus(states[0], zero), *states[1:])
    name = next(iter(states))
    states[name] = _plus(states[name], zero)
    return states
