"""Starts training in two processes, with the configurations in examples/accelerate, and checks what comes of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.models import make_llava
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from .train import SAVED_STEP, logits, losses, make_trainer


ROOT = Path(__file__).parents[2]
# Processes that wait for each other for ever fail the test, and not the whole run.
SECONDS = 300


class Expected(NamedTuple):
    """What one process computes on the same batches, from the same base."""

    base: Path
    losses: list[float]
    folder: Path
    init_prompts: str


def train_alone(folder: Path, init_prompts: str) -> Expected:
    base = folder / "base"
    make_llava().save_pretrained(base)
    trainer = make_trainer(base, folder / "run", init_prompts)
    trainer.train()
    return Expected(base, losses(trainer), folder, init_prompts)


def find_free_port() -> int:
    # Port 0 would do with later versions of accelerate; with earlier ones each process takes another port.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(engine: str, base: Path, folder: Path, init_prompts: str) -> dict[str, Any]:
    """Trains in two processes. Returns what the script has written."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "examples" / "accelerate" / f"{engine}.yaml")]
    # What is different on two CPUs.
    command += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", str(find_free_port())]
    command += ["-m", "processes.train", str(base), str(folder), init_prompts]
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate()
        pytest.fail(f"{engine}: no end after {SECONDS} seconds.\n{output}")
    assert process.returncode == 0, output
    return json.loads((folder / "results.json").read_text())


def check(engine: str, expected: Expected, folder: Path) -> None:
    results = launch(engine, expected.base, folder, expected.init_prompts)
    assert results["losses"] == pytest.approx(expected.losses, rel=1e-4)
    assert results["resumed losses"] == pytest.approx(expected.losses, rel=1e-4)

    of_step = {
        run: load_file(run / f"checkpoint-{SAVED_STEP}" / "adapter_model.safetensors")
        for run in (expected.folder / "run", folder / "run")
    }
    alone, together = of_step.values()
    assert together.keys() == alone.keys()
    for name, weight in together.items():
        torch.testing.assert_close(weight, alone[name], rtol=1e-3, atol=1e-3, msg=name)

    files = [path.relative_to(folder / "adapter").as_posix() for path in (folder / "adapter").rglob("*")]
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "training_args.bin"]
    reloaded = PeftModel.from_pretrained(
        LlavaForConditionalGeneration.from_pretrained(expected.base), folder / "adapter"
    )
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    of_adapter = get_peft_model_state_dict(reloaded)
    assert saved.keys() == of_adapter.keys()
    # Without their units, prompts would mean something else.
    assert any(name.endswith(".scale") for name in saved) == (expected.init_prompts == "states")
    torch.testing.assert_close(logits(reloaded), torch.tensor(results["logits"]))
