"""
Where a multimodal model keeps its parts.

What can be derived from the model is derived; the tables below hold the rest. Nothing here changes the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from .attention import check_implementation, find_attention_call
from .config import M2PTConfig
from .errors import UnsupportedModelError


Kind = Literal["visual", "textual"]

# The norm whose output is the attention's input, by its name in the block that holds both.
NORMS = ("input_layernorm", "layer_norm1", "attention_norm")

FIELDS = {"visual": "vision_encoder", "textual": "text_decoder"}
TOWERS = {"visual": "vision encoder", "textual": "language model"}


@dataclass(frozen=True)
class Site:
    """
    A self-attention module that gets prompts.

    Args:
        kind (`str`):
            "visual" or "textual".
        path (`str`):
            Module path in the model.
        layer (`int`):
            Index of the layer in its tower.
        attention (`nn.Module`):
            The attention module itself.
        block (`nn.Module`):
            The module that holds the attention and its norm.
        norm (`str`):
            Name of that norm in the block.
        width (`int`):
            Width D of the layer's input, and so of its prompts.
        rotary (`nn.Module`, *optional*):
            Computes position embeddings from position ids. `None` where prompts have no position.
        connector ([`Connector`], *optional*):
            What brings interaction prompts to the layer. `None` where there are none.
    """

    kind: Kind
    path: str
    layer: int
    attention: nn.Module
    block: nn.Module
    norm: str
    width: int
    rotary: nn.Module | None
    connector: Connector | None = None


@dataclass(frozen=True)
class Connector:
    """
    The module that brings image features to the language model.

    Args:
        path (`str`):
            Module path in the model.
        parent (`nn.Module`):
            The module that holds it.
        name (`str`):
            Its name in the parent.
        width (`int`):
            Width of a row of its input.
        rows_per_token (`int`, *optional*):
            How many rows become one image token. `None` if there is no such number.
    """

    path: str
    parent: nn.Module
    name: str
    width: int
    rows_per_token: int | None

    kind: ClassVar[str] = "interaction"

    @property
    def module(self) -> nn.Module:
        """The connector, or what has taken its place."""
        return getattr(self.parent, self.name)

    @property
    def argument_names(self) -> list[str]:
        """Names of the arguments of its `forward`. The first are the image features."""
        module = self.module
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        return list(inspect.signature(type(module).forward).parameters)[1:]

    def grouped(self, rows: torch.Tensor) -> torch.Tensor:
        """Arranges rows as a batch of one image token each, `(num_tokens, rows_per_token, width)`."""
        return rows.reshape(-1, self.rows_per_token, self.width)


def find_sites(model: nn.Module, config: M2PTConfig) -> list[Site]:
    """
    Finds the self-attention modules that get prompts, in the order of the model.

    Args:
        model (`nn.Module`):
            A model with a vision encoder and a language model. It may carry adapters already.
        config ([`M2PTConfig`]):
            Says which kinds of prompts are wanted, and in which layers.

    Returns:
        `list[Site]`: The visual sites, then the textual ones.

    Raises:
        UnsupportedModelError: If a tower is not found or has attention that cannot be adapted.
        ValueError: If the config asks for layers that do not exist, or that have no influence on the output.
    """
    sites = []
    if config.num_visual_tokens > 0:
        sites += _tower_sites(model, "visual", config)
    if config.num_textual_tokens > 0 or (config.num_interaction_tokens and config.interaction_placement == "layers"):
        sites += _tower_sites(model, "textual", config)
    return sites


def find_tower(model: nn.Module, kind: Kind, config: M2PTConfig) -> tuple[str, nn.Module]:
    """
    Finds the vision encoder ("visual") or the language model ("textual").

    Returns:
        `tuple[str, nn.Module]`: Its module path in the model and the module.

    Raises:
        UnsupportedModelError: If it is not found.
    """
    field = FIELDS[kind]
    path = getattr(config, field)
    if path is not None:
        try:
            return path, model.get_submodule(path)
        except AttributeError:
            raise UnsupportedModelError(
                f"{field}={path!r}: {type(model).__name__} has no module of this path."
            ) from None

    tower = _look_up_tower(model, kind)
    if tower is None:
        raise UnsupportedModelError(
            f"No {TOWERS[kind]} was found in {type(model).__name__}. Name its module path with {field}=..., or set "
            f"num_{kind}_tokens=0 to do without {kind} prompts."
        )
    return next(path for path, module in model.named_modules() if module is tower), tower


def has_tower(model: nn.Module, kind: Kind, config: M2PTConfig) -> bool:
    """Whether a model has a vision encoder ("visual") or a language model ("textual")."""
    return getattr(config, FIELDS[kind]) is not None or _look_up_tower(model, kind) is not None


def _look_up_tower(model: nn.Module, kind: Kind) -> nn.Module | None:
    """Asks transformers for a tower. It answers with the model itself where it knows of none."""
    if not isinstance(model, PreTrainedModel):
        return None
    encoder = model.get_encoder(modality="image")
    if kind == "visual":
        return encoder if encoder is not model or model.main_input_name == "pixel_values" else None
    decoder = model.get_decoder()
    if decoder is model and model.main_input_name != "input_ids":
        return None
    holds_encoder = encoder is not model and any(module is encoder for module in decoder.modules())
    return None if holds_encoder else decoder


def _tower_sites(model: nn.Module, kind: Kind, config: M2PTConfig) -> list[Site]:
    tower_path, tower = find_tower(model, kind, config)
    sites: dict[int, Site] = {}
    for path, attention in _attention_modules(tower, tower_path):
        layer = _layer_index(path.removeprefix(tower_path), default=len(sites))
        if layer in sites:
            raise UnsupportedModelError(
                f"Layer {layer} of the {TOWERS[kind]} has two attention modules, '{sites[layer].path}' and '{path}'. "
                f"Set num_{kind}_tokens=0 to do without {kind} prompts, or name another module path with "
                f"{FIELDS[kind]}=...."
            )
        if any(site.attention is attention for site in sites.values()):
            raise UnsupportedModelError(
                f"The attention '{path}' is shared by several layers of the {TOWERS[kind]}, which therefore cannot "
                f"have prompts of their own. Set num_{kind}_tokens=0 to do without {kind} prompts."
            )
        sites[layer] = _site(model, kind, tower, path, layer, attention)
    if not sites:
        raise UnsupportedModelError(
            f"The {TOWERS[kind]} '{tower_path}' ({type(tower).__name__}) has no self-attention that calls the "
            f"attention interface of transformers, by which M2PT reaches keys and values. Name another module path "
            f"with {FIELDS[kind]}=..., or set num_{kind}_tokens=0 to do without {kind} prompts."
        )
    live = list(sites)
    if kind == "visual":
        end = _first_dead_layer(model, num_layers=max(live) + 1)
        live = [layer for layer in live if layer < end]
    return [sites[layer] for layer in _choose_layers(config, kind, live, all_layers=list(sites))]


def _layer_index(path: str, default: int) -> int:
    """The first number in a module path, which is the layer's index."""
    return next((int(part) for part in path.split(".") if part.isdigit()), default)


