"""
M2PT in vLLM, which serves bundles by itself where this package is installed: `vllm serve BUNDLE`.

vLLM finds `register` by an entry point of the group `vllm.general_plugins`, and calls it in each of its processes.

The n textual prompts of each layer are n more tokens in front of each request, whose hidden states the rows in the
bundle replace in each layer. So vLLM itself computes, pages and shares the keys and values of prompts. Users do not see
these tokens: the engine puts them there (`requests.py`), the model gives them positions -n ... -1 (`model.py`). Visual
prompts and the connector are the layers of this package (`encoder.py`). `checks.py` refuses what would not be exact.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from ...bundles.loading import ARCHITECTURE, MODEL_TYPE, BundleConfig
from .checks import CheckBundle
from .requests import lengthen_requests


# Language models alone are another architecture, since vLLM asks a class whether it takes images.
TEXT_ARCHITECTURE = f"{ARCHITECTURE}ForText"


class ServedConfig(BundleConfig):
    """The config of a bundle, which makes vLLM choose the model classes of this package."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.m2pt_architectures = config.architectures
        config.architectures = [ARCHITECTURE if _takes_images(config) else TEXT_ARCHITECTURE]
        return loaded


def _takes_images(config: PretrainedConfig) -> bool:
    return config.get_text_config() is not config


def register() -> None:
    """Lets vLLM serve bundles."""
    AutoConfig.register(MODEL_TYPE, ServedConfig, exist_ok=True)
    for architecture, class_name in ((ARCHITECTURE, "M2PTForMultiModalLM"), (TEXT_ARCHITECTURE, "M2PTForCausalLM")):
        ModelRegistry.register_model(architecture, f"{__name__}.model:{class_name}")
        MODELS_CONFIG_MAP[architecture] = CheckBundle
    lengthen_requests()
