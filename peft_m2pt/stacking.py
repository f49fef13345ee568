"""M2PT beside adapters of other methods in one model."""

from __future__ import annotations

import warnings
from collections.abc import Container, Generator
from contextlib import contextmanager

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .anatomy.modules import training_wrappers


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model inside of all `PeftModel`s, with its adapters. Any other model is returned unchanged."""
    while isinstance(model, PeftModel):
        model = model.get_base_model()
    return model


def without_transparent_wrappers(model: nn.Module) -> nn.Module:
    """The model inside of `PeftModel`s that only call it, unlike those of prompt tuning or AdaLoRA."""
    while isinstance(model, PeftModel) and _is_transparent(model):
        model = model.get_base_model()
    return model


def _is_transparent(model: PeftModel) -> bool:
    """Whether a `PeftModel` has the outputs of the model inside."""
    return isinstance(model.base_model, BaseTuner) and type(model.base_model).forward is BaseTuner.forward


def check_name_is_free(model: nn.Module, adapter_name: str) -> None:
    """
    Checks that the name of a new adapter is unused.

    Args:
        model (`nn.Module`):
            The model, which may have adapters of any method.
        adapter_name (`str`):
            Name of the new adapter.

    Raises:
        ValueError: If the model has an adapter of this name.
    """
    existing = getattr(model, "peft_config", {}).get(adapter_name)
    if existing is not None:
        raise ValueError(
            f"The model already has an adapter '{adapter_name}' ({existing.peft_type.value}). Use another name, as in "
            f"get_peft_model(model, config, adapter_name='m2pt'), or remove the other adapter first with unload()."
        )


def check_no_alora(model: nn.Module) -> None:
    """
    Checks that a model has no activated LoRA (aLoRA) adapter.

    Args:
        model (`nn.Module`):
            The model, which may have adapters of any method.

    Raises:
        ValueError: If it has one.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        if tokens := getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"Adapter '{name}' has alora_invocation_tokens={tokens}: activated LoRA only changes the tokens after "
                f"these, and prompts are not tokens of the input. Add M2PT to a model without it."
            )


def check_nesting(model: PeftModel, is_own: bool) -> None:
    """
    Checks that weights of other methods are saved under names that can be loaded. PEFT saves the weights of nested
    `PeftModel`s with the prefixes of both.

    Args:
        model (`PeftModel`):
            The outer `PeftModel`, which is being saved.
        is_own (`bool`):
            Whether it is that of M2PT, whose own weights are saved correctly.

    Raises:
        ValueError: If the outer `PeftModel` of two is that of another method.
    """
    inner = model.get_base_model()
    if not isinstance(inner, PeftModel):
        return
    outer_method, inner_method = (type(holder.base_model).__name__ for holder in (model, inner))
    message = (
        f"The PeftModel of {outer_method} wraps that of {inner_method}, so PEFT saves weights of other methods under "
        f"names that no model has. Save them with model.get_base_model().save_pretrained(...)."
    )
    if not is_own:
        raise ValueError(
            f"{message} To save them as usual, add {outer_method} to model.get_base_model(), or add it before M2PT."
        )
    warnings.warn(message)


@contextmanager
def keep_trained_modules(model: nn.Module, own_names: Container[str]) -> Generator[None]:
    """
    Keeps `modules_to_save` of other methods' active adapters in use when M2PT adapters are set. PEFT would deactivate
    them like those of the previous M2PT adapter.
    """
    kept = [
        (wrapper, name, any(weight.requires_grad for weight in _trained_by(wrapper, name)))
        for wrapper in training_wrappers(model)
        for name in wrapper.active_adapters
        if name in wrapper._get_available_adapters() and name not in own_names
    ]
    yield
    for wrapper, name, is_trained in kept:
        if not wrapper.active_adapters:
            wrapper.set_adapter(name, inference_mode=not is_trained)


def _trained_by(wrapper: AuxiliaryTrainingWrapper, adapter_name: str) -> list[nn.Parameter]:
    return [weight for path, weight in wrapper.named_parameters() if adapter_name in path.split(".")]
