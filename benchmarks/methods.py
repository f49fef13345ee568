"""The methods that are compared: how a model is adapted by each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_m2pt import M2PTConfig

from .lengthening import lengthen
from .models import Llava, QwenVL


NUMBERS = ((20, 10), (100, 100), (0, 10))


@dataclass(frozen=True)
class Method:
    """
    A way to adapt a model.

    Args:
        name (`str`):
            Name in the table.
        adapt (`Callable`):
            Adapts a model and returns it. It may change it in place.
        trains (`bool`, defaults to `True`):
            Whether there is something to train.
        num_more_image_tokens (`int`, defaults to 0):
            Placeholders that its inputs have besides those of the image.
    """

    name: str
    adapt: Callable[[PreTrainedModel], nn.Module]
    trains: bool = True
    num_more_image_tokens: int = 0

    def apply(self, base: PreTrainedModel) -> nn.Module:
        """Adapts a copy of a model, which shares its weights."""
        return self.adapt(copy_sharing_weights(base))


def copy_sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a frozen model whose weights are those of the model."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def base_model() -> Method:
    return Method("base", lambda model: model, trains=False)


def m2pt(num_visual_tokens: int, num_textual_tokens: int) -> Method:
    """M2PT with all that it has: interaction prompts in the layers and a tuned connector."""
    config = M2PTConfig(
        num_visual_tokens=num_visual_tokens,
        num_textual_tokens=num_textual_tokens,
        num_interaction_tokens=num_visual_tokens,
        interaction_placement="layers",
        tune_connector=True,
        connector_rank=None,
        init_prompts="xavier_uniform",
    )
    return Method(f"M2PT {num_visual_tokens, num_textual_tokens}", lambda model: get_peft_model(model, config))


def prompts_only(num_visual_tokens: int, num_textual_tokens: int) -> Method:
    """M2PT without interaction prompts, and with the frozen connector."""
    config = M2PTConfig(
        num_visual_tokens=num_visual_tokens,
        num_textual_tokens=num_textual_tokens,
        num_interaction_tokens=0,
        tune_connector=False,
        init_prompts="xavier_uniform",
    )
    name = f"M2PT {num_visual_tokens, num_textual_tokens}, prompts only"
    return Method(name, lambda model: get_peft_model(model, config))


def lengthened(num_visual_tokens: int, num_textual_tokens: int) -> Method:
    """M2PT by longer sequences, as the official code does it: visual prompts go on through the tuned connector."""
    name = f"lengthening {num_visual_tokens, num_textual_tokens}"
    return Method(
        name,
        lambda model: lengthen(model, num_visual_tokens, num_textual_tokens, through_connector=True),
        num_more_image_tokens=num_visual_tokens,
    )


def lengthened_prompts_only(num_visual_tokens: int, num_textual_tokens: int) -> Method:
    """M2PT by longer sequences, without interaction prompts, and with the frozen connector."""
    name = f"lengthening {num_visual_tokens, num_textual_tokens}, prompts only"
    return Method(name, lambda model: lengthen(model, num_visual_tokens, num_textual_tokens, through_connector=False))


def lora(dims: Llava | QwenVL) -> Method:
    """LoRA on queries and values of both towers."""
    config = LoraConfig(r=8, target_modules=dims.lora_targets)
    return Method("LoRA r=8", lambda model: get_peft_model(model, config))


def prefix_tuning(num_virtual_tokens: int) -> Method:
    """PEFT's prefix tuning, which is for the language model alone. It takes the whole model all the same."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)
    return Method(f"prefix tuning {num_virtual_tokens}", lambda model: get_peft_model(model, config))


def all_methods(dims: Llava | QwenVL) -> list[Method]:
    """Every row of the table."""
    methods = [base_model(), lora(dims), prefix_tuning(10)]
    for numbers in NUMBERS:
        methods += [m2pt(*numbers), prompts_only(*numbers)]
        if isinstance(dims, Llava):
            methods += [lengthened(*numbers), lengthened_prompts_only(*numbers)]
    return methods


def growing_methods(dims: Llava | QwenVL) -> list[Method]:
    """The rows that are measured again with more samples and longer sequences."""
    methods = [lora(dims), m2pt(20, 10), m2pt(100, 100)]
    return [*methods, lengthened(100, 100)] if isinstance(dims, Llava) else methods
