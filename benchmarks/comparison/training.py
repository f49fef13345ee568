"""Training: the same steps, pictures, order and instructions for every method."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .experiments import Training
from .learner import Learner
from .tasks import Instruction, Pictures


def one_cycle(step: int, num_steps: int, num_warmup_steps: int, lowest: float = 0.0) -> float:
    """A linear warm-up, and a cosine after it."""
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    done = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * done))


def train(
    learner: Learner,
    pictures: Pictures,
    instructions: list[Instruction],
    training: Training,
    lr: float,
    seed: int,
    on_step: Callable[[], object],
) -> list[float]:
    """
    Trains what a method trains, and returns the loss of each step. It ends early if that is no number any more.

    Args:
        learner ([`Learner`]):
            The model.
        pictures ([`Pictures`]):
            As [`~Learner.prepare`] makes them.
        instructions (`list[Instruction]`):
            Each picture of a step gets one of them.
        training ([`Training`]):
            How to train.
        lr (`float`):
            The learning rate.
        seed (`int`):
            Chooses the order of pictures, and instructions.
        on_step (`Callable`):
            Called after each step.
    """
    if not learner.trained:
        return []
    optimizer = torch.optim.AdamW(learner.trained.values(), lr=lr, weight_decay=training.weight_decay)
    num_warmup_steps = round(training.warmup_share * training.num_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: one_cycle(step, training.num_steps, num_warmup_steps)
    )
    losses = []
    for chosen, asked in batches(len(pictures), instructions, training, seed):
        part = pictures.take(chosen)
        items = [(one.question, one.answer(label)) for one, label in zip(asked, part.labels)]
        logits, tokens, _ = learner.answer_logits(part.images, items)
        loss = nn.functional.cross_entropy(logits, tokens)
        if not loss.isfinite():
            break
        loss.backward()
        nn.utils.clip_grad_norm_(learner.trained.values(), training.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        on_step()
    return losses


def batches(
    num_pictures: int, instructions: list[Instruction], training: Training, seed: int
) -> Iterator[tuple[list[int], list[Instruction]]]:
    """The pictures of each step and their instructions. A picture comes again when all have come."""
    generator, order = random.Random(seed), []
    for _ in range(training.num_steps):
        if len(order) < training.batch_size:
            order = generator.sample(range(num_pictures), num_pictures)
        chosen, order = order[: training.batch_size], order[training.batch_size :]
        yield chosen, [generator.choice(instructions) for _ in chosen]
