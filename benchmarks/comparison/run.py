"""One run: a method at a learning rate, from a seed."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from ..report import describe_machine
from .evaluation import examine, plain_text, remember
from .experiments import Experiment
from .learner import Learner
from .tasks import Instruction, Pictures, Task
from .training import train


SEARCH, FINAL = "search", "final"


@dataclass(frozen=True)
class Run:
    """
    A run.

    Args:
        base (`str`):
            The base model.
        method (`str`):
            The experiment: "METHOD/VARIANT".
        kind (`str`):
            "search" looks at validation pictures, "final" at test pictures.
        lr (`float`):
            The learning rate.
        seed (`int`):
            Chooses the pictures, their order, and what is initialised at random.
    """

    base: str
    method: str
    kind: str
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"{self.base}, {self.method}, {self.kind}, rate {self.lr:g}, seed {self.seed}"

    def file(self, results: Path) -> Path:
        """Where its result is written."""
        method = self.method.replace("/", "--")
        return results / self.base / self.kind / f"{method}--{self.lr:g}--{self.seed}.json"


def adapt(task: Task, experiment: Experiment, seed: int, device: str) -> Learner:
    """
    The base model of a seed, adapted, on a device ("cpu" or "cuda"). Frozen towers are in the task's dtype, what is
    trained is in float32, and starts as the same numbers on every device.
    """
    folder = task.base(seed)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    for tower in (model.model.vision_tower, model.model.language_model, model.lm_head):
        tower.to(task.dtype)
    model.tie_weights()
    torch.manual_seed(seed)
    adapted = experiment.adapt(model).to(device)
    return Learner(model, AutoTokenizer.from_pretrained(folder), task.template, adapted)


def run(
    settings: Run, task: Task, experiment: Experiment, device: str, say: Callable[[str], object]
) -> dict[str, Any]:
    """
    Does a run.

    Args:
        settings ([`Run`]):
            The run.
        task ([`Task`]), experiment ([`Experiment`]):
            Those that it names.
        device (`str`):
            "cpu" or "cuda".
        say (`Callable`):
            Told from time to time how far it is.

    Returns:
        `dict`: all that is to be known of it, laid out as in PEFT's `method_comparison`.
    """
    start = time.perf_counter()
    training = experiment.training
    learner = adapt(task, experiment, settings.seed, device)
    parts = task.split(settings.seed)
    pictures = learner.prepare(parts["train"])
    steps = iter(range(1, training.num_steps + 1))
    losses = train(
        learner,
        pictures,
        task.tuned,
        training,
        settings.lr,
        settings.seed,
        lambda: say(f"step {next(steps)} of {training.num_steps}"),
    )
    train_time = time.perf_counter() - start
    asked = asked_of(task, settings.kind, is_untuned=not learner.trained)
    metrics = _measure(learner, task, parts, asked, say)
    config = experiment.folder / "adapter_config.json"
    return {
        "run_info": {
            **asdict(settings),
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "total_time": round(time.perf_counter() - start, 1),
            "peft_config": json.loads(config.read_text()) if config.exists() else None,
            "train_config": asdict(training),
            "commit": _commit(),
        },
        "train_info": {
            "status": "success" if len(losses) == training.num_steps else "diverged",
            "train_time": round(train_time, 1),
            "num_trainable_params": sum(parameter.numel() for parameter in learner.trained.values()),
            "num_total_params": sum(parameter.numel() for parameter in learner.adapted.parameters()),
            "losses": losses,
            "metrics": metrics,
        },
        "meta_info": describe_machine(device),
    }


def asked_of(task: Task, kind: str, is_untuned: bool) -> list[Instruction]:
    """
    The instructions of a run. In a search, only tuned ones are asked, about validation pictures; the untuned base is
    asked the others as well, to see which it knew before.
    """
    if kind == FINAL:
        return list(task.instructions)
    chosen = [one for one in task.instructions if one.part == "test"] if is_untuned else task.tuned
    return [replace(one, part="validation") for one in chosen]


def _measure(
    learner: Learner,
    task: Task,
    parts: dict[str, Pictures],
    instructions: list[Instruction],
    say: Callable[[str], object],
) -> dict[str, Any]:
    metrics = {"instructions": {}}
    for part in dict.fromkeys(one.part for one in instructions):
        asked = [one for one in instructions if one.part == part]
        answers = examine(learner, learner.prepare(parts[part]), asked, lambda: say(f"asking about {part} pictures"))
        for one in asked:
            metrics["instructions"][one.name] = {
                "level": one.level,
                "part": part,
                "num_views": parts[part].num_views,
                **answers[one.name],
            }
    metrics["known"] = remember(learner, learner.prepare(parts["known"]), task.known_question)
    metrics["plain_text"] = plain_text(learner, task.plain_text) if task.plain_text else None
    return metrics


def _commit() -> str | None:
    """The commit of the program, if it is run from a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.strip() or None
