"""Describes what M2PT finds in a model, without its weights: the command `peft-m2pt inspect`."""

from __future__ import annotations

import warnings
from collections import defaultdict
from pathlib import Path

from transformers import AutoConfig, PreTrainedModel

from ..anatomy.arguments import Role, read_signature
from ..anatomy.connectors import find_connector
from ..anatomy.layers import find_layers
from ..anatomy.sites import Site
from ..anatomy.towers import TOWERS, Kind, find_tower
from ..config import M2PTConfig
from ..errors import UnsupportedModelError
from ..layers.summary import count_parameters, format_ranges
from ..plan import make_plan
from ..tested import newer_than_tested
from ..upstream import make_on_meta


KINDS: tuple[Kind, ...] = ("visual", "textual")


LABEL_WIDTH = 16


def inspect_model(source: str | PreTrainedModel) -> str:
    """
    Describes what M2PT finds in a model, and what `M2PTConfig()` would train.

    Args:
        source (`str` or `PreTrainedModel`):
            A folder with a `config.json`, such a file, a model id on the Hub, or a model. From a config, the model is
            made on the meta device, without loading weights.

    Returns:
        `str`: A text of several lines.

    Raises:
        ValueError: If the installed transformers has no model for the config.
        OSError: If there is no config.
    """
    model = source if isinstance(source, PreTrainedModel) else make_model(source)
    lines = [f"{type(model).__name__} ({model.config.model_type})", ""]
    refused: list[Kind] = []
    for kind in KINDS:
        try:
            lines += _describe_tower(model, kind)
        except UnsupportedModelError as error:
            refused.append(kind)
            lines.append(_line(TOWERS[kind], f"no {kind} prompts: {error.reason}"))
    lines += [_line("connector", _describe_connector(model)), ""]
    if refused and (note := newer_than_tested()):
        lines += [note, ""]
    if len(refused) == len(KINDS):
        return "\n".join([*lines, "M2PT cannot adapt this model."])
    return "\n".join([*lines, *_describe_default(model, refused)])


def make_model(source: str) -> PreTrainedModel:
    """Makes a model on the meta device, from a folder with a `config.json`, such a file, or a model id on the Hub."""
    path = Path(source)
    config = AutoConfig.from_pretrained(path.parent if path.is_file() else source)
    return make_on_meta(config)


def _line(label: str, text: str) -> str:
    return f"{label:<{LABEL_WIDTH}}{text}"


def _describe_tower(model: PreTrainedModel, kind: Kind) -> list[str]:
    path, tower = find_tower(model, kind, M2PTConfig())
    sites, live = find_layers(model, kind, M2PTConfig())
    lines = [_line(TOWERS[kind], f"{path or 'the model itself'} ({type(tower).__name__})")]
    dead = [layer for layer in sites if layer not in live]
    note = f"; {format_ranges(dead)} do not affect the output" if dead else ""
    lines.append(_line("  layers", f"{format_ranges(live)} with self-attention{note}"))
    described = {layer: _describe_site(sites[layer]) for layer in live}
    for i, label in enumerate(("  attention", "  norm", "  positions", "  width")):
        layers_of: dict[str, list[int]] = defaultdict(list)
        for layer, texts in described.items():
            layers_of[texts[i]].append(layer)
        for text, layers in layers_of.items():
            lines.append(_line(label, text if len(layers_of) == 1 else f"{text} (layers {format_ranges(layers)})"))
    return lines


def _describe_site(site: Site) -> tuple[str, ...]:
    norms = " -> ".join(f"{name} ({type(getattr(site.block, name)).__name__})" for name in site.norms)
    if site.kind == "visual":
        positions = "none: prompts are not rotated"
    elif site.rotary is None:
        has_positions = read_signature(type(site.attention)).takes(Role.POSITIONS)
        positions = "-n ... -1, by the attention itself" if has_positions else "none in the attention"
    else:
        of_type = "" if site.rotary.layer_type is None else f" for {site.rotary.layer_type!r}"
        positions = f"-n ... -1, by {type(site.rotary.module).__name__}{of_type}"
    return type(site.attention).__name__, norms or "none before the attention", positions, str(site.width)


def _describe_connector(model: PreTrainedModel) -> str:
    try:
        connector = find_connector(model, M2PTConfig())
    except UnsupportedModelError as error:
        return f"none: {error.reason}"
    kind = {
        None: "no interaction prompts, since no fixed number of feature rows is mapped to one token",
        1: "maps each feature row to one token",
    }.get(connector.rows_per_token, f"maps {connector.rows_per_token} feature rows to one token")
    return f"{connector.path} ({type(connector.module).__name__}): {kind}"


def _describe_default(model: PreTrainedModel, refused: list[Kind]) -> list[str]:
    config = M2PTConfig(**{f"num_{kind}_tokens": 0 for kind in refused})
    arguments = ", ".join(f"num_{kind}_tokens=0" for kind in refused)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = make_plan(model, config).describe(count_parameters(model.parameters()))
    notes = [str(warning.message) for warning in caught if warning.filename.startswith(str(Path(__file__).parents[1]))]
    return [f"M2PTConfig({arguments}) would train:", "", table, *notes]
