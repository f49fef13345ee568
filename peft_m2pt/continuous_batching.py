"""
Refuses continuous batching, whose paged cache holds keys and values of several requests, out of reach of prompts.

An attention module refuses a paged cache too, but in the worker thread, where requests have been taken already.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .errors import UnsupportedModelError
from .layer import M2PTAttention
from .upstream import CONTINUOUS_BATCHING


class RefuseContinuousBatching:
    """
    Lets a model refuse continuous batching while it has textual prompts in use, before a request is taken.

    Args:
        model (`transformers.PreTrainedModel`):
            The model. An attribute of its own takes the place of the method of its class, until `remove` is called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        setattr(model, CONTINUOUS_BATCHING, partial(_init_continuous_batching, model))

    def remove(self) -> None:
        """Gives the model back its method."""
        vars(self.model).pop(CONTINUOUS_BATCHING, None)


def refuse_continuous_batching(model: nn.Module) -> list[RefuseContinuousBatching]:
    """
    Prepares a model for the refusal of continuous batching.

    Args:
        model (`nn.Module`):
            The model.

    Returns:
        `list[RefuseContinuousBatching]`: What takes the preparation away. Empty if the model has no continuous
        batching, or is prepared already.
    """
    is_needed = hasattr(type(model), CONTINUOUS_BATCHING) and CONTINUOUS_BATCHING not in vars(model)
    return [RefuseContinuousBatching(model)] if is_needed else []


def _init_continuous_batching(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    for path, module in model.named_modules():
        if isinstance(module, M2PTAttention) and module.site.kind == "textual" and module.is_active:
            raise UnsupportedModelError(
                f"{type(model).__name__} has M2PT prompts in use at '{path}', which continuous batching cannot reach: "
                f"its paged cache holds keys and values of several requests. Use generate(...) instead of continuous "
                f"batching, or disable the adapter."
            )
    return getattr(type(model), CONTINUOUS_BATCHING)(model, *args, **kwargs)
