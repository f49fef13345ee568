"""Modules of a model without the wrappers of PEFT and torch.compile, and facts about them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..adapted import base_children, base_modules, without_adapters
from ..upstream import offloaded_to
from .compiled import plain, uncompiled


def own_module(module: nn.Module) -> nn.Module:
    """
    The model's own module inside wrappers of PEFT and torch.compile; of `modules_to_save`, the one in use.

    Args:
        module (`nn.Module`):
            A module of the model, or a wrapper around one.
    """
    while True:
        module = uncompiled(module)
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = trained_module(module) or module.original_module
        else:
            return module


def own_part(model: nn.Module, path: str) -> nn.Module:
    """
    The model's own module at a path, which need not name wrappers.

    Raises:
        AttributeError: If there is none.
    """
    module = own_module(model)
    for name in filter(None, plain(path).split(".")):
        child = getattr(module, name)
        if not isinstance(child, nn.Module):
            raise AttributeError(f"'{path}' is not a module.")
        module = own_module(child)
    return module


def trained_module(wrapper: AuxiliaryTrainingWrapper) -> nn.Module | None:
    """The copy in `modules_to_save` of the active adapter, if there is one."""
    if not isinstance(wrapper, ModulesToSaveWrapper) or wrapper.disable_adapters:
        return None
    names = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return wrapper.modules_to_save[names[0]] if names else None


def training_wrappers(model: nn.Module) -> Iterator[AuxiliaryTrainingWrapper]:
    """Yields PEFT's wrappers around modules that adapters have trained besides their own weights."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield module


def shape_of(module: nn.Module) -> nn.Module:
    """
    Copies a module with weights on the meta device, all floating-point ones in float32, to compute shapes whatever
    form the weights have.

    Returns:
        `nn.Module`
    """
    module = uncompiled(module)
    if is_linear(module):
        return nn.Linear(module.in_features, module.out_features, device="meta")
    twin = bare_copy(module)
    twin._parameters = {name: _shape_of_tensor(weight) for name, weight in module._parameters.items()}
    twin._buffers = {name: _shape_of_tensor(buffer) for name, buffer in module._buffers.items()}
    twin._modules = {name: shape_of(child) for name, child in base_children(module)}
    return twin


def _shape_of_tensor(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    # A weight that DeepSpeed has partitioned is empty.
    shape = getattr(tensor, "ds_shape", tensor.shape)
    return torch.empty(shape, dtype=None if tensor.is_floating_point() else tensor.dtype, device="meta")


def own_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields path and module of a module and all inside it, without the wrappers and weights of adapters."""
    module = own_module(module)
    yield path, module
    for name, child in base_children(module):
        yield from own_modules(child, f"{path}.{name}" if path else name)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, quantized or not. Those of BitNet contain a norm."""
    if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
        return False
    return not any(hasattr(child, "in_features") for child in module.children())


def linear_layers(module: nn.Module) -> dict[str, Any]:
    """The linear layers of a module, by path, without the weights of adapters."""
    return {path: child for path, child in own_modules(module) if is_linear(child)}


def quantized_linears(module: nn.Module) -> list[str]:
    """Lists the paths of linear layers in a module whose weight is not a plain floating-point parameter."""
    weights = {path: getattr(linear, "weight", None) for path, linear in linear_layers(module).items()}
    return [path for path, weight in weights.items() if not (isinstance(weight, nn.Parameter) and is_plain(weight))]


def is_plain(weight: torch.Tensor | None) -> bool:
    # Quantized weights of torchao call themselves floating-point.
    is_of_torch = type(weight).__module__.partition(".")[0] == "torch"
    return isinstance(weight, torch.Tensor) and is_of_torch and weight.is_floating_point()


def bare_copy(module: nn.Module) -> nn.Module:
    """A shallow copy without hooks and accelerate's wrapper of `forward`, which would call the original."""
    twin = without_adapters(copy.copy(module))
    for name in ("forward", "_old_forward", "_hf_hook"):
        twin.__dict__.pop(name, None)
    twin.__dict__.update({name: type(hooks)() for name, hooks in vars(twin).items() if "_hooks" in name})
    return twin


def own_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """
    Yields the parameters of a module and then its buffers, in which quantized layers may keep their weights; not those
    of its children.
    """
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """
    The floating-point type in which a module computes: that of its first floating-point parameter, or else buffer.

    Returns:
        `torch.dtype`, or `None` if it has no floating-point tensors.
    """
    holders = list(base_modules(module))
    for tensors in (nn.Module.parameters, nn.Module.buffers):
        for holder in holders:
            for tensor in tensors(holder, recurse=False):
                if tensor.is_floating_point():
                    return tensor.dtype
    return None


def device_of(module: nn.Module) -> torch.device | None:
    """
    The device on which a module starts to compute: that of its first tensor, or where it is fetched to if offloaded.

    Returns:
        `torch.device`, or `None` if it has no tensors.
    """
    for holder in base_modules(module):
        for tensor in own_tensors(holder):
            return offloaded_to(holder) or tensor.device
    return None
