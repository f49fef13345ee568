"""One run: a method, a learning rate and a seed under the budget."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from . import clothing
from .base import answer_logits, image_features, one_cycle, rows
from .clothing import HELD_OUT, INSTRUCTIONS, PLAIN_TEXT, TUNED, Pictures
from .methods import METHODS


@dataclass(frozen=True)
class Budget:
    """
    What every method gets.

    Args:
        num_steps (`int`):
            Steps of training.
        batch_size (`int`):
            Pictures in a step, each with one of the tuned instructions.
        num_train (`int`), num_validation (`int`), num_test (`int`):
            Pictures.
        max_grad_norm (`float`):
            Where the gradient of everything that is trained is clipped, as one.
    """

    num_steps: int = 150
    batch_size: int = 16
    num_train: int = 2000
    num_validation: int = 200
    num_test: int = 200
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Run:
    """
    One run.

    Args:
        method (`str`):
            Its name in `METHODS`.
        lr (`float`):
            The learning rate.
        seed (`int`):
            Chooses pictures, their order, and what is initialised at random.
        final (`bool`):
            Whether test pictures are looked at. Learning rates are chosen by validation alone.
    """

    method: str
    lr: float
    seed: int
    final: bool

    @property
    def name(self) -> str:
        return f"{self.method}-{self.lr:g}-{self.seed}" + ("" if self.final else "-search")


class Learner:
    """
    A model that answers questions about pictures. The towers compute in bfloat16, what is trained is in float32.

    Args:
        folder (`Path`):
            The base model.
        method (`str`):
            What is trained.
        seed (`int`):
            For what is initialised at random.
    """

    def __init__(self, folder: Path, method: str, seed: int) -> None:
        base = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
        for tower in (base.model.vision_tower, base.model.language_model, base.lm_head):
            tower.to(torch.bfloat16)
        base.tie_weights()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        torch.manual_seed(seed)
        # Nothing here has dropout, and frozen towers are to stay as they are.
        self.adapted = METHODS[method](base).eval()
        self.model = base
        self.trained = {n: p for n, p in self.adapted.named_parameters() if p.requires_grad}
        self.sees_anew = any("vision_tower" in name for name in self.trained)

    def prepare(self, pictures: Pictures) -> Pictures:
        """Pictures as they are needed: their features, if training does not change them."""
        if self.sees_anew:
            return pictures
        with torch.no_grad():
            features = [image_features(self.model, part) for part in pictures.images.split(100)]
        return Pictures(torch.cat(features), pictures.labels)

    def logits(self, pictures: Pictures, instructions: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        items = [(name, INSTRUCTIONS[name](label)) for name, label in zip(instructions, pictures.labels)]
        features = image_features(self.model, pictures.images) if self.sees_anew else pictures.images
        return answer_logits(self.model, features, *rows(self.tokenizer, items))

    @torch.no_grad()
    def evaluate(self, pictures: Pictures, instructions: Iterable[str]) -> dict[str, dict[str, float]]:
        """For each instruction the share of exact answers, and the mean cross-entropy of an answer."""
        scores = {}
        for instruction in instructions:
            exact, entropy = [], []
            for start in range(0, len(pictures), 50):
                part = pictures.take(range(start, min(start + 50, len(pictures))))
                logits, labels, samples = self.logits(part, [instruction] * len(part))
                hits, zeros = (logits.argmax(-1) == labels).float(), torch.zeros(len(part))
                exact += zeros.scatter_reduce(0, samples, hits, "prod", include_self=False).tolist()
                losses = nn.functional.cross_entropy(logits, labels, reduction="none")
                entropy += zeros.scatter_add(0, samples, losses).tolist()
            scores[instruction] = {"exact": sum(exact) / len(exact), "entropy": sum(entropy) / len(entropy)}
        return scores

    @torch.no_grad()
    def plain_text(self) -> float:
        """Cross-entropy of a token of plain English, without a picture."""
        ids = self.tokenizer(PLAIN_TEXT, add_special_tokens=False, return_tensors="pt").input_ids
        states = self.model.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
        return nn.functional.cross_entropy(self.model.lm_head(states[0, :-1]).float(), ids[0, 1:]).item()

    def train(self, pictures: Pictures, run: Run, budget: Budget) -> list[float]:
        """Returns the loss of each step."""
        optimizer = torch.optim.AdamW(self.trained.values(), lr=run.lr, weight_decay=0.0)
        num_warmup_steps = budget.num_steps // 10
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: one_cycle(step, budget.num_steps, num_warmup_steps)
        )
        generator, order, losses = random.Random(run.seed), [], []
        for _ in range(budget.num_steps):
            if len(order) < budget.batch_size:
                order = generator.sample(range(len(pictures)), len(pictures))
            chosen, order = order[: budget.batch_size], order[budget.batch_size :]
            instructions = [generator.choice(list(TUNED)) for _ in chosen]
            logits, labels, _ = self.logits(pictures.take(chosen), instructions)
            loss = nn.functional.cross_entropy(logits, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained.values(), budget.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(round(loss.item(), 4))
        return losses


def run(settings: Run, budget: Budget, packages: Path, base: Path) -> dict[str, Any]:
    """Does a run and returns all that is to be known of it."""
    start = time.time()
    learner = Learner(base, settings.method, settings.seed)
    parts = clothing.split(packages, settings.seed, budget.num_train, budget.num_validation, budget.num_test)
    evaluated = learner.prepare(parts["test" if settings.final else "validation"])
    instructions = INSTRUCTIONS if settings.final else TUNED
    first = next(iter(TUNED))
    before = {"plain text": learner.plain_text(), **learner.evaluate(evaluated.take(range(50)), [first])}
    losses = learner.train(learner.prepare(parts["train"]), settings, budget)
    scores = learner.evaluate(evaluated, instructions)
    return {
        "run": asdict(settings),
        "budget": asdict(budget),
        "parameters": sum(parameter.numel() for parameter in learner.trained.values()),
        "before": before,
        "losses": losses,
        "scores": scores,
        "tuned": _mean(scores, TUNED),
        "held out": _mean(scores, HELD_OUT) if settings.final else None,
        "plain text": learner.plain_text(),
        "seconds": round(time.time() - start),
        "threads": torch.get_num_threads(),
    }


def _mean(scores: dict[str, dict[str, float]], instructions: Iterable[str]) -> dict[str, float]:
    chosen = [scores[name] for name in instructions]
    return {kind: sum(score[kind] for score in chosen) / len(chosen) for kind in ("exact", "entropy")}
