"""Conversations with several images, images in later turns and videos, and tiny models of families that take them."""

from __future__ import annotations

import json

import torch
import transformers as tr
from PIL import Image

from helpers.shapes import COLOURS, IMAGE_SIZE, TEMPLATE, make_processor


IMAGES = ["several images", "later turns", "text"]
# Writes videos as it writes images.
VIDEO_TEMPLATE = TEMPLATE.replace(
    "'<image>\n' if part['type'] == 'image' else part['text']",
    "part['text'] if part['type'] == 'text' else '<' + part['type'] + '>\n'",
)
ANYRES = {"image_grid_pinpoints": [[16, 32], [48, 16]]}
SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
}


def make_rows(folder, kinds, number=12):
    """
    Makes images in a folder, and rows about them.

    Args:
        folder (`Path`):
            The folder.
        kinds (`list[str]`):
            What the rows show, in turn: "several images", "later turns", "text", "frames".
        number (`int`):
            How many rows.
    """
    folder.mkdir()
    for i, colour in enumerate(COLOURS.values()):
        Image.new("RGB", (20 + 4 * i, 18), colour).save(folder / f"{i}.png")
        Image.new("RGB", (20, 18), colour).save(folder / f"frame-{i}.png")
    names = list(COLOURS)
    rows = []
    for i in range(number):
        first, second = i % 4, (i + 1 + i // 4) % 4
        files = [f"{first}.png", f"{second}.png"]
        frames = [f"frame-{i}.png" for i in (first, first, second, second)]
        questions, show = {
            "several images": (["<image> and <image>\nWhich colour is it?"], {"images": files}),
            "later turns": (["<image>\nWhich colour is it?", "And <image>?", "Is it red?"], {"images": files}),
            "text": (["Is it red?"], {}),
            "frames": (["<video>\nWhich colour is it?"], {"videos": [frames]}),
        }[kinds[i % len(kinds)]]
        turns = [
            turn
            for question, answer in zip(questions, (names[first], names[second], "no"))
            for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
        ]
        rows.append({"id": str(i), "conversations": turns, **show})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return rows


def make_tokenizer(*special_tokens):
    tokenizer = make_processor().tokenizer
    tokenizer.add_tokens(list(special_tokens), special_tokens=True)
    return tokenizer


def text_sizes(tokenizer, **kwargs):
    return {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.1,
        **kwargs,
    }


def llava():
    processor = make_processor()
    config = tr.LlavaConfig(
        vision_config=tr.CLIPVisionConfig(**{**VISION, "num_hidden_layers": 3}),
        text_config=tr.LlamaConfig(**text_sizes(processor.tokenizer)),
        image_token_index=processor.image_token_id,
    )
    return tr.LlavaForConditionalGeneration, config, processor


def llava_next():
    """Images are cut into tiles, so each takes a number of tokens of its own."""
    tokenizer = make_tokenizer()
    image_processor = tr.LlavaNextImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=SIZE, **ANYRES)
    processor = tr.LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    config = tr.LlavaNextConfig(
        vision_config=tr.CLIPVisionConfig(**{**VISION, "num_hidden_layers": 3}),
        text_config=tr.LlamaConfig(**text_sizes(tokenizer)),
        image_token_index=processor.image_token_id,
        **ANYRES,
    )
    return tr.LlavaNextForConditionalGeneration, config, processor


def idefics3():
    tokenizer = make_tokenizer("<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    edge = {"longest_edge": IMAGE_SIZE}
    image_processor = tr.Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    processor = tr.Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=TEMPLATE)
    config = tr.Idefics3Config(
        vision_config={**VISION, "patch_size": 4},
        text_config=tr.LlamaConfig(**text_sizes(tokenizer)),
        image_token_id=processor.image_token_id,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tr.Idefics3ForConditionalGeneration, config, processor


def mllama():
    """Images are looked at by layers of their own. All samples of a batch have some, or none has."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<end>"
    image_processor = tr.MllamaImageProcessorPil(size=SIZE, max_image_tiles=2)
    processor = tr.MllamaProcessor(image_processor, tokenizer, chat_template="{{ bos_token }}" + TEMPLATE)
    config = tr.MllamaConfig(
        vision_config=tr.MllamaVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=8,
            max_num_tiles=2,
            supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
            intermediate_layers_indices=[0],
            vision_output_dim=64,
        ),
        text_config=tr.MllamaTextConfig(
            **text_sizes(tokenizer, bos_token_id=tokenizer.bos_token_id, num_hidden_layers=3),
            cross_attention_layers=[1],
        ),
        image_token_index=processor.image_token_id,
    )
    return tr.MllamaForConditionalGeneration, config, processor


def llava_onevision(processor_class):
    """With one token for each frame of a video and one behind it."""
    tokenizer = make_tokenizer("<video>")
    processor = processor_class(tokenizer)
    config = tr.LlavaOnevisionConfig(
        vision_config=tr.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tr.Qwen2Config(**text_sizes(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        **ANYRES,
    )
    return tr.LlavaOnevisionForConditionalGeneration, config, processor


def answers_in(batch, tokenizer):
    """What the labels of each sample say."""
    return [tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]


def answers_of(samples):
    return [
        "".join(
            f" {message['content'][0]['text']}</s>" for message in sample["messages"] if message["role"] == "assistant"
        )
        for sample in samples
    ]


def save(family, folder):
    """Saves a tiny model and its processor."""
    model_class, config, processor = family()
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    processor.save_pretrained(folder)
