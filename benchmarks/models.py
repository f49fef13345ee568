"""The models that are measured, with random weights, and inputs for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)


@dataclass(frozen=True)
class Llava:
    """
    Dimensions of a LLaVA: CLIP, a connector of two linear layers, Llama.

    Args:
        vision (`dict[str, int]`):
            Arguments of its `CLIPVisionConfig`.
        text (`dict[str, int]`):
            Arguments of its `LlamaConfig`.
        batch_size (`int`):
            Samples in a batch, each with one image.
        num_text_tokens (`int`):
            Tokens of a sample besides those of its image.
    """

    vision: dict[str, int]
    text: dict[str, int]
    batch_size: int
    num_text_tokens: int

    @property
    def num_image_tokens(self) -> int:
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2

    def make_model(self) -> PreTrainedModel:
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**self.vision),
            text_config=LlamaConfig(**self.text, pad_token_id=0, bos_token_id=1, eos_token_id=2),
            image_token_index=self.text["vocab_size"] - 1,
        )
        return LlavaForConditionalGeneration(config)

    def make_images(self, batch_size: int) -> dict[str, torch.Tensor]:
        size = self.vision["image_size"]
        return {"pixel_values": torch.randn(batch_size, 3, size, size)}

    @property
    def lora_targets(self) -> str:
        return r".*self_attn\.(q_proj|v_proj)"


@dataclass(frozen=True)
class QwenVL:
    """
    Dimensions of a Qwen2.5-VL.

    Args:
        vision (`dict[str, Any]`):
            Arguments of the config of its vision encoder.
        text (`dict[str, Any]`):
            Arguments of the config of its language model.
        grid (`int`):
            Rows of patches of an image, and patches in a row.
        batch_size (`int`):
            Samples in a batch, each with one image.
        num_text_tokens (`int`):
            Tokens of a sample besides those of its image.
    """

    vision: dict[str, Any]
    text: dict[str, Any]
    grid: int
    batch_size: int
    num_text_tokens: int

    @property
    def num_image_tokens(self) -> int:
        return (self.grid // 2) ** 2

    def make_model(self) -> PreTrainedModel:
        last = self.text["vocab_size"] - 1
        special = {"image_token_id": last, "video_token_id": last - 1, "vision_start_token_id": last - 2}
        config = Qwen2_5_VLConfig(vision_config=self.vision, text_config=self.text, **special)
        return Qwen2_5_VLForConditionalGeneration(config)

    def make_images(self, batch_size: int) -> dict[str, torch.Tensor]:
        num_patches = batch_size * self.grid**2
        return {
            "pixel_values": torch.randn(num_patches, 3 * 2 * 14**2),
            "image_grid_thw": torch.tensor([[1, self.grid, self.grid]] * batch_size),
        }

    @property
    def lora_targets(self) -> str:
        # Its vision encoder has one linear layer for queries, keys and values together.
        return r".*(self_attn\.(q_proj|v_proj)|attn\.qkv)"


DIMS = {
    "tiny": Llava(
        vision={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        text={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 128,
        },
        batch_size=2,
        num_text_tokens=8,
    ),
    "tiny-qwen": QwenVL(
        vision={
            "hidden_size": 32,
            "intermediate_size": 64,
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": 48,
            "fullatt_block_indexes": [1],
        },
        text={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]},
        },
        grid=4,
        batch_size=2,
        num_text_tokens=8,
    ),
    # 165 million parameters, with as many image tokens as LLaVA-1.5.
    "medium": Llava(
        vision={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "image_size": 336,
            "patch_size": 14,
        },
        text={
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 8192,
        },
        batch_size=2,
        num_text_tokens=64,
    ),
    "llava-1.5-7b": Llava(
        vision={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        text={
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32064,
        },
        batch_size=4,
        num_text_tokens=128,
    ),
    "qwen2.5-vl-7b": QwenVL(
        vision={
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "depth": 32,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        text={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
        },
        grid=48,
        batch_size=4,
        num_text_tokens=128,
    ),
}
# Small operations and Python take most of a step, as they do in larger models where a GPU waits for them.
DIMS["launch-bound"] = Llava(
    vision={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    },
    text={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 512,
    },
    batch_size=4,
    num_text_tokens=16,
)
# The same at the resolution of the paper, where an image has 256 tokens.
DIMS["medium-224"] = replace(DIMS["medium"], vision={**DIMS["medium"].vision, "image_size": 224})


def make_model(dims: Llava | QwenVL, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A frozen model with random weights. Equal arguments give equal models."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = dims.make_model()
    finally:
        torch.set_default_dtype(default)
    return model.requires_grad_(False).eval()


def make_inputs(
    dims: Llava | QwenVL,
    batch_size: int | None = None,
    num_text_tokens: int | None = None,
    num_more_image_tokens: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """A batch without padding: an image and text in each sample, and labels on the text."""
    batch_size = batch_size or dims.batch_size
    num_text_tokens = num_text_tokens or dims.num_text_tokens
    image_token = dims.text["vocab_size"] - 1
    torch.manual_seed(1)
    text = torch.randint(3, image_token - 2, (batch_size, num_text_tokens))
    image = torch.full((batch_size, dims.num_image_tokens + num_more_image_tokens), image_token)
    input_ids = torch.cat([text[:, :2], image, text[:, 2:]], dim=1)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.masked_fill(input_ids == image_token, -100),
        **dims.make_images(batch_size),
    }
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype) for name, value in inputs.items()
    }


def pad(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch, in which each sample begins one token later than the one before, behind padding on the left."""
    num_samples = len(inputs["input_ids"])
    ids, mask = (torch.nn.functional.pad(inputs[name], (num_samples, 0)) for name in ("input_ids", "attention_mask"))
    for i in range(num_samples):
        ids[i, i:num_samples], mask[i, i:num_samples] = ids[i, num_samples], 1
    return {**inputs, "input_ids": ids, "attention_mask": mask}


def make_hollow_model(dims: Llava | QwenVL) -> PreTrainedModel:
    """
    A model on the CPU in bfloat16 whose weights take no memory: each tensor repeats a single number. Only connectors,
    of which adapters can hold copies, have weights of their own.

    Adapters are saved from it and loaded onto it as with any other, but it is not there to compute anything.
    """
    model = make_model(dims, "meta", torch.bfloat16)
    for path, module in model.named_modules():
        is_in_connector = "multi_modal_projector" in path or "merger" in path
        for name, parameter in module.named_parameters(recurse=False):
            number = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            weight = number.clone(memory_format=torch.contiguous_format) if is_in_connector else number
            module.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
    return model
