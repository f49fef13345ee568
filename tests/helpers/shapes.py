"""Questions about coloured shapes, a tiny LLaVA with its processor for them, and runs of examples/train.py."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)


EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGE_SIZE = 16
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 60, 230), "yellow": (230, 220, 40)}
SHAPES = {"circle": ImageDraw.ImageDraw.ellipse, "square": ImageDraw.ImageDraw.rectangle}
TASKS = {
    "colour": ("Which colour is it?", lambda colour, shape: colour),
    "shape": ("Which shape is it?", lambda colour, shape: shape),
    "is_red": ("Is it red?", lambda colour, shape: "yes" if colour == "red" else "no"),
}
TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'].upper() }}:{{ ' ' }}
{%- for part in message['content'] -%}
{{ '<image>\n' if part['type'] == 'image' else part['text'] }}
{%- endfor -%}
{{ ' ' if message['role'] == 'user' else eos_token }}
{%- endfor -%}
{{ 'ASSISTANT:' if add_generation_prompt }}"""


def draw(folder, number=200):
    """Draws images and writes questions about them, in the layout of Vision-Flan. Returns the rows."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(number):
        colour, shape = list(COLOURS)[i % 4], list(SHAPES)[i // 4 % 2]
        image = Image.new("RGB", (24, 20 + i % 3), (0, 0, 0))
        SHAPES[shape](ImageDraw.Draw(image), (3, 3, 18, 18), fill=COLOURS[colour])
        image.save(folder / "images" / f"{i}.png")
        task = list(TASKS)[i % 3]
        question, answer = TASKS[task]
        turns = [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer(colour, shape)},
        ]
        rows.append({"id": f"{task}_{i}", "image": f"{i}.png", "task_name": task, "conversations": turns})
    (folder / "annotation.json").write_text(json.dumps(rows))
    return rows


def make_processor(template=TEMPLATE):
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<image>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    questions = [
        f"USER: \n{question} ASSISTANT: {word}" for question, _ in TASKS.values() for word in [*COLOURS, *SHAPES]
    ]
    tokenizer.train_from_iterator(questions, trainer)
    return LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            eos_token="</s>",
            extra_special_tokens={"image_token": "<image>"},
        ),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def make_model(processor, width=32):
    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=IMAGE_SIZE,
                patch_size=8,
            ),
            text_config=LlamaConfig(
                hidden_size=2 * width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=len(tokenizer),
                max_position_embeddings=256,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                initializer_range=0.1,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )


def import_examples(monkeypatch, tmp_path):
    """Returns the modules of the script, with a cache of their own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import answers
    import conversations
    import train

    return SimpleNamespace(answers=answers, conversations=conversations, train=train)


def teach_words(model, processor, steps=40):
    """Makes a model give answers that fit the questions, but not the images."""
    generator = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        tasks = generator.choices(list(TASKS.values()), k=8)
        seen = [(generator.choice(list(COLOURS)), generator.choice(list(SHAPES))) for _ in tasks]
        texts = [f"USER: {question} ASSISTANT: {answer(*what)}</s>" for (question, answer), what in zip(tasks, seen)]
        inputs = processor.tokenizer(texts, padding=True, return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def user(*parts):
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def assistant(answer):
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}


def write(path, rows):
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    return path


def run_here(examples, monkeypatch, folder, output, **options):
    """Runs the script in this process. Returns its scores."""
    options = {
        "model_name_or_path": folder / "model",
        "train_data": folder / "data/annotation.json",
        "image_folder": folder / "data/images",
        "eval_size": 8,
        "output_dir": output,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_new_tokens": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    examples.train.main()
    return json.loads((output / "eval_results.json").read_text())


def make_collator(examples, template=TEMPLATE, **kwargs):
    processor = make_processor(template)
    end_of_turn = processor.tokenizer.convert_tokens_to_ids("<end>")
    config = GenerationConfig(eos_token_id=[end_of_turn, 1])
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    return examples.answers.AnswerCollator(processor, config, {"image": image_token}, **kwargs)
