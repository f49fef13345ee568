"""Finds the layers of a tower and their self-attention modules, or refuses the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from ..config import M2PTConfig
from ..errors import UnsupportedModelError
from ..upstream import recorded_attention_classes
from .arguments import Role, check_signature, read_signature
from .attention_calls import find_attention_call
from .forward_code import first_child_on_input
from .modules import own_module
from .norms import find_input
from .rotary import find_rotary
from .sites import Site
from .towers import FIELDS, TOWERS, Kind, find_tower


# Parts of a tower whose output goes through a threshold, which stops gradients (NeMo SpeechLM).
HARD_DECISIONS = ("diarization_model",)


def find_sites(model: nn.Module, config: M2PTConfig) -> list[Site]:
    """
    Finds the self-attention modules that get prompts, in the order of the model.

    Args:
        model (`nn.Module`):
            A model with a vision encoder and a language model, with or without adapters.
        config ([`M2PTConfig`]):
            The config, which says which prompts there are and in which layers.

    Returns:
        `list[Site]`: The visual sites, then the textual ones.

    Raises:
        UnsupportedModelError: If a tower is not found or has attention that cannot be adapted, or if the model is
            compiled.
        ValueError: If the config asks for layers that do not exist, or that have no influence on the output.
    """
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            "torch.compile has wrapped the model and hides its parts. Adapt the model first, and compile what "
            "get_peft_model returns."
        )
    kinds: list[Kind] = []
    if config.num_visual_tokens > 0:
        kinds.append("visual")
    if config.num_textual_tokens > 0 or (config.num_interaction_tokens and config.interaction_placement == "layers"):
        kinds.append("textual")
    found = []
    for kind in kinds:
        sites, live = find_layers(model, kind, config)
        found += [sites[layer] for layer in _choose_layers(config, kind, live, all_layers=list(sites))]
    return found


def tower_width(model: nn.Module, kind: Kind, config: M2PTConfig) -> int:
    """
    The width of the vision encoder ("visual") or the language model ("textual").

    Raises:
        UnsupportedModelError: If the tower is not found, or nothing in it tells its width.
    """
    path, tower = find_tower(model, kind, config)
    attention = next((attention for _, attention in _attention_modules(tower, path)), None)
    width = None if attention is None else _width(attention)
    if width is None:
        raise UnsupportedModelError(
            f"The width of '{path}' ({type(tower).__name__}) is not known, and so neither is that of the connector. "
            f"Set num_interaction_tokens=0 and tune_connector=False."
        )
    return width


def find_layers(model: nn.Module, kind: Kind, config: M2PTConfig) -> tuple[dict[int, Site], list[int]]:
    """
    Finds the layers of a tower that have self-attention, and which of them are live: the model reads their output.

    Args:
        model (`nn.Module`):
            The model.
        kind (`str`):
            "visual" for the vision encoder, "textual" for the language model.
        config ([`M2PTConfig`]):
            May name the tower.

    Returns:
        `tuple[dict[int, Site], list[int]]`: The site of each layer by its index, and the indices of the live layers.

    Raises:
        UnsupportedModelError: If the tower is not found or has attention that cannot be adapted.
    """
    tower_path, tower = find_tower(model, kind, config)
    remedy = (
        f"Set num_{kind}_tokens=0 to do without {kind} prompts, or name another module path with {FIELDS[kind]}=...."
    )
    sites: dict[int, Site] = {}
    left_out: list[str] = []
    for layer, path, attention in _layers(tower, tower_path):
        site = _site(model, kind, path, layer, attention, remedy)
        if site is None:
            left_out.append(path)
            continue
        if layer in sites:
            raise UnsupportedModelError(
                f"Layer {layer} of the {TOWERS[kind]} has two attention modules, '{sites[layer].path}' and '{path}'. "
                f"{remedy}"
            )
        if any(site.attention is attention for site in sites.values()):
            raise UnsupportedModelError(
                f"The attention '{path}' is shared by several layers of the {TOWERS[kind]}, so these cannot have "
                f"prompts of their own. Set num_{kind}_tokens=0 to do without {kind} prompts."
            )
        sites[layer] = site
    if not sites and left_out:
        raise UnsupportedModelError(
            f"The {TOWERS[kind]} '{tower_path}' ({type(tower).__name__}) has no layer with self-attention and keys of "
            f"its own. For example, '{left_out[0]}' counts as cross-attention, since the code around it can pass it "
            f"another sequence, or it shares the keys of another layer. Name another module path with "
            f"{FIELDS[kind]}=..., or set num_{kind}_tokens=0 to do without {kind} prompts."
        )
    if not sites:
        raise UnsupportedModelError(
            f"The {TOWERS[kind]} '{tower_path}' ({type(tower).__name__}) has no layer with self-attention that uses "
            f"the attention interface of transformers, by which M2PT reaches keys and values. Name another module "
            f"path with {FIELDS[kind]}=..., or set num_{kind}_tokens=0 to do without {kind} prompts."
        )
    live = list(sites)
    if kind == "visual":
        end = _first_dead_layer(model, num_layers=max(live) + 1)
        live = [layer for layer in live if layer < end]
    return sites, live


def _layers(tower: nn.Module, tower_path: str) -> Iterator[tuple[int, str, nn.Module]]:
    """
    Yields layer index, path and module of each attention in the layers of a tower.

    A layer is an element of a list of modules; a pooling head, for example, is none. Layers of several lists are
    numbered consecutively.
    """
    offsets: dict[str, int] = {}
    num_layers = 0
    for path, attention in _attention_modules(tower, tower_path):
        parts = path.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if place is None:
            continue
        stack, index = ".".join(parts[:place]), int(parts[place])
        offset = offsets.setdefault(stack, num_layers)
        num_layers = max(num_layers, offset + index + 1)
        yield offset + index, path, attention


def _first_dead_layer(model: nn.Module, num_layers: int) -> int:
    """
    The first vision layer whose output the model does not read.

    `vision_feature_layer` counts hidden states: 0 is the input of the first layer, -1 the output of the last.
    """
    config = getattr(model, "config", None)
    vision_config = getattr(config, "vision_config", None)
    feature_layers = getattr(config, "vision_feature_layer", getattr(vision_config, "feature_layer", None))
    if feature_layers is None or feature_layers == []:
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


def _site(model: nn.Module, kind: Kind, path: str, layer: int, attention: nn.Module, remedy: str) -> Site | None:
    """The site of a layer's attention. `None` if its keys and values do not come from its own input."""
    if getattr(attention, "is_kv_shared_layer", False):
        return None
    input_ = find_input(model, path, remedy)
    if input_ is None:
        return None
    check_signature(attention, path, remedy)
    if any(isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for module in attention.modules()):
        raise UnsupportedModelError(
            f"The attention '{path}' ({type(attention).__name__}) mixes neighbouring tokens with a convolution, which "
            f"is not defined for prompts. {remedy}"
        )
    if kind == "textual" and any(_is_table(module) for module in attention.children()):
        raise UnsupportedModelError(
            f"The attention '{path}' ({type(attention).__name__}) looks up rotations in a table that starts at "
            f"position 0, but prompts stand in front of that. {remedy}"
        )
    block, norms = input_
    rotary = find_rotary(model, path, attention, layer) if kind == "textual" else None
    if kind == "textual" and rotary is None and read_signature(type(attention)).takes(Role.ROTATIONS):
        raise UnsupportedModelError(
            f"The attention '{path}' takes position embeddings, but no module around it has a `rotary_emb` to compute "
            f"them. {remedy}"
        )
    return Site(kind, path, layer, attention, block, norms, _width(attention), rotary)


