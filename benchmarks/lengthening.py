"""M2PT by longer sequences, as the paper writes it and as its official code computes it, for LLaVA models."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class Lengthening:
    """
    Lets a layer run on `[P ; X]` and hands on the rows of X. These are hooks around the layer.

    While tokens are decoded on top of a cache, the rows of P are in the cache already.

    Args:
        layer (`nn.Module`):
            The layer. It gets the prompt P as its parameter `prompt`.
        num_tokens (`int`):
            Number of prompt vectors.
        width (`int`):
            Their width.
        rotary (`nn.Module`, *optional*):
            The rotary embedding, if the layer is one of the language model.
    """

    def __init__(self, layer: nn.Module, num_tokens: int, width: int, rotary: nn.Module | None = None) -> None:
        layer.prompt = _new_prompt(layer, num_tokens, width)
        self.rotary = rotary
        layer.register_forward_pre_hook(self.put_in_front, with_kwargs=True)
        # In front of the hook with which transformers collects the hidden states.
        layer.register_forward_hook(self.take_away, prepend=True)

    def put_in_front(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        hidden_states, *masks = args
        mask = masks[0] if masks else kwargs["attention_mask"]
        if mask is not None:
            raise ValueError("An attention mask was given, but lengthened layers are for batches without padding.")
        is_decoding = self.rotary is not None and hidden_states.shape[1] == 1
        self.num_rows = 0 if is_decoding else len(layer.prompt)
        prompt = layer.prompt[: self.num_rows].to(hidden_states.dtype).expand(len(hidden_states), -1, -1)
        if self.rotary is not None:
            # Rotations only look at distances, so prompts may stand at positions -n ... -1.
            positions = torch.arange(-self.num_rows, 0, device=hidden_states.device)[None]
            of_prompt, of_tokens = self.rotary(hidden_states, positions), kwargs["position_embeddings"]
            kwargs["position_embeddings"] = tuple(
                torch.cat([front.expand(len(back), -1, -1), back], dim=1) for front, back in zip(of_prompt, of_tokens)
            )
        return (torch.cat([prompt, hidden_states], dim=1), *masks), kwargs

    def take_away(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output[:, self.num_rows :]


class LengtheningConnector(nn.Module):
    """
    A trainable copy of the connector, which the visual prompts of the last state go through in front of the image.

    Args:
        connector (`nn.Module`):
            The connector.
        num_tokens (`int`):
            Number of prompt vectors. Each becomes a token of the language model.
        width (`int`):
            Their width.
    """

    def __init__(self, connector: nn.Module, num_tokens: int, width: int) -> None:
        super().__init__()
        self.connector = copy.deepcopy(connector).requires_grad_()
        self.prompt = _new_prompt(connector, num_tokens, width) if num_tokens > 0 else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.prompt is not None:
            features = torch.cat([self.prompt.to(features.dtype).expand(len(features), -1, -1), features], dim=1)
        return self.connector(features)


def _new_prompt(module: nn.Module, num_tokens: int, width: int) -> nn.Parameter:
    prompt = nn.Parameter(torch.empty(num_tokens, width, device=next(module.parameters()).device))
    nn.init.xavier_uniform_(prompt)
    return prompt


def lengthen(
    model: PreTrainedModel, num_visual_tokens: int, num_textual_tokens: int, through_connector: bool
) -> PreTrainedModel:
    """
    Puts prompts in front of the sequences of the layers of a LLaVA.

    Args:
        model (`PreTrainedModel`):
            The model, which is changed in place.
        num_visual_tokens (`int`):
            Prompt vectors in each layer of the vision encoder up to the one that the model reads.
        num_textual_tokens (`int`):
            Prompt vectors in each layer of the language model.
        through_connector (`bool`):
            Whether as many visual prompts go through the connector, which is tuned then. Inputs need a placeholder
            for each.
    """
    vision, text = model.model.vision_tower, model.model.language_model
    if num_visual_tokens > 0:
        for layer in vision.encoder.layers[: model.config.vision_feature_layer + 1]:
            Lengthening(layer, num_visual_tokens, vision.config.hidden_size)
    for layer in text.layers:
        Lengthening(layer, num_textual_tokens, text.config.hidden_size, text.rotary_emb)
    if through_connector:
        width = vision.config.hidden_size
        model.model.multi_modal_projector = LengtheningConnector(
            model.model.multi_modal_projector, num_visual_tokens, width
        )
    return model
