"""
M2PT in vLLM, which serves bundles by itself where this package is installed: `vllm serve BUNDLE`.

vLLM finds `register` by an entry point of the group `vllm.general_plugins`, and calls it in each of its processes.

The n textual prompts of each layer are n more tokens in front of each request, whose hidden states the prompts replace
in front of each layer. So vLLM itself computes, pages and shares the keys and values of prompts. The engine adds these
tokens, and users do not see them (`requests.py`). The model gives them the positions -n ... -1 (`model.py`) and puts
the prompts in their place (`parts.py`). Visual prompts and the connector are the layers of this package. `checks.py`
refuses what would not be exact, when a server starts; `settings.py` tells all processes what is served.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from vllm import ModelRegistry

from ...bundles.loading import ARCHITECTURE, MODEL_TYPE, BundleConfig


# Of language models alone, since vLLM asks a class whether it takes images.
TEXT_ARCHITECTURE = f"{ARCHITECTURE}ForText"


class ServedConfig(BundleConfig):
    """The config of a bundle, which makes vLLM choose the model classes of this package."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.m2pt_architectures = config.architectures
        config.architectures = [TEXT_ARCHITECTURE if config.get_text_config() is config else ARCHITECTURE]
        return loaded


def register() -> None:
    """Lets vLLM serve bundles."""
    AutoConfig.register(MODEL_TYPE, ServedConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:M2PTForMultiModalLM")
    ModelRegistry.register_model(TEXT_ARCHITECTURE, f"{__name__}.model:M2PTForCausalLM")
    try:
        from .checks import check_when_started
        from .requests import lengthen_requests
    except (AttributeError, ImportError):
        # Another vLLM. It still serves other models, and the model classes refuse bundles.
        return
    check_when_started(ARCHITECTURE, TEXT_ARCHITECTURE)
    lengthen_requests()
