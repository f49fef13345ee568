"""Registers the hooks of a new adapter on a model. Each belongs to a layer, which removes it."""

from __future__ import annotations

from peft import PeftConfig
from torch import nn

from ..adapted import layer_of
from ..anatomy.sites import Connector, Site
from ..anatomy.towers import find_tower, has_tower
from ..attention.cached_first_tokens import patch_cache_methods
from ..attention.interface import intercept_update
from ..attention.prompted_layers import take_prompts_out
from ..config import M2PTConfig
from ..layers.attention import M2PTAttention
from ..layers.connector import M2PTConnector
from ..upstream import intercept_flattening, intercept_updates
from .checkpointing import require_input_grads
from .chunks import refuse_ambiguous_chunks
from .continuous_batching import supervise_continuous_batching
from .first_tokens import cache_first_tokens_of_others
from .image_tokens import explain_image_tokens
from .later_adapters import refuse_later_adapters
from .packing import refuse_text_boundaries
from .refused_methods import refuse_unloading
from .unused_parameters import keep_parameters_used


def install_hooks(
    model: nn.Module,
    adapter_name: str,
    configs: dict[str, PeftConfig],
    sites: list[Site],
    connector: Connector | None,
) -> None:
    """
    Registers hooks on each tower in which an adapter has prompts, kept by its first layer, and on the connector.

    Args:
        model (`nn.Module`):
            The model, which has the adapter.
        adapter_name (`str`):
            Name of the adapter.
        configs (`dict[str, PeftConfig]`):
            The configs of all adapters of the model. PEFT adds those of later adapters to it.
        sites (`list[Site]`):
            The attention modules with prompts of the adapter.
        connector ([`~peft_m2pt.anatomy.sites.Connector`], *optional*):
            The connector, if the adapter needs it.
    """
    config = configs[adapter_name]
    first_layers: dict[str, M2PTAttention] = {}
    for site in sites:
        # PEFT adapts only some of them if it injects the adapter by the keys of a state dict.
        layer = layer_of(site.attention)
        if layer is not None and layer._adapters([adapter_name]):
            first_layers.setdefault(site.kind, layer)
    for kind, layer in first_layers.items():
        if layer.hooks:
            continue
        tower_path, tower = find_tower(model, kind, config)
        layer.hooks += require_input_grads(model, tower_path, layer.site.path)
        if kind == "visual":
            layer.hooks += refuse_text_boundaries(tower, layer)
        else:
            patch_cache_methods()
            intercept_updates(intercept_update)
            intercept_flattening(take_prompts_out)
            layer.hooks += cache_first_tokens_of_others(model, layer.base_layer)
            layer.hooks += refuse_ambiguous_chunks(model, layer)
            layer.hooks += supervise_continuous_batching(model)
        layer.hooks += refuse_later_adapters(model, layer, configs)
        layer.hooks += refuse_unloading(model, layer)
    adapted = None if connector is None else layer_of(connector.module)
    if adapted is not None and adapter_name in adapted.m2pt_interaction and len(adapted.m2pt_interaction) == 1:
        adapted.hooks += explain_image_tokens(model, adapted)
    if has_tower(model, "textual", config):
        _keep_parameters_used(model, config, first_layers, adapted)


def _keep_parameters_used(
    model: nn.Module, config: M2PTConfig, first_layers: dict[str, M2PTAttention], connector: M2PTConnector | None
) -> None:
    """Prepares the vision encoder and the connector for training steps without images."""
    _, decoder = find_tower(model, "textual", config)
    if layer := first_layers.get("visual"):
        _, tower = find_tower(model, "visual", config)
        layer.hooks += keep_parameters_used(model, tower, layer, decoder)
    if connector is not None:
        next(iter(first_layers.values())).hooks += keep_parameters_used(model, connector, connector, decoder)
