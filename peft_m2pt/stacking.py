"""M2PT beside adapters of other methods in one model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from .base import M2PTLayer
from .config import M2PTConfig
from .samples import BASE
from .wrappers import training_wrappers


WRAPPER_PREFIX = "base_model.model."


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model inside of a `PeftModel`, with the adapters that it has. Any other model is returned as it is."""
    while isinstance(model, PeftModel):
        model = model.get_base_model()
    return model


def without_passing_wrappers(model: nn.Module) -> nn.Module:
    """
    The model inside of `PeftModel`s that do no more than to call it. Prompt tuning and AdaLoRA compute something
    themselves, for example.
    """
    while isinstance(model, PeftModel) and _passes(model):
        model = model.get_base_model()
    return model


def _passes(model: PeftModel) -> bool:
    """Whether a `PeftModel` gives what the model inside gives, which has the adapters in it."""
    return isinstance(model.base_model, BaseTuner) and type(model.base_model).forward is BaseTuner.forward


def wrapper_prefix(model: nn.Module) -> str:
    """What a model's `PeftModel`s, of which there may be one inside of the other, put in front of names in it."""
    prefix = ""
    while isinstance(model, PeftModel):
        prefix += WRAPPER_PREFIX
        model = model.get_base_model()
    return prefix


def without_prefix(name: str) -> str:
    """A weight's name in the model itself, so that checkpoints do not tell of stacking."""
    return re.sub(rf"^({re.escape(WRAPPER_PREFIX)})+", "", name)


def check_name(adapter_name: str) -> None:
    """
    Checks that a name is one that an adapter can have.

    Raises:
        ValueError: If it is not.
    """
    if not adapter_name or "." in adapter_name or adapter_name == BASE or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r}: an adapter cannot have this name. Names have no dots, are none of "
            f"torch.nn.ModuleDict's own, such as 'keys', and {BASE!r} stands for no adapter."
        )


def check_name_is_free(model: nn.Module, adapter_name: str) -> None:
    """
    Checks that an adapter gets a name of its own.

    Args:
        model (`nn.Module`):
            The model, which may have adapters of any method.
        adapter_name (`str`):
            Name of an adapter to be.

    Raises:
        ValueError: If the model has an adapter of this name.
    """
    existing = getattr(model, "peft_config", {}).get(adapter_name)
    if existing is not None:
        raise ValueError(
            f"The model already has an adapter '{adapter_name}' ({existing.peft_type.value}). Give this one another "
            f"name, as in get_peft_model(model, config, adapter_name='m2pt'), or remove the other first with unload()."
        )


def check_no_invocations(model: nn.Module) -> None:
    """
    Checks that no adapter of a model is one that some tokens of an input call for.

    Args:
        model (`nn.Module`):
            The model, which may have adapters of any method.

    Raises:
        ValueError: If one is.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        if tokens := getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"Adapter '{name}' has alora_invocation_tokens={tokens}: activated LoRA changes the tokens behind "
                f"these, and prompts are no tokens of the input. Add M2PT to a model without it."
            )


def check_nesting(model: PeftModel, is_own: bool) -> None:
    """
    Checks that what other methods have added to a model is saved under names that can be loaded. PEFT puts the names
    of two `PeftModel`s, one inside of the other, into those of their weights.

    Args:
        model (`PeftModel`):
            The outer `PeftModel`, which is being saved.
        is_own (`bool`):
            Whether it is that of M2PT, so that all that it writes of M2PT is right.

    Raises:
        ValueError: If there is another `PeftModel` in that of another method.
    """
    inner = model.get_base_model()
    if not isinstance(inner, PeftModel):
        return
    outer_method, inner_method = (type(holder.base_model).__name__ for holder in (model, inner))
    message = (
        f"The PeftModel of {outer_method} stands around that of {inner_method}, so that PEFT writes weights of other "
        f"methods under names that no model has. Save them with model.get_base_model().save_pretrained(...)."
    )
    if not is_own:
        raise ValueError(
            f"{message} To save them as usual, add {outer_method} to model.get_base_model(), or add it first, and "
            f"M2PT then."
        )
    warnings.warn(message)


class RefuseLaterAdapters:
    """
    Refuses to run a model to which another method was added after M2PT, if it has passed over a part of its modules.

    PEFT takes what is inside of an adapted module for parts of the adapter, so it finds no linear layer there. This is
    a forward pre-hook for the model.

    Args:
        layer ([`~peft_m2pt.base.M2PTLayer`]):
            A layer with prompts.
        configs (`dict[str, PeftConfig]`):
            The adapters of the model, to which PEFT adds those that come later.
    """

    def __init__(self, layer: M2PTLayer, configs: dict[str, PeftConfig]) -> None:
        self.layer = layer
        self.configs = configs
        self.checked = dict(configs)
        self.wrappers: list[AuxiliaryTrainingWrapper] = []

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self.checked = {name: config for name, config in self.checked.items() if name in self.configs}
        for name, config in self.configs.items():
            if self.checked.get(name) is config:
                continue
            if not isinstance(config, M2PTConfig):
                self._check(model, name, config)
            self.checked[name] = config
            self.wrappers = list(training_wrappers(model))
        for wrapper in self.wrappers:
            if not wrapper.active_adapters:
                self._bring_back(wrapper)

    def _bring_back(self, wrapper: AuxiliaryTrainingWrapper) -> None:
        """Uses what an active M2PT adapter has trained, which PEFT leaves aside when it sets an adapter on top."""
        for name in self.layer.active_adapters:
            if name in wrapper._get_available_adapters():
                wrapper.set_adapter(name, inference_mode=self.configs[name].inference_mode)

    def _check(self, model: nn.Module, name: str, config: PeftConfig) -> None:
        if isinstance(self.checked.get(name), M2PTConfig):
            raise ValueError(
                f"Adapter '{name}' ({config.peft_type.value}) has the name of an M2PT adapter of the same model. Give "
                f"it another name."
            )
        for path, module in model.named_modules():
            if not isinstance(module, M2PTLayer):
                continue
            for part, _ in module.base_layer.named_modules():
                if check_target_module_exists(config, f"{path}.{part}".strip(".")):
                    raise ValueError(
                        f"Adapter '{name}' ({config.peft_type.value}) was added after M2PT, and PEFT has passed over "
                        f"'{path}.{part}', since M2PT has adapted '{path}'. Add it to the model first, and M2PT then."
                    )


@contextmanager
def keeping_trained_modules(model: nn.Module, own_names: Container[str]) -> Iterator[None]:
    """
    Keeps in use what active adapters of other methods have trained (`modules_to_save`), while adapters of M2PT are
    set. PEFT would leave it aside, as if it belonged to an M2PT adapter that was set before.

    Args:
        model (`nn.Module`):
            The model.
        own_names (`Container[str]`):
            Names of the M2PT adapters.
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


def refuse_later_adapters(model: nn.Module, layer: M2PTLayer, configs: dict[str, PeftConfig]) -> list[RemovableHandle]:
    """Hangs a [`RefuseLaterAdapters`] on a model, unless there is one."""
    if any(isinstance(hook, RefuseLaterAdapters) for hook in model._forward_pre_hooks.values()):
        return []
    return [model.register_forward_pre_hook(RefuseLaterAdapters(layer, configs))]
