"""Converts checkpoints of the official M2PT code to a transformers LLaVA with an M2PT adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import (
    AddedToken,
    AutoTokenizer,
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import tqdm

from ..config import M2PTConfig
from ..errors import ConversionError
from ..layers.attention import M2PTAttention
from ..layers.connector import M2PTConnector
from ..processing import adapt_processor
from ..saving.checkpoints import Checkpoint
from ..saving.folders import atomic_folder, is_taken
from .official import CONNECTOR, PROMPTS, Weight, find_feature_layer, find_prompts, find_weights, make_config


IMAGE_TOKEN = "<image>"


EMBEDDINGS = "model.language_model.embed_tokens.weight"


LM_HEAD = "lm_head.weight"


# The conversation format of the official training, "vicuna_v1".
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}{{ '<image>\\n' if part['type'] == 'image' else part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] != 'system' -%}
{{ "A chat between a curious user and an artificial intelligence assistant. " -}}
{{ "The assistant gives helpful, detailed, and polite answers to the user's questions. " }}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ text(message['content']) + ' ' }}
{%- elif message['role'] == 'user' -%}{{ 'USER: ' + text(message['content']) + ' ' }}
{%- else -%}{{ 'ASSISTANT: ' + text(message['content']) + eos_token }}
{%- endif -%}
{%- endfor -%}
{{ 'ASSISTANT:' if add_generation_prompt }}"""


def convert_checkpoint(
    original: str | os.PathLike,
    language_model: str | os.PathLike,
    vision_tower: str | os.PathLike,
    output: str | os.PathLike,
    max_shard_size: int | str = "5GB",
    progressbar: bool = True,
) -> M2PTConfig:
    """
    Converts a checkpoint of the official M2PT code.

    Writes two folders: `output/base`, a LLaVA with the frozen weights, the trained projector and head, and a processor
    with room for interaction prompts, and `output/adapter`, an M2PT adapter. Together they compute what the official
    code computes. Memory use does not depend on the size of the model, since weights are copied shard by shard.

    Args:
        original (`str` or `os.PathLike`):
            Folder saved by the official code: config.json and weights, all of them or only the trained ones.
        language_model (`str` or `os.PathLike`):
            Folder of the Llama base model. Its config and tokenizer are always used, its weights where the original
            has none.
        vision_tower (`str` or `os.PathLike`):
            Folder of the CLIP base model. Its config and image processor are used, its weights where the original has
            none. Without a preprocessor_config.json, the image processor has CLIP's defaults and the config's size.
        output (`str` or `os.PathLike`):
            Folder to write, new or empty. It is created once it is complete.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`):
            Maximum size of a file of weights, in bytes or as in "5GB".
        progressbar (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`M2PTConfig`]: The configuration of the adapter, with the numbers of prompts in the checkpoint.

    Raises:
        ConversionError: If something is missing, damaged, of another shape than expected, or cannot be converted
            exactly. Nothing is written then.

    Example:

    ```py
    >>> import peft_m2pt
    >>> from peft import PeftModel
    >>> from peft_m2pt.convert import convert_checkpoint
    >>> from transformers import AutoProcessor, LlavaForConditionalGeneration

    >>> config = convert_checkpoint("m2pt-7b", "vicuna-7b-v1.3", "clip-vit-large-patch14", output="converted")
    >>> model = LlavaForConditionalGeneration.from_pretrained("converted/base")
    >>> model = PeftModel.from_pretrained(model, "converted/adapter")
    >>> processor = AutoProcessor.from_pretrained("converted/base")
    ```
    """
    original, language_model, vision_tower, output = map(Path, (original, language_model, vision_tower, output))
    if is_taken(output):
        raise ConversionError(f"{output} exists and is not empty. Choose another output folder.")

    # Everything is checked before anything is written.
    config = make_config(original, language_model, vision_tower)
    official, *frozen = map(Checkpoint, (original, language_model, vision_tower))
    m2pt_config = find_prompts(official, config)
    with torch.device("meta"), _explained("The configs do not make a LLaVA"):
        model = LlavaForConditionalGeneration(config)
    weights = find_weights(model, official, *frozen)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = weights[EMBEDDINGS].planned.dtype
    processor = _make_processor(config, m2pt_config, language_model, vision_tower)
    generation_config = _add_image_token(config, processor.tokenizer, weights)
    files = _split(weights, max_shard_size)

    with atomic_folder(output) as folder:
        config.save_pretrained(folder / "base")
        generation_config.save_pretrained(folder / "base")
        processor.save_pretrained(folder / "base")
        _save_weights(folder / "base", weights, files, progressbar)
        model.name_or_path = model.config.name_or_path = str(output / "base")
        _save_adapter(folder / "adapter", model, m2pt_config, official, weights)
    return m2pt_config


