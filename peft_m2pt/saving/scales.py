"""The scales of prompts in distributed training, which are buffers."""

from __future__ import annotations

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from ..layers.base import M2PTLayer
from ..layers.prompt import M2PTPrompt
from ..upstream import weights_come_from_first_process


# Inserted into module paths by torch's `apply_activation_checkpointing`.
CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."


def broadcast_scales(model: nn.Module, adapter_name: str) -> None:
    """
    Broadcasts the scales of prompts from rank 0 if only that has loaded the model (`cpu_ram_efficient_loading` of
    FSDP). FSDP itself broadcasts parameters, but not these buffers.

    Args:
        model (`nn.Module`):
            The model.
        adapter_name (`str`):
            Name of a new adapter, which all processes add.
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


def missing_scales(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The scales of prompts that are missing in a state dict gathered by FSDP2, which leaves them out."""
    scales = {}
    for path, module in model.named_modules():
        if isinstance(module, M2PTPrompt) and module.scale is not None:
            # State dicts have no names of checkpoint wrappers.
            path = path.replace(CHECKPOINT_WRAPPER, "")
            if f"{path}.weight" in state_dict and f"{path}.scale" not in state_dict:
                scales[f"{path}.scale"] = module.scale
    return scales
