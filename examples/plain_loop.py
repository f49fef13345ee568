"""
A loop of one's own with accelerate alone, without a trainer, on data as in conversations.py.

    python examples/plain_loop.py llava-hf/llava-1.5-7b-hf my.json my-adapter
    accelerate launch examples/plain_loop.py llava-hf/llava-1.5-7b-hf my.json my-adapter
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from answers import AnswerCollator
from conversations import Conversations, ImageReader, kinds_of, load
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, get_cosine_schedule_with_warmup, set_seed

from peft_m2pt import M2PTConfig, get_parameter_groups


def train(name: str, data: str, output: str, epochs: int = 3, batch_size: int = 8, rate: float = 3e-3) -> None:
    accelerator = Accelerator()
    set_seed(0)
    processor = AutoProcessor.from_pretrained(name)
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    model = get_peft_model(model, M2PTConfig(num_visual_tokens=20, num_textual_tokens=10))
    model.gradient_checkpointing_enable()
    model.train()  # Models are loaded for inference, in which nothing is checkpointed.

    reader = ImageReader(Path(data).parent, "error", Path(output, "bad_images.jsonl"), kinds_of(processor))
    rows = Conversations(load(data, "train", streaming=False), reader)
    collator = AnswerCollator(processor, model.generation_config)
    loader = DataLoader(rows, batch_size=batch_size, shuffle=True, collate_fn=collator)
    optimizer = torch.optim.AdamW(get_parameter_groups(model, lr=rate))
    steps = epochs * len(loader)
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(0.03 * steps), steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    for epoch in range(epochs):
        for step, batch in enumerate(loader):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            accelerator.print(f"epoch {epoch}, step {step}: loss {loss.item():.3f}")

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output)
        processor.save_pretrained(output)


if __name__ == "__main__":
    train(*sys.argv[1:])
