"""Names of adapters, and of weights in checkpoints, which do not depend on wrappers around the model."""

from __future__ import annotations

import re

from peft import PeftModel
from torch import nn

from ..layers.mixed_batch import BASE


WRAPPER_PREFIX = "base_model.model."


def wrapper_prefix(model: nn.Module) -> str:
    """The prefix of weight names in a model with any number of nested `PeftModel`s."""
    prefix = ""
    while isinstance(model, PeftModel):
        prefix += WRAPPER_PREFIX
        model = model.get_base_model()
    return prefix


def without_prefix(name: str) -> str:
    """The name of a weight in the model itself, so that checkpoints do not depend on stacking."""
    return re.sub(rf"^({re.escape(WRAPPER_PREFIX)})+", "", name)


def check_name(adapter_name: str) -> None:
    """
    Checks the name of an adapter.

    Raises:
        ValueError: If an adapter cannot have this name.
    """
    if not adapter_name or "." in adapter_name or adapter_name == BASE or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r}: an adapter cannot have this name. Names must not contain dots or be "
            f"attributes of torch.nn.ModuleDict, such as 'keys', and {BASE!r} stands for no adapter."
        )
