"""What a model answers, picture by picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .learner import Learner
from .tasks import Instruction, Pictures


# Pictures at once. What a GPU does for each of them costs less than what starts it.
BATCH_SIZES = {"cpu": 50, "cuda": 250}
NOTHING = "-"


@torch.no_grad()
def examine(
    learner: Learner, pictures: Pictures, instructions: Iterable[Instruction], on_batch: Callable[[], object]
) -> dict[str, dict[str, Any]]:
    """
    Asks about pictures.

    Args:
        learner ([`Learner`]):
            The model.
        pictures ([`Pictures`]):
            As [`~Learner.prepare`] makes them.
        instructions (`Iterable[Instruction]`):
            What is asked.
        on_batch (`Callable`):
            Called after each batch of pictures.

    Returns:
        `dict[str, dict]`: for each instruction its candidates; a letter for each picture, that says which of them is
        right, which one the model says word for word ("-" for something else), and which it finds likeliest; the mean
        cross-entropy of the right one; and which one it says without a picture ("blind").
    """
    records = {one.name: _Record(one, pictures) for one in instructions}
    batch_size = BATCH_SIZES[learner.device.type]
    for start in range(0, len(pictures), batch_size):
        asked = [record for record in records.values() if start < record.num_pictures]
        if asked:
            part = pictures.images[start : start + batch_size]
            cache = learner.look(part, len(part))
            for record in asked:
                record.add(*learner.judge(cache, record.instruction.question, record.candidates))
            on_batch()
    blind = learner.look(None, 1)
    return {
        name: {
            **record.results(),
            "blind": _letters(*learner.judge(blind, record.instruction.question, record.candidates))[0],
        }
        for name, record in records.items()
    }


class _Record:
    def __init__(self, instruction: Instruction, pictures: Pictures) -> None:
        self.instruction = instruction
        self.num_pictures = min(instruction.num_pictures, len(pictures))
        answers = [instruction.answer(label) for label in pictures.labels]
        self.candidates = sorted(set(answers))
        self.right = [self.candidates.index(answer) for answer in answers]
        self.said, self.likeliest, self.entropies = "", "", []

    def add(self, likelihoods: torch.Tensor, greedy: torch.Tensor) -> None:
        right = torch.tensor(self.right[len(self.said) : len(self.said) + len(likelihoods)])
        said, likeliest = _letters(likelihoods, greedy)
        self.said, self.likeliest = self.said + said, self.likeliest + likeliest
        self.entropies += (-likelihoods[range(len(right)), right]).tolist()

    def results(self) -> dict[str, Any]:
        number = self.num_pictures
        return {
            "candidates": self.candidates,
            "right": "".join(map(letter, self.right[:number])),
            "said": self.said[:number],
            "likeliest": self.likeliest[:number],
            "entropy": _mean(self.entropies[:number]),
        }


def _mean(values: list[float]) -> float | None:
    """`None` for what is no number: a model that has diverged."""
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else None


def letter(index: int) -> str:
    return chr(ord("a") + index)


def _letters(likelihoods: torch.Tensor, greedy: torch.Tensor) -> tuple[str, str]:
    said = "".join(letter(row.int().argmax()) if row.any() else NOTHING for row in greedy)
    return said, "".join(letter(index) for index in likelihoods.argmax(1))


@torch.no_grad()
def remember(learner: Learner, pictures: Pictures, question: str) -> dict[str, Any]:
    """What is left of what the base model learned: which answers are right word for word, and their cross-entropy."""
    right, entropies = [], []
    batch_size = BATCH_SIZES[learner.device.type]
    for start in range(0, len(pictures), batch_size):
        part = pictures.take(range(start, min(start + batch_size, len(pictures))))
        logits, tokens, samples = learner.answer_logits(part.images, [(question, label) for label in part.labels])
        zeros = torch.zeros(len(part), device=learner.device)
        hits = (logits.argmax(-1) == tokens).float()
        right += zeros.scatter_reduce(0, samples, hits, "prod", include_self=False).int().tolist()
        losses = nn.functional.cross_entropy(logits, tokens, reduction="none")
        entropies += zeros.scatter_add(0, samples, losses).tolist()
    return {"right": "".join(map(str, right)), "entropy": _mean(entropies)}


@torch.no_grad()
def plain_text(learner: Learner, text: str) -> float | None:
    """Cross-entropy of a token of a text, without a picture."""
    ids = learner.ids(text)
    states = learner.read(learner.embed(ids)[None])[0, :-1]
    return _mean(nn.functional.cross_entropy(learner.logits(states), ids[1:], reduction="none").tolist())
