"""Finds the connector of a model, and how many rows of features it turns into one image token."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from ..config import M2PTConfig
from ..errors import UnsupportedModelError
from .compiled import plain, uncompiled
from .layers import tower_width
from .modules import own_module, own_part, shape_of
from .sites import Connector


# The last part of its module path.
CONNECTORS = (
    "multi_modal_projector",
    "connector",
    "aligner",
    "embed_vision",
    "merger",
    "mm_projector",
    "projector",
    "vision_projection",
)


def find_connector(model: nn.Module, config: M2PTConfig) -> Connector:
    """
    Finds the connector of a model, and how many rows of image features it turns into one image token.

    Args:
        model (`nn.Module`):
            A model with a vision encoder and a language model.
        config ([`M2PTConfig`]):
            May name the connector.

    Returns:
        [`Connector`]

    Raises:
        UnsupportedModelError: If there is none.
    """
    path = None if config.connector is None else plain(config.connector)
    if path is None:
        paths = (plain(path) for path, _ in model.named_modules())
        paths = (path for path in paths if path.rpartition(".")[2] in CONNECTORS)
        path = next(paths, None)
    if path is None:
        raise UnsupportedModelError(
            f"No connector was found in {type(model).__name__}. Name its module path with connector=..., or set "
            f"num_interaction_tokens=0 and tune_connector=False to do without it."
        )
    parent_path, _, name = path.rpartition(".")
    try:
        parent = own_part(model, parent_path)
        module = uncompiled(parent.get_submodule(name))
    except AttributeError:
        raise UnsupportedModelError(
            f"connector={path!r}: {type(model).__name__} has no module at this path."
        ) from None
    layers = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    num_layers = len(layers) if isinstance(layers, (list, tuple)) else 1
    widths = [num_layers * tower_width(model, "visual", config), *_widths_of_linears(module)]
    text_width = tower_width(model, "textual", config)
    argument_names = tuple(inspect.signature(type(own_module(module)).forward).parameters)[1:]
    for width in dict.fromkeys(widths):
        if rows_per_token := _rows_per_token(module, width, text_width):
            return Connector(path, parent, name, width, rows_per_token, argument_names)
    return Connector(path, parent, name, widths[0], None, argument_names)


def _widths_of_linears(connector: nn.Module) -> list[int]:
    """Input width of the first linear layer, greater than that of the features if the model has merged some before."""
    return [module.in_features for module in connector.modules() if hasattr(module, "in_features")][:1]


@torch.no_grad()
def _rows_per_token(connector: nn.Module, width: int, text_width: int) -> int | None:
    """Tries how many rows of features become one image token, by running the connector on the meta device."""
    connector = shape_of(connector)
    for rows_per_token in (1, 4, 9, 16):
        try:
            output = connector(torch.zeros(3, rows_per_token, width, device="meta"))
        except Exception:  # whatever a connector raises for a number of rows that does not suit it
            continue
        if isinstance(output, torch.Tensor) and output.shape[-1] == text_width and output.numel() == 3 * text_width:
            return rows_per_token
    return None
