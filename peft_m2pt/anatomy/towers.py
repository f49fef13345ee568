"""Finds the towers of a multimodal model: its image or audio encoder, and its language model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from ..config import M2PTConfig
from ..errors import UnsupportedModelError
from .compiled import plain
from .modules import own_module, own_part


Kind = Literal["visual", "textual"]


FIELDS = {"visual": "vision_encoder", "textual": "text_decoder"}


TOWERS = {"visual": "vision encoder", "textual": "language model"}


# Names of encoders that `get_encoder` does not find.
VISION_ENCODERS = ("vision_tower", "vision_model", "image_encoder", "img_processor")


def find_tower(model: nn.Module, kind: Kind, config: M2PTConfig) -> tuple[str, nn.Module]:
    """
    Finds the vision encoder ("visual") or the language model ("textual").

    In models for audio, the audio encoder takes the place of the vision encoder.

    Returns:
        `tuple[str, nn.Module]`: Its module path and the module.

    Raises:
        UnsupportedModelError: If it is not found.
    """
    field = FIELDS[kind]
    path = getattr(config, field)
    if path is not None:
        try:
            return plain(path), own_part(model, path)
        except AttributeError:
            raise UnsupportedModelError(
                f"{field}={path!r}: {type(model).__name__} has no module at this path."
            ) from None

    tower = _look_up_tower(model, kind)
    if tower is None:
        raise UnsupportedModelError(
            f"No {TOWERS[kind]} was found in {type(model).__name__}. Name its module path with {field}=..., or set "
            f"num_{kind}_tokens=0 to do without {kind} prompts."
        )
    return plain(next(path for path, module in model.named_modules() if module is tower)), tower


def has_tower(model: nn.Module, kind: Kind, config: M2PTConfig) -> bool:
    """Whether a model has a vision encoder ("visual") or a language model ("textual")."""
    return getattr(config, FIELDS[kind]) is not None or _look_up_tower(model, kind) is not None


def _look_up_tower(model: nn.Module, kind: Kind) -> nn.Module | None:
    if not isinstance(model, PreTrainedModel):
        return None
    return _look_up_encoder(model) if kind == "visual" else _look_up_decoder(model)


def _look_up_encoder(model: PreTrainedModel) -> nn.Module | None:
    for modality in ("image", "audio"):
        encoder = _descend(model, lambda module: _get_encoder(module, modality))
        if encoder is not model:
            return encoder
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in VISION_ENCODERS:
            return own_module(module)
    if model.main_input_name == "input_ids":
        return None
    # An encoder alone, or that of an encoder-decoder.
    return model if _look_up_decoder(model) is None else model.get_encoder()


def _get_encoder(model: PreTrainedModel, modality: str) -> nn.Module | None:
    # The `get_encoder` of encoder-decoders has no modality.
    knows_modalities = "modality" in inspect.signature(model.get_encoder).parameters
    return model.get_encoder(modality=modality) if knows_modalities else None


def _look_up_decoder(model: PreTrainedModel) -> nn.Module | None:
    decoder = _descend(model, lambda module: module.get_decoder())
    reads_text = getattr(decoder, "main_input_name", "input_ids") == "input_ids"
    return decoder if reads_text else None


def _descend(model: PreTrainedModel, step: Callable[[PreTrainedModel], nn.Module | None]) -> nn.Module:
    """
    Asks a model for a tower, the tower for one inside it, and so on, until one has none or returns itself.

    Stops at an encoder-decoder, whose encoder and decoder both read text.
    """
    module = model
    while isinstance(module, PreTrainedModel):
        inner = step(module)
        if inner is None or inner is module:
            break
        module = own_module(inner)
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            break
    return module
