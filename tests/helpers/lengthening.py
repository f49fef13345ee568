"""
M2PT computed the long way, as the paper writes it, and independently of the package.

In every layer the prompts stand in front of the sequence, the whole layer runs on the longer sequence, and what it
computes at the prompt rows is thrown away. Written for LLaVA models with eager attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass
class Lengthened:
    logits: torch.Tensor
    loss: torch.Tensor | None
    vision_states: list[torch.Tensor]
    """Input of each vision layer and output of the last, without prompt rows."""
    text_states: list[torch.Tensor]


def run_lengthened(
    model: PreTrainedModel,
    visual_prompts: dict[int, torch.Tensor],
    textual_prompts: dict[int, torch.Tensor],
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    image_prompts: torch.Tensor | None = None,
    connector: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Lengthened:
    """
    Runs a LLaVA with prompts `{layer: [n, D]}` in front of the sequences of its layers, with `image_prompts` in front
    of the features of each image, and with another connector.
    """
    assert model.config.text_config._attn_implementation == "eager"
    embeddings = model.get_input_embeddings()(input_ids)
    vision_states: list[torch.Tensor] = []
    if pixel_values is not None:
        vision_states = _vision_states(model.model.vision_tower, visual_prompts, pixel_values)
        features = vision_states[model.config.vision_feature_layer]
        if model.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        features = torch.cat([_batched(image_prompts, features), features], dim=1)
        features = (connector or model.model.multi_modal_projector)(features).flatten(0, 1)
        embeddings = embeddings.clone()
        embeddings[input_ids == model.config.image_token_id] = features
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    text_states = _text_states(model.model.language_model, textual_prompts, embeddings, attention_mask)
    logits = model.lm_head(model.model.language_model.norm(text_states[-1]))
    loss = None
    if labels is not None:
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    return Lengthened(logits, loss, vision_states, text_states)


def _vision_states(tower: nn.Module, prompts: dict[int, torch.Tensor], pixel_values: torch.Tensor):
    states = [tower.embeddings(pixel_values)]
    if hasattr(tower, "pre_layrnorm"):
        states[0] = tower.pre_layrnorm(states[0])
    for i, layer in enumerate(tower.encoder.layers):
        prompt = _batched(prompts.get(i), states[-1])
        output = layer(torch.cat([prompt, states[-1]], dim=1), None)
        states.append(output[:, prompt.shape[1] :])
    return states


def _text_states(
    decoder: nn.Module, prompts: dict[int, torch.Tensor], embeddings: torch.Tensor, attention_mask: torch.Tensor
):
    states = [embeddings]
    for i, layer in enumerate(decoder.layers):
        prompt = _batched(prompts.get(i), states[-1])
        n = prompt.shape[1]
        hidden_states = torch.cat([prompt, states[-1]], dim=1)
        # Positions count from the first token of each sample.
        of_tokens = n + (attention_mask.cumsum(-1) - 1).clamp(min=0)
        position_ids = torch.cat([torch.arange(n).expand(len(of_tokens), -1), of_tokens], dim=1)
        window = getattr(decoder.config, "sliding_window", None)
        output = layer(
            hidden_states,
            attention_mask=_causal_mask(attention_mask, n, window).to(hidden_states.dtype),
            position_embeddings=decoder.rotary_emb(hidden_states, position_ids),
        )
        states.append(output[:, n:])
    return states


def _batched(prompt: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
    if prompt is None:
        return states[:, :0]
    return prompt[None].expand(states.shape[0], -1, -1)


def _causal_mask(attention_mask: torch.Tensor, n: int, window: int | None) -> torch.Tensor:
    """Row q sees key k if k is not behind q, is no padding, and is a prompt or inside the window."""
    batch_size, length = attention_mask.shape
    position = torch.arange(n + length)
    visible = position[None, :] <= position[:, None]
    if window is not None:
        visible &= (position[:, None] - position[None, :] < window) | (position[None, :] < n)
    real = torch.cat([torch.ones(batch_size, n, dtype=torch.bool), attention_mask.bool()], dim=1)
    visible = visible[None, None] & real[:, None, None, :]
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
