"""Parts of a model that are compiled: what is inside of torch.compile's wrapper, and what it is called without."""

from __future__ import annotations

from torch import nn


# The name of what is compiled in torch's wrapper around it.
COMPILED = "_orig_mod"


def plain(name: str) -> str:
    """The name that a module or weight has in the model if none of its parts is compiled."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def uncompiled(module: nn.Module) -> nn.Module:
    """What is inside of torch.compile's wrapper around a module. Any other module is returned as it is."""
    return module._modules.get(COMPILED, module)


def call_anew(model: nn.Module) -> None:
    """
    Lets torch.compile's wrappers call the modules in them as these are now.

    Args:
        model (`nn.Module`):
            A model of which modules have been adapted, or released. A wrapper keeps the method that it found to call.
    """
    for module in model.modules():
        if COMPILED in module._modules:
            module._initialize()
