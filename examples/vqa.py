"""Trains a vision-language model to follow instructions about images, and generates its answers."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    BatchFeature,
    PreTrainedModel,
    PrinterCallback,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


def encode_prompts(processor: ProcessorMixin, rows: list[dict[str, Any]]) -> BatchFeature:
    """Encodes images and instructions up to the answer, padded on the left."""
    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": row["image"]}, {"type": "text", "text": row["instruction"]}],
            }
        ]
        for row in rows
    ]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


@dataclass
class AnswerCollator:
    """
    Batches prompts and answers, with labels for the answers only.

    Args:
        processor (`ProcessorMixin`):
            The processor of the model.
    """

    processor: ProcessorMixin

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        prompts = encode_prompts(self.processor, rows)
        tokenizer = self.processor.tokenizer
        answers = tokenizer(
            [f" {row['answer']}{tokenizer.eos_token}" for row in rows],
            add_special_tokens=False,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        answer_labels = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)
        attention_mask = torch.cat([prompts["attention_mask"], answers["attention_mask"]], dim=1)
        return {
            "pixel_values": prompts["pixel_values"],
            "input_ids": torch.cat([prompts["input_ids"], answers["input_ids"]], dim=1),
            "attention_mask": attention_mask,
            # As `generate` counts them: left padding does not shift positions.
            "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
            "labels": torch.cat([torch.full_like(prompts["input_ids"], -100), answer_labels], dim=1),
        }


def train(
    model: torch.nn.Module, dataset: Dataset, collator: Any, steps: int, learning_rate: float, seed: int, title: str
) -> list[dict[str, float]]:
    """Trains a model with one progress bar. Returns the log of the trainer, with `step` and `loss`."""
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # Nothing is written there; the caller saves.
        save_strategy="no",
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        logging_steps=5,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressBar(title, steps))
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def answer(model: PreTrainedModel, processor: ProcessorMixin, dataset: Dataset, title: str) -> list[str]:
    """Answers every row of a dataset with greedy decoding."""
    model.eval()
    answers = []
    batches = DataLoader(dataset, batch_size=256, collate_fn=partial(encode_prompts, processor))
    for prompts in progress_bar(title, batches):
        tokens = model.generate(**prompts.to(model.device), max_new_tokens=8, do_sample=False)
        new_tokens = tokens[:, prompts["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
    return answers


def progress_bar(title: str, iterable: Iterable | None = None, total: int | None = None) -> tqdm:
    # Log files get few updates, since each one is a new line.
    interval = 0.1 if sys.stderr.isatty() else 15
    return tqdm(iterable, desc=f"{title:<30}", total=total, mininterval=interval, dynamic_ncols=True)


class ProgressBar(TrainerCallback):
    """Shows the progress and loss of a trainer."""

    def __init__(self, title: str, steps: int) -> None:
        self.bar = progress_bar(title, total=steps)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.bar.update()

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()


def save(folder: Path, *parts: Any) -> None:
    """
    Saves anything with `save_pretrained` in a folder that only appears when it is complete.

    Args:
        folder (`Path`):
            The folder, which is replaced if it exists.
        parts (`Any`):
            What to save in it.

    Raises:
        OSError: If saving fails. The previous contents of the folder are kept.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            new, old = Path(temporary, "new"), Path(temporary, "old")
            for part in parts:
                part.save_pretrained(new)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
    except Exception as error:
        # Safetensors and tokenizers raise their own exceptions when the disk is full.
        raise OSError(f"Cannot save {folder}: {error}") from error
