"""Explains errors about the number of image tokens if interaction prompts are among them."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..layers.connector import M2PTConnector


def explain_image_tokens(model: nn.Module, layer: M2PTConnector) -> list[RemovableHandle]:
    """
    Adds a note to errors about the number of image tokens that says how to prepare the processor.

    Args:
        model (`nn.Module`):
            The model.
        layer ([`~peft_m2pt.layers.connector.M2PTConnector`]):
            Its connector, with interaction prompts in front of the features of each image.
    """
    return [model.register_forward_hook(partial(_explain, layer), always_call=True)]


def _explain(layer: M2PTConnector, *args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    # `always_call` hooks run while the error is being handled.
    error = sys.exc_info()[1]
    if not isinstance(error, ValueError) or "image tokens" not in str(error) or hasattr(error, "__notes__"):
        return
    prompts = layer.m2pt_interaction
    names = [] if layer.disable_adapters else layer.active_adapters
    num_prompts = sum(len(prompts[name]) for name in names if name in prompts)
    if num_prompts > 0:
        config = "is the M2PTConfig of the active adapter"
    else:
        config = "has interaction_placement='layers', which resets the processor"
    error.add_note(
        f"Each image needs {num_prompts} more tokens than it has features, for the interaction prompts of the active "
        f"adapter. Prepare the processor with peft_m2pt.adapt_processor(processor, config), where config {config}."
    )
