"""
The base model of the quickstart: a LLaVA with 1.3 million parameters and its processor, small enough to pretrain on a
CPU in about two minutes. It learns all instructions on digits drawn with fonts.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import digits
import torch
import vqa
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    set_seed,
)


PATCH_SIZE = 8

# The conversation format of LLaVA 1.5: "USER: <image>\nWhich digit is this? ASSISTANT: 7</s>"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'].upper() }}:{{ ' ' }}
{%- for part in message['content'] -%}
{{ '<image>\n' if part['type'] == 'image' else part['text'] }}
{%- endfor -%}
{{ ' ' if message['role'] == 'user' else eos_token }}
{%- endfor -%}
{{ 'ASSISTANT:' if add_generation_prompt }}"""


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer in which the words of `texts` are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "USER: \n ASSISTANT:"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )


def build_processor(texts: Iterable[str]) -> LlavaProcessor:
    size = {"height": digits.IMAGE_SIZE, "width": digits.IMAGE_SIZE}
    return LlavaProcessor(
        # The PIL backend needs no torchvision.
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, do_normalize=False),
        tokenizer=build_tokenizer(texts),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor, width: int) -> LlavaForConditionalGeneration:
    """Builds a randomly initialized model for the processor, with towers of equal width."""
    tokenizer = processor.tokenizer
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                image_size=digits.IMAGE_SIZE,
                patch_size=PATCH_SIZE,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=5,
                num_attention_heads=4,
            ),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=256,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
            image_seq_length=(digits.IMAGE_SIZE // PATCH_SIZE) ** 2,
            vision_feature_layer=-2,
        )
    )


class DigitClassifier(nn.Module):
    """
    The vision tower and projector of a model, with a digit classifier on the mean image token.

    Args:
        model (`LlavaForConditionalGeneration`):
            The model.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        width = model.config.text_config.hidden_size
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        image_tokens = torch.stack(self.model.get_image_features(pixel_values).pooler_output)
        logits = self.head(image_tokens.mean(dim=1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@dataclass
class DigitCollator:
    processor: LlavaProcessor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = self.processor.image_processor([row["image"] for row in rows], return_tensors="pt")
        return {"pixel_values": images["pixel_values"], "labels": torch.tensor([row["digit"] for row in rows])}


@dataclass(frozen=True)
class Recipe:
    """How the base model is pretrained."""

    num_images: int = 16_000
    vision_steps: int = 500
    steps: int = 400
    width: int = 128


def pretrain(recipe: Recipe, seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Builds the model and trains all of its weights on digits drawn with fonts."""
    set_seed(seed)
    images = digits.font_digits(recipe.num_images, seed)
    questions = digits.ask(images, list(digits.INSTRUCTIONS))
    processor = build_processor(digits.texts())
    model = build_model(processor, recipe.width)

    # From scratch, a language model first learns to ignore the meaningless image tokens, and takes long to unlearn
    # that. So the vision tower learns to see digits before the whole model learns to talk about them.
    vqa.train(
        DigitClassifier(model),
        images,
        DigitCollator(processor),
        recipe.vision_steps,
        2e-3,
        seed,
        "Pretraining: seeing",
    )
    vqa.train(model, questions, vqa.AnswerCollator(processor), recipe.steps, 1e-3, seed, "Pretraining: answering")
    return model, processor


def pretrained(cache_dir: Path, recipe: Recipe, seed: int) -> Path:
    """Returns the cached folder of the pretrained model. Pretrains it if needed."""
    # The folder name identifies everything the weights depend on.
    source = "".join(inspect.getsource(module) for module in (digits, vqa, inspect.getmodule(pretrain)))
    key = hashlib.sha256(f"{source}{recipe}{seed}".encode()).hexdigest()[:8]
    folder = cache_dir / f"quickstart-base-{key}"
    if not folder.exists():
        vqa.save(folder, *pretrain(recipe, seed))
    return folder