def _make_processor(
    config: LlavaConfig, m2pt_config: M2PTConfig, language_model: Path, vision_tower: Path
) -> LlavaProcessor:
    size = config.vision_config.image_size
    with _explained(f"No tokenizer could be loaded from {language_model}"):
        tokenizer = AutoTokenizer.from_pretrained(language_model, trust_remote_code=False)
    with _explained(f"No image processor could be loaded from {vision_tower}"):
        if (vision_tower / "preprocessor_config.json").is_file():
            image_processor = CLIPImageProcessorPil.from_pretrained(vision_tower)
        else:
            sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
            image_processor = CLIPImageProcessorPil(**sizes)
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    if tokenizer.pad_token is None:
        # As the official training does.
        tokenizer.pad_token = tokenizer.unk_token
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # the class token
        chat_template=tokenizer.chat_template or CHAT_TEMPLATE,
    )
    return adapt_processor(processor, m2pt_config)


def _add_image_token(
    config: LlavaConfig, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Weight]
) -> GenerationConfig:
    """
    Adds an image token to the model, in an unused row of the vocabulary or in a new one.

    The official vocabulary has no such token, so its logit must not matter. Without a bias in the head, no row makes a
    logit small for all inputs. So the new row repeats that of a token which is practically never predicted: greedy
    decoding stays exact, since the first of equal logits wins. Generation suppresses the token.
    """
    text_config = config.text_config
    num_tokens = text_config.vocab_size
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text_config.vocab_size = max(num_tokens, config.image_token_index + 1)
    new_tokens = list(range(num_tokens, text_config.vocab_size))
    silent_tokens = (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, 0)
    silent_token = next(token for token in silent_tokens if token is not None and token < num_tokens)
    # Concatenation copies even without new tokens: the two may be tied, which safetensors does not allow.
    weights[EMBEDDINGS] = weights[EMBEDDINGS].then(
        # Image features replace this embedding.
        lambda rows: torch.cat([rows, rows.new_zeros(len(new_tokens), rows.shape[1])])
    )
    weights[LM_HEAD] = weights[LM_HEAD].then(
        lambda rows: torch.cat([rows, rows[[silent_token]].expand(len(new_tokens), -1)])
    )
    return GenerationConfig(
        bos_token_id=text_config.bos_token_id,
        eos_token_id=text_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=new_tokens or None,
    )


def _split(weights: dict[str, Weight], max_shard_size: int | str) -> StateDictSplit:
    planned = {name: weight.planned for name, weight in weights.items()}
    try:
        return split_torch_state_dict_into_shards(planned, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ConversionError(f"max_shard_size={max_shard_size!r} is not a size: {error}") from error


def _save_weights(folder: Path, weights: dict[str, Weight], files: StateDictSplit, progressbar: bool) -> None:
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    total = files.metadata["total_size"]
    with tqdm(desc="Converting", total=total, unit="B", unit_scale=True, disable=not progressbar) as progress:
        for file, names in files.filename_to_tensors.items():
            tensors = {name: weights[name].make().contiguous() for name in names}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            progress.update(sum(tensor.nbytes for tensor in tensors.values()))
            # Free their memory before the next shard is made.
            del tensors


def _save_adapter(
    folder: Path,
    model: LlavaForConditionalGeneration,
    m2pt_config: M2PTConfig,
    official: Checkpoint,
    weights: dict[str, Weight],
) -> None:
    # The model is on the meta device. Only its connector is needed, which the adapter copies.
    connector = {name: weight.make() for name, weight in weights.items() if name.startswith(CONNECTOR)}
    model.load_state_dict(connector, strict=False, assign=True)
    peft_model = get_peft_model(model, m2pt_config, autocast_adapter_dtype=False)
    for module in peft_model.modules():
        if isinstance(module, M2PTAttention):
            prompt = official.read(PROMPTS[module.site.kind].format(module.site.layer))[0]
            module.m2pt_prompt["default"].load_state_dict({"weight": prompt}, assign=True)
        elif isinstance(module, M2PTConnector) and m2pt_config.num_interaction_tokens > 0:
            # No layer of the official code sees these prompts: all but the first become image tokens.
            prompt = official.read(PROMPTS["visual"].format(find_feature_layer(model.config)))[0, 1:]
            module.m2pt_interaction["default"].load_state_dict({"weight": prompt}, assign=True)
    peft_model.save_pretrained(folder, save_embedding_layers=False)


@contextmanager
def _explained(problem: str) -> Generator[None]:
    """Turns any error of the loaders of transformers into a `ConversionError`."""
    try:
        yield
    except Exception as error:
        raise ConversionError(f"{problem}: {error}") from error
