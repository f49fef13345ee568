"""Puts what an adapter has trained into a model of vLLM."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from vllm.config import ModelConfig

from ...anatomy.sites import Site
from ...bundles.textual_rows import ADAPTER, make_tuned, textual_rows
from ...layers.attention import M2PTAttention
from ...layers.connector import M2PTConnector


def make_tuned_model(model_config: ModelConfig, folder: Path) -> PreTrainedModel:
    """Makes the model of a bundle on the meta device, with the real weights of its adapter."""
    config = copy.deepcopy(model_config.hf_config)
    config.architectures = config.m2pt_architectures
    config.dtype = model_config.dtype
    # vLLM has set its own, for its own layers.
    config._attn_implementation = "sdpa"
    return make_tuned(config, folder, folder)


def put_into(
    model: nn.Module,
    tuned: PreTrainedModel,
    places: torch.Tensor,
    make_weights: Callable[[nn.Module], None],
) -> None:
    """
    Puts the prompts and the connector of an adapter into a model.

    Args:
        model (`nn.Module`):
            The model of transformers without its head, whose linear layers vLLM has replaced.
        tuned (`PreTrainedModel`):
            The same model of transformers with the adapter.
        places (`torch.Tensor`):
            For each token of a batch, which textual prompt it stands for.
        make_weights (`Callable[[nn.Module], None]`):
            Replaces weights on the meta device by empty ones, which vLLM will load.
    """

    paths = {module: path for path, module in tuned.named_modules()}
    body = next(path for module, path in paths.items() if isinstance(module, type(model)))

    def part(path: str) -> nn.Module:
        return model.get_submodule(path.removeprefix(body).removeprefix("."))

    rows = textual_rows(tuned)
    for layer in list(paths):
        if isinstance(layer, M2PTConnector):
            path, _, name = layer.site.path.rpartition(".")
            make_weights(layer.base_layer)
            setattr(part(path), name, layer.base_layer.to(places.device))
        elif isinstance(layer, M2PTAttention):
            site, block = layer.site, part(paths[layer.site.block])
            if site.kind == "textual":
                prompts = rows[site.path].to(places.device, tuned.dtype)
                _add_textual_prompts(block, prompts, places)
            else:
                prompts = layer.m2pt_prompt[ADAPTER].to(places.device)
                _add_visual_prompts(replace(site, attention=part(site.path), block=block), prompts)


def _add_visual_prompts(site: Site, prompts: nn.Module) -> None:
    """Makes an attention module attend to prompts, as `PeftModel` does."""
    layer = M2PTAttention(site)
    layer.m2pt_prompt[ADAPTER] = prompts
    layer.set_adapter([ADAPTER], inference_mode=True)
    layer.eval()


def _add_textual_prompts(block: nn.Module, prompts: torch.Tensor, places: torch.Tensor) -> None:
    """Makes prompts take the place of the hidden states of placeholders in the input of a layer."""
    # One row more, for tokens that are no placeholders.
    rows = torch.cat([prompts, torch.zeros_like(prompts[:1])])
    block.register_buffer("m2pt_rows", rows, persistent=False)
    block.register_buffer("m2pt_places", places, persistent=False)
    block.register_forward_pre_hook(_put_in_place, with_kwargs=True)


def _put_in_place(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    hidden_states = args[0] if args else kwargs["hidden_states"]
    places = block.m2pt_places[: hidden_states.shape[-2]]
    is_placeholder = (places < len(block.m2pt_rows) - 1).unsqueeze(-1)
    hidden_states = torch.where(is_placeholder, block.m2pt_rows[places], hidden_states)
    return ((hidden_states, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden_states})
