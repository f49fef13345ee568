"""The methods, each with the one learning rate for all that it trains."""

from __future__ import annotations

from collections.abc import Callable

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_m2pt import M2PTConfig


Adapt = Callable[[PreTrainedModel], nn.Module]


def _m2pt(**kwargs: object) -> Adapt:
    return lambda base: get_peft_model(base, M2PTConfig(**kwargs))


def _lora(base: PreTrainedModel) -> nn.Module:
    targets = r".*(language_model|vision_tower).*\.(q_proj|v_proj)"
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets))


def _connector(base: PreTrainedModel) -> nn.Module:
    base.model.multi_modal_projector.requires_grad_(True)
    return base


METHODS: dict[str, Adapt] = {
    "connector": _connector,
    "lora": _lora,
    "m2pt": _m2pt(),
    "m2pt-prompts": _m2pt(tune_connector=False),
    "m2pt-textual": _m2pt(num_visual_tokens=0),
    "m2pt-random": _m2pt(init_prompts="xavier_uniform"),
    "m2pt-layers": _m2pt(num_interaction_tokens=20),
}
