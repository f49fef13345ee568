"""Adapters of other methods that are added after M2PT."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..anatomy.modules import training_wrappers
from ..config import M2PTConfig
from ..layers.base import M2PTLayer


class RefuseLaterAdapters:
    """
    Refuses to run a model with an adapter of another method that was added after M2PT and skipped target modules.

    PEFT does not inject adapters into the submodules of a tuner layer, so it skips the linear layers of an adapted
    attention. This is a forward pre-hook for the model.

    Args:
        layer ([`~peft_m2pt.layers.base.M2PTLayer`]):
            A layer with prompts.
        configs (`dict[str, PeftConfig]`):
            The configs of all adapters of the model. PEFT adds those of later adapters to it.
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
                self._reactivate(wrapper)

    def _reactivate(self, wrapper: AuxiliaryTrainingWrapper) -> None:
        """Reactivates `modules_to_save` of an active M2PT adapter, which PEFT deactivates for an adapter on top."""
        for name in self.layer.active_adapters:
            if name in wrapper._get_available_adapters():
                wrapper.set_adapter(name, inference_mode=self.configs[name].inference_mode)

    def _check(self, model: nn.Module, name: str, config: PeftConfig) -> None:
        if isinstance(self.checked.get(name), M2PTConfig):
            raise ValueError(
                f"Adapter '{name}' ({config.peft_type.value}) has the same name as an M2PT adapter of the model. Give "
                f"it another name."
            )
        for path, module in model.named_modules():
            if not isinstance(module, M2PTLayer):
                continue
            for part, _ in module.base_layer.named_modules():
                if check_target_module_exists(config, f"{path}.{part}".strip(".")):
                    raise ValueError(
                        f"Adapter '{name}' ({config.peft_type.value}) was added after M2PT, so PEFT has skipped "
                        f"'{path}.{part}', which is in a module that M2PT adapts. Add it to the model before M2PT."
                    )


def refuse_later_adapters(model: nn.Module, layer: M2PTLayer, configs: dict[str, PeftConfig]) -> list[RemovableHandle]:
    """Registers [`RefuseLaterAdapters`] on a model, once."""
    if any(isinstance(hook, RefuseLaterAdapters) for hook in model._forward_pre_hooks.values()):
        return []
    return [model.register_forward_pre_hook(RefuseLaterAdapters(layer, configs))]
