"""
Methods of a model that would fail halfway while it has prompts, and are refused from the start.

When PEFT unloads or merges another method, it skips everything inside of a module adapted by M2PT.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from torch import nn

from ..layers.base import M2PTLayer


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
