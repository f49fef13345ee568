"""What training costs: seconds and memory, each method in a process of its own, on an otherwise idle machine."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file

from ..report import describe_machine
from .experiments import Experiment
from .folders import write_json
from .learner import Learner
from .run import adapt
from .study import Study
from .tasks import Task
from .training import train


def measure(study: Study, num_steps: int = 12) -> None:
    """
    Measures all methods that have not been measured.

    Args:
        study ([`Study`]):
            The study.
        num_steps (`int`, defaults to 12):
            Steps of training. The first one is not counted.
    """
    processes = multiprocessing.get_context("spawn")
    for base, task in study.tasks.items():
        for experiment in study.of(base):
            file = study.results / base / "costs" / f"{experiment.name.replace('/', '--')}.json"
            if not file.exists() and experiment.training.num_steps:
                task.base(0)
                with processes.Pool(1) as pool:
                    write_json(file, pool.apply(costs_of, (task, experiment, num_steps, study.device)))


def costs_of(task: Task, experiment: Experiment, num_steps: int, device: str) -> dict[str, Any]:
    """Seconds of a step, bytes that training adds at its peak, bytes of what is saved."""
    learner = adapt(task, experiment, 0, device)
    pictures = learner.prepare(task.split(0)["train"])
    before = _forget_peak(device)
    times = [time.perf_counter()]
    few = replace(experiment.training, num_steps=num_steps)
    train(learner, pictures, task.tuned, few, 1e-6, 0, lambda: times.append(time.perf_counter()))
    peak = _peak(device) - before
    return {
        "method": experiment.name,
        "seconds": median(end - start for start, end in islice(zip(times, times[1:]), 1, None)),
        "peak_bytes": peak,
        "file_bytes": _saved_bytes(learner),
        "machine": describe_machine(device),
    }


def _saved_bytes(learner: Learner) -> int:
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(learner.adapted, PeftModel):
            learner.adapted.save_pretrained(folder)
        else:
            save_file(dict(learner.trained), Path(folder, "trained.safetensors"))
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _forget_peak(device: str) -> int:
    """Forgets the peak, since loading a model takes more than it leaves. Returns the bytes in use."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _memory("VmHWM")


def _memory(field: str) -> int:
    """Bytes of this process, as Linux tells them: "VmRSS" now, "VmHWM" at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
