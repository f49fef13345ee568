"""Tiny models from configs, inputs for them, and adapters with prompts large enough to matter."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    Cache,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)

from peft_m2pt import M2PTConfig


VOCAB_SIZE = 97
IMAGE_TOKEN = 96
PAD_TOKEN = 0
NUM_PATCHES = 4
SLIDING_WINDOW = 5

VISION = {
    "clip": CLIPVisionConfig,
    "siglip": SiglipVisionConfig,
}
TEXT = {
    "llama": lambda **kwargs: LlamaConfig(num_key_value_heads=4, **kwargs),
    "mistral": lambda **kwargs: MistralConfig(num_key_value_heads=2, sliding_window=SLIDING_WINDOW, **kwargs),
    "qwen2": lambda **kwargs: Qwen2Config(num_key_value_heads=1, **kwargs),
}


def make_llava(
    vision: str = "clip",
    text: str = "llama",
    attn: str = "sdpa",
    num_layers: tuple[int, int] = (4, 3),
    **kwargs,
) -> PreTrainedModel:
    """A LLaVA with vision and text layers and random weights. Equal arguments give equal models."""
    config = LlavaConfig(
        vision_config=VISION[vision](
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=num_layers[0],
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
        text_config=TEXT[text](
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=num_layers[1],
            num_attention_heads=4,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=128,
            pad_token_id=PAD_TOKEN,
            bos_token_id=1,
            eos_token_id=2,
            # Small random models hardly look at anything: larger weights give attention something to choose.
            initializer_range=0.2,
        ),
        image_token_index=IMAGE_TOKEN,
        # SigLIP has no class token that "default" could drop.
        vision_feature_select_strategy="default" if vision == "clip" else "full",
        **kwargs,
    )
    config._attn_implementation = attn
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def make_inputs(
    padding: str = "none", images: bool = True, seed: int = 1, num_image_tokens: int = NUM_PATCHES
) -> dict[str, torch.Tensor]:
    """
    A batch of two. `padding`: "none" (equal lengths), "left" or "right" (the second sample is shorter), or "no mask"
    (equal lengths, and no attention mask).
    """
    generator = torch.Generator().manual_seed(seed)
    length = 10 + num_image_tokens
    input_ids = torch.randint(3, IMAGE_TOKEN, (2, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    lengths = [length, length] if padding in ("none", "no mask") else [length, length - 4]
    labels = input_ids.clone()
    for row, row_length in enumerate(lengths):
        start = length - row_length if padding == "left" else 0
        if images:
            input_ids[row, start + 2 : start + 2 + num_image_tokens] = IMAGE_TOKEN
        pad = slice(0, start) if padding == "left" else slice(row_length, length)
        input_ids[row, pad] = PAD_TOKEN
        attention_mask[row, pad] = 0
        labels[row] = torch.where(attention_mask[row] == 1, input_ids[row], -100)
        labels[row, : start + 2 + num_image_tokens] = -100
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if padding == "no mask":
        del inputs["attention_mask"]
    if images:
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    return inputs


def without_labels(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if name != "labels"}


def cache_of(output: Any) -> Cache:
    """The cache in the output of a model, whatever its name is in this version of transformers."""
    return next(value for value in output.values() if isinstance(value, Cache))


def image_features_of(output: Any) -> torch.Tensor:
    """The features of all images in the output of a model, one after the other."""
    of_images = getattr(output, "image_outputs", None)
    return output.image_hidden_states if of_images is None else torch.cat(list(of_images.pooler_output))


def on_top_of(cache: Cache) -> dict[str, Cache]:
    """The argument that lets a LLaVA go on from a cache."""
    parameters = inspect.signature(LlavaForConditionalGeneration.forward).parameters.values()
    return {next(parameter.name for parameter in parameters if "Cache" in str(parameter.annotation)): cache}


def make_config(**kwargs) -> M2PTConfig:
    """All three kinds of prompts, whose weights are the prompts themselves, and a full copy of the connector."""
    fields = {"num_visual_tokens": 4, "num_textual_tokens": 3, "num_interaction_tokens": 2}
    return M2PTConfig(**{**fields, "connector_rank": None, "init_prompts": "xavier_uniform", **kwargs})


def adapt(model: PreTrainedModel, adapter_name: str = "default", **kwargs) -> PeftModel:
    """Adds an adapter with prompts of standard deviation 0.5, so that they change every output."""
    peft_model = get_peft_model(model, make_config(**kwargs), adapter_name=adapter_name)
    randomise(peft_model, seed=2)
    return peft_model


def randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "m2pt_prompt" in name or "m2pt_interaction" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
            elif "m2pt_connector" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def trained_by(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """All that the adapters train."""
    return {name: parameter for name, parameter in model.named_parameters() if "m2pt_" in name}


def connector_of(peft_model):
    return peft_model.get_base_model().model.multi_modal_projector
