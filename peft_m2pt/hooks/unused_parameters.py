"""Training steps without images, in one process or in some of several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed, nn
from torch.utils.hooks import RemovableHandle

from ..layers.base import M2PTLayer
from ..layers.prompt import M2PTPrompt


class KeepParametersUsed:
    """
    Gives the trained parameters in front of the language model gradients of zero in a step without images.

    Distributed training waits for the gradients of all parameters. So if this process has not called a part of the
    model, an empty sum of its parameters is added to the input of the language model: in front of all layers, so that
    checkpointing does not repeat it and gradients arrive in the same order in all processes. This is a forward hook
    for a module that is called whenever the part is.

    In a single process, unused parameters get no gradient. But if nothing in the language model is trained, the loss
    would not require gradients; then all trained parameters get gradients of zero.

    Args:
        model (`nn.Module`):
            The model.
        part (`nn.Module`):
            The vision encoder, or the connector.
    """

    def __init__(self, model: nn.Module, part: nn.Module) -> None:
        self.model = model
        self.part = part
        self.is_used = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _in_several_processes():
            self.is_used = True

    def reset(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook for the model."""
        if _in_several_processes():
            self.is_used = False

    def before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook for the language model."""
        if not torch.is_grad_enabled() or kwargs.get("inputs_embeds") is None:
            return None
        return args, {**kwargs, "inputs_embeds": self._keep_used(kwargs["inputs_embeds"])}

    def after_decoder(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A forward hook for the language model, which may have embedded its tokens itself."""
        if not torch.is_grad_enabled():
            return output
        if not _in_several_processes():
            # Not `output.requires_grad`, which reentrant checkpointing sets without any trained parameter.
            is_trained = any(weight.requires_grad for weight in decoder.parameters())
            return output if is_trained else _add_zero_gradients(output, self.model)
        return self._keep_used(output)

    def _keep_used(self, states: Any) -> Any:
        if not _in_several_processes() or self.is_used:
            return states
        self.is_used = True
        return _add_zero_gradients(states, self.part)


def keep_parameters_used(
    model: nn.Module, part: nn.Module, watched: nn.Module, decoder: nn.Module
) -> list[RemovableHandle]:
    """
    Registers [`KeepParametersUsed`] for a part of a model.

    Args:
        model (`nn.Module`):
            The model.
        part (`nn.Module`):
            The vision encoder, or the connector.
        watched (`nn.Module`):
            A module that is called whenever the part is.
        decoder (`nn.Module`):
            The language model.

    Returns:
        `list[RemovableHandle]`: The hooks. Empty if the module is watched already.
    """
    if any(isinstance(hook, KeepParametersUsed) for hook in watched._forward_hooks.values()):
        return []
    hook = KeepParametersUsed(model, part)
    return [
        model.register_forward_pre_hook(hook.reset),
        watched.register_forward_hook(hook),
        decoder.register_forward_pre_hook(hook.before_decoder, with_kwargs=True),
        decoder.register_forward_hook(hook.after_decoder),
    ]


def _in_several_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _weights(part: nn.Module) -> Iterator[torch.Tensor]:
    """The weights of adapters in a part of a model."""
    for layer in part.modules():
        if not isinstance(layer, M2PTLayer):
            continue
        for layer_name in layer.adapter_layer_names:
            for module in getattr(layer, layer_name).values():
                # A prompt is called, since sharded training gathers it then.
                yield from [module()] if isinstance(module, M2PTPrompt) else module.parameters()


def _add_zero_gradients(states: Any, part: nn.Module) -> Any:
    """Adds an empty sum of the weights of a part, so that their gradients are zero."""
    # Empty, since 0 * weight would be NaN for infinite weights.
    zeros = [weight.flatten()[:0].sum() for weight in _weights(part) if weight.requires_grad]
    return _add_to_first(states, sum(zero.to(zeros[0]) for zero in zeros)) if zeros else states


def _add_to_first(states: Any, zero: torch.Tensor) -> Any:
    """Adds a scalar to the first tensor of a model's input or output."""
    if isinstance(states, torch.Tensor):
        return states + zero.to(states)
    if isinstance(states, tuple):
        return (_add_to_first(states[0], zero), *states[1:])
    name = next(iter(states))
    states[name] = _add_to_first(states[name], zero)
    return states
