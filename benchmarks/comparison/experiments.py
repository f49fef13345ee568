"""
Experiments: a folder `experiments/BASE/METHOD/VARIANT` for each. As in PEFT's `method_comparison`, its
`adapter_config.json` says how the model is adapted, and its `training_params.json` what is different from
`default_training_params.json`. Where there is no adapter, `trained` there is a regular expression for the parameters
that are trained themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

import peft_m2pt  # noqa: F401

from .folders import write_text
from .refusals import StudyError


FOLDER = Path(__file__).parent / "experiments"


@dataclass(frozen=True)
class Training:
    """
    How a model is trained.

    Args:
        num_steps (`int`), batch_size (`int`):
            Steps, and pictures in each of them, with one instruction for each picture.
        warmup_share (`float`):
            The share of steps in which the rate rises; then it falls as a cosine.
        weight_decay (`float`):
            Of AdamW.
        max_grad_norm (`float`):
            Where the gradient of everything that is trained is clipped, as one.
        rates (`list[float]`):
            Learning rates that are tried. More are tried in the same steps where the best one lies at an end.
        search_seeds (`list[int]`), seeds (`list[int]`):
            With which rates are searched, and with which a method is tested.
        trained (`str`, *optional*):
            Without an adapter: a regular expression for the names of the parameters that are trained.
        lr (`float`, *optional*):
            The learning rate, for all that is trained. `None`: it has not been chosen.
        chosen (`dict`, *optional*):
            By what the rate was chosen.
    """

    num_steps: int
    batch_size: int
    warmup_share: float
    weight_decay: float
    max_grad_norm: float
    rates: list[float]
    search_seeds: list[int]
    seeds: list[int]
    trained: str | None = None
    lr: float | None = None
    chosen: dict[str, Any] | None = None


@dataclass(frozen=True)
class Experiment:
    """
    A method in one variant.

    Args:
        folder (`Path`):
            Where its files are.
        name (`str`):
            "METHOD/VARIANT".
        training (`Training`):
            How it is trained.
    """

    folder: Path
    name: str
    training: Training

    @classmethod
    def read(cls, folder: Path) -> Experiment:
        default, own = (
            json.loads(file.read_text())
            for file in (folder.parents[1] / "default_training_params.json", folder / "training_params.json")
        )
        return cls(folder, f"{folder.parent.name}/{folder.name}", Training(**{**default, **own}))

    @property
    def config(self) -> PeftConfig | None:
        """A new one, since a model completes its config."""
        return PeftConfig.from_pretrained(str(self.folder)) if (self.folder / "adapter_config.json").exists() else None

    def adapt(self, model: PreTrainedModel) -> nn.Module:
        """Adapts a frozen model in place. Returns what the method puts around it, or the model."""
        if self.config is not None:
            return get_peft_model(model, self.config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(re.search(self.training.trained, name)))
        return model

    def choose(self, lr: float, chosen: dict[str, Any]) -> None:
        """Writes down a learning rate, and by what it was chosen."""
        file = self.folder / "training_params.json"
        own = {**json.loads(file.read_text()), "lr": lr, "chosen": chosen}
        write_text(file, json.dumps(own, indent=2) + "\n")


def experiments_of(base: str, methods: Iterable[str] = (), folder: Path = FOLDER) -> list[Experiment]:
    """
    The experiments of a base.

    Args:
        base (`str`):
            Its name.
        methods (`Iterable[str]`, *optional*):
            Only these: "METHOD" for all its variants, or "METHOD/VARIANT".
        folder (`Path`, *optional*):
            Where the experiments of all bases are.

    Raises:
        StudyError: If there are none of a name.
    """
    files = sorted((folder / base).glob("*/*/training_params.json"))
    every = [Experiment.read(file.parent) for file in files]
    wanted = []
    for method in methods:
        found = [experiment for experiment in every if method in (experiment.name, experiment.folder.parent.name)]
        if not found:
            raise StudyError(f"Base {base} has no method {method}. It has {', '.join(e.name for e in every)}.")
        wanted += found
    return wanted or every
