"""
Trainable versions of a frozen module, which share everything with it that is not trained.

PEFT saves weights as `<name>.<adapter>.<weight>`, so trained parts are kept flat, by name. `assemble_trainable` puts
the parts of an adapter into a second module that runs the code of the first.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..adapted import base_children
from ..anatomy.compiled import uncompiled
from ..anatomy.modules import bare_copy, device_of, is_plain, linear_layers, own_module, own_modules
from ..upstream import FetchOffloadedWeights


# The matrices A and B of a low-rank update, as LoRA names them.
DOWN, UP = "lora_A", "lora_B"


def copy_parts(module: nn.Module) -> dict[str, nn.Module]:
    """
    Copies all weights of a module except those of other adapters. Offloaded and partitioned weights are fetched.

    Returns:
        `dict[str, nn.Module]`: A copy of each of its modules that directly holds weights, by path.
    """
    parts = {}
    for path, child in own_modules(module):
        if not any(True for _ in child.parameters(recurse=False)):
            continue
        with align_module_device(child), gather_params_ctx(child.parameters(recurse=False), modifier_rank=None):
            part = bare_copy(child)
            part._modules = {}
            parts[path] = part = copy.deepcopy(part)
            mirror_hooks(child, part)
        for name, parameter in list(part._parameters.items()):
            # PEFT patches this call to create parameters on the meta device (`low_cpu_mem_usage`).
            part.register_parameter(name, parameter)
    return parts


def mirror_hooks(module: nn.Module, stand_in: nn.Module) -> None:
    """
    Makes the forward hooks of a module run when a stand-in is called, also those that are registered later. Users
    register hooks on the parts of the connector that they know, not on trained copies.
    """
    stand_in.register_forward_pre_hook(partial(_run_pre_hooks, module), with_kwargs=True)
    stand_in.register_forward_hook(partial(_run_hooks, module), with_kwargs=True)


def _run_pre_hooks(module: nn.Module, stand_in: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for key, hook in list(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            result = hook(module, args, kwargs)
            args, kwargs = (args, kwargs) if result is None else result
        else:
            result = hook(module, args)
            result = args if result is None else result
            args = result if isinstance(result, tuple) else (result,)
    return args, kwargs


def _run_hooks(
    module: nn.Module, stand_in: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    for key, hook in list(module._forward_hooks.items()):
        has_kwargs = key in module._forward_hooks_with_kwargs
        result = hook(module, args, kwargs, output) if has_kwargs else hook(module, args, output)
        output = output if result is None else result
    return output


def make_low_rank_parts(module: nn.Module, rank: int) -> dict[str, nn.Module]:
    """
    Makes a low-rank update B A for each linear layer of a module. It is zero at first, as in LoRA (B = 0).

    Returns:
        `dict[str, nn.Module]`: A and B of each linear layer, as "<path>.lora_A" and "<path>.lora_B".
    """
    parts: dict[str, nn.Module] = {}
    for path, linear in linear_layers(module).items():
        weight = getattr(linear, "weight", None)
        dtype = weight.dtype if is_plain(weight) else None
        down = nn.Linear(linear.in_features, rank, bias=False, dtype=dtype)
        up = nn.Linear(rank, linear.out_features, bias=False, dtype=dtype)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        parts |= {f"{path}.{DOWN}": down, f"{path}.{UP}": up}
    return parts


def assemble_trainable(module: nn.Module, parts: dict[str, nn.Module], path: str = "") -> nn.Module:
    """
    Makes a module that runs the code of another one with trained parts.

    Args:
        module (`nn.Module`):
            The frozen module, which is not changed.
        parts (`dict[str, nn.Module]`):
            The output of `copy_parts` or `make_low_rank_parts`.
        path (`str`, *optional*):
            Path of the module in the one that the parts were made of.

    Returns:
        `nn.Module`: A module that shares everything with the frozen one but the trained parts.
    """
    # Compiled code would use the frozen weights.
    module = uncompiled(module)
    if f"{path}.{DOWN}" in parts:
        return LowRankLinear(module, parts[f"{path}.{DOWN}"], parts[f"{path}.{UP}"])
    if isinstance(module, AuxiliaryTrainingWrapper):
        return assemble_trainable(own_module(module), parts, path)
    if isinstance(module, BaseTunerLayer):
        # The layer of another adapter, whose update is kept.
        assembled = bare_copy(module)
        if f"{path}.{DOWN}" not in parts:
            # Merging into the frozen weights does not change the copy.
            assembled.merged_adapters = list(module.merged_adapters)
        base_layer = assemble_trainable(module.base_layer, parts, path)
        assembled._modules = {**dict(base_children(module)), "base_layer": base_layer}
        mirror_hooks(module, assembled)
        return assembled
    children = dict(base_children(module))
    if path in parts and not children:
        return parts[path]
    has_parts = any(part == path or part.startswith(f"{path}." if path else "") for part in parts)
    if not has_parts and any(True for _ in (*module.parameters(), *module.buffers())):
        return module
    assembled = bare_copy(module)
    mirror_hooks(module, assembled)
    assembled._modules = {
        name: assemble_trainable(child, parts, f"{path}.{name}" if path else name) for name, child in children.items()
    }
    holder = parts.get(path, module)
    # Shared dictionaries, so that parameters can be replaced later.
    assembled._parameters, assembled._buffers = holder._parameters, holder._buffers
    fetching = FetchOffloadedWeights(holder)
    assembled.register_forward_pre_hook(fetching.before)
    assembled.register_forward_hook(fetching.behind)
    return assembled


class LowRankLinear(nn.Module):
    """
    A frozen linear layer with a low-rank update: W x + b + B A x.

    Args:
        linear (`nn.Linear`):
            The frozen layer.
        down (`nn.Linear`):
            The matrix A.
        up (`nn.Linear`):
            The matrix B.
    """

    def __init__(self, linear: nn.Linear, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        # Not a child: if the connector is a linear layer, it is adapted itself, and would call this module again.
        self.__dict__["linear"] = linear
        self.down = down
        self.up = up
        mirror_hooks(linear, self)

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        # `forward`, since the hooks of the linear layer run around this module.
        output = self.linear.forward(*args, **kwargs)
        (x,) = (*args, *kwargs.values())
        # Contiguous: otherwise torch multiplies in another order when the matrices require gradients.
        x = x.to(device_of(self.down), self.down.weight.dtype).contiguous()
        return output + self.up(self.down(x)).to(output)

    def __getattr__(self, name: str) -> Any:
        # Connectors read attributes of their linear layers, such as `weight.dtype` or `in_features`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "linear" or name.startswith("_"):
                raise
            return getattr(self.linear, name)