def _first_dead_layer(model: nn.Module, num_layers: int) -> int:
    """
    The first vision layer whose output the model does not read.

    `vision_feature_layer` counts hidden states: 0 is the input of the first layer, -1 the output of the last.
    """
    feature_layers = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    if feature_layers is None:
        return num_layers
    feature_layers = [feature_layers] if isinstance(feature_layers, int) else feature_layers
    return max(layer % (num_layers + 1) for layer in feature_layers)


def _choose_layers(config: M2PTConfig, kind: Kind, live: list[int], all_layers: list[int]) -> list[int]:
    field = f"{kind}_layers"
    choice = getattr(config, field)
    if choice is None:
        chosen = live
    elif isinstance(choice, str):
        half = len(live) // 2
        chosen = {
            "first": live[:1],
            "odd": [layer for layer in live if layer % 2 == 1],
            "bottom_half": live[:half],
            "top_half": live[half:],
        }[choice]
    else:
        chosen = [live[i] if -len(live) <= i < 0 else i for i in choice]
        for asked, layer in zip(choice, chosen):
            if layer in live:
                continue
            dead = "has no influence on the output (see vision_feature_layer in the model's config)"
            raise ValueError(
                f"{field}={choice}: layer {asked} of the {TOWERS[kind]} "
                f"{dead if layer in all_layers else 'does not exist or has no self-attention'}. Choose from {live}."
            )
    if not chosen:
        raise ValueError(
            f"{field}={choice!r} chooses none of the layers of the {TOWERS[kind]} that have an influence on the "
            f"output, which are {live}. Choose other layers, or set num_{kind}_tokens=0."
        )
    return sorted(set(chosen))


def _site(model: nn.Module, kind: Kind, tower: nn.Module, path: str, layer: int, attention: nn.Module) -> Site:
    check_implementation(attention, path)
    block = model.get_submodule(path.rpartition(".")[0])
    norm = next((name for name in NORMS if isinstance(getattr(block, name, None), nn.Module)), None)
    if norm is None:
        raise UnsupportedModelError(
            f"The norm in front of the attention '{path}' was not found in its block ({type(block).__name__}), which "
            f"has none of {NORMS}. Set num_{kind}_tokens=0 to do without {kind} prompts."
        )
    rotary = getattr(tower, "rotary_emb", None) if kind == "textual" else None
    needs_rotary = "position_embeddings" in inspect.signature(type(attention).forward).parameters
    if kind == "textual" and needs_rotary and rotary is None:
        raise UnsupportedModelError(
            f"The attention '{path}' takes position embeddings, but the {TOWERS[kind]} ({type(tower).__name__}) has "
            f"no `rotary_emb` to compute them. Set num_{kind}_tokens=0 to do without {kind} prompts, or name another "
            f"module path with {FIELDS[kind]}=...."
        )
    return Site(kind, path, layer, attention, block, norm, attention.config.hidden_size, rotary)


def _attention_modules(tower: nn.Module, tower_path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields path and module of each attention of a tower, seen through the wrappers of PEFT."""
    recorded = _recorded_attention_classes(tower)

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        if not isinstance(module, PreTrainedModel) and find_attention_call(type(module)):
            yield path, module
        elif isinstance(module, recorded):
            raise UnsupportedModelError(
                f"The attention '{path}' ({type(module).__name__}) goes round the attention interface of "
                f"transformers, so its keys and values are out of reach. Leave out this part of the model with "
                f"num_visual_tokens=0 or num_textual_tokens=0, or name another module path with vision_encoder=... or "
                f"text_decoder=...."
            )
        else:
            for name, child in module.named_children():
                yield from walk(child, f"{path}.{name}" if path else name)

    return walk(tower, tower_path)


def _recorded_attention_classes(tower: nn.Module) -> tuple[type, ...]:
    """The classes whose attention weights transformers records for the tower, where it says so."""
    classes: list[type] = []
    for module in tower.modules():
        specs = (getattr(module, "_can_record_outputs", None) or {}).get("attentions", [])
        for spec in specs if isinstance(specs, list) else [specs]:
            target = getattr(spec, "target_class", spec)
            if isinstance(target, type):
                classes.append(target)
    return tuple(classes)
