"""Strips torch.compile's wrappers from modules and from their names."""

from __future__ import annotations

from torch import nn


# The name of the compiled module in torch's wrapper.
COMPILED = "_orig_mod"


def plain(name: str) -> str:
    """The name that a module or weight has in the model without compilation."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper, or the module itself if it has none."""
    return module._modules.get(COMPILED, module)


def rebind_compiled(model: nn.Module) -> None:
    """
    Makes torch.compile's wrappers call what their modules have become: each holds a bound method.

    Args:
        model (`nn.Module`):
            A model whose modules have been adapted or released.
    """
    for module in model.modules():
        if COMPILED in module._modules:
            module._initialize()
