"""Looks through torch.compile's wrappers around parts of a model, among its modules and in names."""

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


def rebind_compiled(model: nn.Module) -> None:
    """
    Makes torch.compile's wrappers look up again what they call: each keeps the bound method that it found.

    Args:
        model (`nn.Module`):
            A model of which modules have been adapted or released.
    """
    for module in model.modules():
        if COMPILED in module._modules:
            module._initialize()
