"""Whether, and how many, interaction prompts can go through the connector of a model."""

from __future__ import annotations

import inspect
import warnings

import torch
from torch import nn

from .anatomy import Connector, tower_width
from .config import M2PTConfig
from .errors import UnsupportedModelError
from .graft import shape_of
from .names import plain, uncompiled
from .towers import has_tower
from .wrappers import own_module, own_part


# The connector, by the last part of its module path.
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

# Model types in which every row of the connector's output is an image token, whatever the number of rows.
IMAGE_PLACEMENT = ("llava",)


def find_connector(model: nn.Module, config: M2PTConfig) -> Connector:
    """
    Finds the connector of a model, and how many rows of image features it makes one image token of.

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
            f"connector={path!r}: {type(model).__name__} has no module of this path."
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
    """Width of the input of the first linear layer, which is wider than the features if a model merged some before."""
    return [module.in_features for module in connector.modules() if hasattr(module, "in_features")][:1]


@torch.no_grad()
def _rows_per_token(connector: nn.Module, width: int, text_width: int) -> int | None:
    """Tries out how many rows of image features a connector makes one image token of, with its code but no weights."""
    connector = shape_of(connector)
    for rows_per_token in (1, 4, 9, 16):
        try:
            output = connector(torch.zeros(3, rows_per_token, width, device="meta"))
        except Exception:  # whatever a connector says of rows that do not suit it
            continue
        if isinstance(output, torch.Tensor) and output.shape[-1] == text_width and output.numel() == 3 * text_width:
            return rows_per_token
    return None


def resolve_interaction(model: nn.Module, config: M2PTConfig) -> tuple[int, Connector | None]:
    """
    Settles how many interaction prompts a model gets, and whether its connector is needed.

    Args:
        model (`nn.Module`):
            The model.
        config ([`M2PTConfig`]):
            Says what is wanted; `num_interaction_tokens=None` leaves it to the model.

    Returns:
        `tuple[int, Connector | None]`: The number of interaction prompts, and the connector if it is tuned or if
        interaction prompts go through it.

    Raises:
        UnsupportedModelError: If the config asks for interaction prompts that cannot go through the connector.
    """
    num_tokens = config.wanted_interaction_tokens
    if num_tokens == 0 and not config.tune_connector:
        return 0, None
    left_to_the_model = config.num_interaction_tokens is None
    try:
        connector = find_connector(model, config)
    except UnsupportedModelError as error:
        if config.connector is not None or (num_tokens > 0 and not left_to_the_model):
            raise
        if all(has_tower(model, kind, config) for kind in ("visual", "textual")):
            warnings.warn(f"{error.reason} There are no interaction prompts now, and the connector is not tuned.")
        return 0, None
    reason = _why_no_interaction(model, connector, config) if num_tokens > 0 else None
    if reason is not None:
        message = (
            f"Interaction prompts cannot go through the connector '{connector.path}' "
            f"({type(connector.module).__name__}): {reason}"
        )
        if not left_to_the_model:
            raise UnsupportedModelError(f"num_interaction_tokens={num_tokens}: {message}")
        warnings.warn(f"{message} There are none now; num_interaction_tokens=0 says so without this warning.")
        num_tokens = 0
    return num_tokens, connector if num_tokens > 0 or config.tune_connector else None


def _why_no_interaction(model: nn.Module, connector: Connector, config: M2PTConfig) -> str | None:
    if connector.rows_per_token is None:
        return "it does not make one image token of each row of image features, or of a fixed number of rows."
    if config.interaction_placement == "layers":
        return None
    model_config = getattr(model, "config", None)
    has_place = getattr(model_config, "model_type", None) in IMAGE_PLACEMENT
    if not has_place or model_config.vision_config.model_type == "pixtral":
        return (
            f"with interaction_placement='image' every image gets more tokens, which {type(model).__name__} cannot "
            f"place. Choose interaction_placement='layers'."
        )
    return None
