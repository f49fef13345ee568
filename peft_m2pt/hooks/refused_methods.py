"""
Methods of a model that would fail halfway while it has prompts, and are refused from the start.

Continuous batching keeps keys and values of several requests in a paged cache, out of reach of prompts. Attention
modules refuse such a cache too, but only in the worker thread, after requests were accepted. When PEFT unloads or
merges another method, it skips everything inside of a module adapted by M2PT.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from torch import nn

from ..errors import UnsupportedModelError
from ..layers.attention import M2PTAttention
from ..layers.base import M2PTLayer
from ..upstream import CONTINUOUS_BATCHING


# PEFT calls this method of a module, if there is one, to unload it. The first module is the model itself.
UNLOADING = "unload_and_optionally_merge_module"


class ReplacedMethod:
    """
    Replaces a method of one object until `remove` is called.

    Args:
        owner (`Any`):
            The object.
        name (`str`):
            Name of the method.
        function (`Callable`):
            The replacement.
    """

    def __init__(self, owner: Any, name: str, function: Callable) -> None:
        self.owner = owner
        self.name = name
        setattr(owner, name, function)

    def remove(self) -> None:
        """Restores the method of the class."""
        vars(self.owner).pop(self.name, None)


def refuse_continuous_batching(model: nn.Module) -> list[ReplacedMethod]:
    """
    Makes a model refuse continuous batching while textual prompts are active.

    Returns:
        `list[ReplacedMethod]`: The handle. Empty if the model has no continuous batching, or refuses it already.
    """
    is_needed = hasattr(type(model), CONTINUOUS_BATCHING) and CONTINUOUS_BATCHING not in vars(model)
    function = partial(_init_continuous_batching, model)
    return [ReplacedMethod(model, CONTINUOUS_BATCHING, function)] if is_needed else []


def _init_continuous_batching(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    for path, module in model.named_modules():
        if isinstance(module, M2PTAttention) and module.site.kind == "textual" and module.is_active:
            raise UnsupportedModelError(
                f"{type(model).__name__} has active M2PT prompts at '{path}', which continuous batching does not "
                f"support: its paged cache holds keys and values of several requests. Use generate(...) instead, or "
                f"disable the adapter."
            )
    return getattr(type(model), CONTINUOUS_BATCHING)(model, *args, **kwargs)


def refuse_unloading(model: nn.Module, layer: M2PTLayer) -> list[ReplacedMethod]:
    """
    Makes a model refuse to unload or merge another method while it has prompts.

    Returns:
        `list[ReplacedMethod]`: The handle. Empty if the model refuses it already.
    """
    function = partial(_refuse_unloading, layer.site.path)
    return [] if UNLOADING in vars(model) else [ReplacedMethod(model, UNLOADING, function)]


def _refuse_unloading(path: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError(
        f"The model has weights of M2PT, for example at '{path}', and PEFT would skip the weights of other methods "
        f"there. Nothing has been changed. Call unload() on the model with M2PT first."
    )