def _is_table(module: nn.Module) -> bool:
    """Whether a module returns the rotations of positions 0, 1, ... up to a length."""
    return "seq_len" in inspect.signature(type(module).forward).parameters


def _width(attention: nn.Module) -> int | None:
    linear = first_child_on_input(attention, "in_features")
    return getattr(attention.config, "hidden_size", None) if linear is None else linear.in_features


def _attention_modules(tower: nn.Module, tower_path: str) -> Iterator[tuple[str, nn.Module]]:
    """
    Yields path and module of each attention of a tower, inside the wrappers of PEFT.

    If the tower has a list of layers itself, other parts, which may be encoders, do not count.
    """
    recorded = recorded_attention_classes(tower)

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        module = own_module(module)
        if not isinstance(module, PreTrainedModel) and find_attention_call(type(module)):
            yield path, module
        elif isinstance(module, recorded):
            raise UnsupportedModelError(
                f"The attention '{path}' ({type(module).__name__}) bypasses the attention interface of transformers, "
                f"so its keys and values are out of reach. Leave out this part of the model with num_visual_tokens=0 "
                f"or num_textual_tokens=0, or name another one with vision_encoder=... or text_decoder=...."
            )
        else:
            for name, child in module.named_children():
                if name not in HARD_DECISIONS:
                    yield from walk(child, f"{path}.{name}" if path else name)

    own_lists = [name for name, child in tower.named_children() if isinstance(child, nn.ModuleList)]
    for name in own_lists:
        found = False
        for found in walk(getattr(tower, name), f"{tower_path}.{name}" if tower_path else name):
            yield found
        if found:
            return
    yield from walk(tower, tower_path)
