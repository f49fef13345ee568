"""Refuses, when a server starts, what would not be served exactly."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ...bundles.bundler import ROWS
from .settings import Settings


class CheckBundle(VerifyAndUpdateConfig):
    """What vLLM calls with its config before it starts an engine for a bundle."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        folder = Path(vllm_config.model_config.model)
        Settings(str(folder), _count_prompts(folder), _digest(folder)).store(vllm_config)


def _count_prompts(folder: Path) -> int:
    if not (folder / ROWS).is_file():
        return 0
    with safe_open(folder / ROWS, framework="pt") as file:
        return file.get_slice(next(iter(file.keys()))).get_shape()[0]


def _digest(folder: Path) -> str:
    digest = sha256()
    for name in (SAFETENSORS_WEIGHTS_NAME, ROWS):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
