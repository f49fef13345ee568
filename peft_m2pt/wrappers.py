"""Looks through what PEFT and torch.compile put around the modules of a model."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from .names import plain, uncompiled


def own_module(module: nn.Module) -> nn.Module:
    """
    The model's own module below adapters and torch.compile. Where an adapter has trained a module as a whole
    (`modules_to_save`), it is the one that is in use.

    Args:
        module (`nn.Module`):
            A module of the model, or what has taken its place.
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
    The model's own module of a path. What is compiled on the way need not be named.

    Raises:
        AttributeError: If there is none.
    """
    module = own_module(model)
    for name in filter(None, plain(path).split(".")):
        child = getattr(module, name)
        if not isinstance(child, nn.Module):
            raise AttributeError(f"'{path}' is no module.")
        module = own_module(child)
    return module


def trained_module(wrapper: AuxiliaryTrainingWrapper) -> nn.Module | None:
    """The module that an active adapter has trained in the place of another one, if there is such a module."""
    if not isinstance(wrapper, ModulesToSaveWrapper) or wrapper.disable_adapters:
        return None
    names = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return wrapper.modules_to_save[names[0]] if names else None


def training_wrappers(model: nn.Module) -> Iterator[AuxiliaryTrainingWrapper]:
    """Yields what stands in the places of modules that adapters have trained beside their own weights."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield module
