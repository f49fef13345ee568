"""What the two layers of M2PT have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..adapted import Adapted, adapt
from ..anatomy.modules import device_of
from .prompt import M2PTPrompt


class M2PTLayer(nn.Module, BaseTunerLayer):
    """
    A layer that is called in the place of a module of the base model, which stays where it is and holds the layer's
    weights, see [`~peft_m2pt.adapted.Adapted`].

    Args:
        base_layer (`nn.Module`):
            The module of the base model.
    """

    base_layer: Adapted

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.training = base_layer.training
        # Not a submodule: the base layer stays in its place in the model.
        self.__dict__["base_layer"] = base_layer
        self.hooks: list[RemovableHandle] = []
        for name in self.adapter_layer_names:
            self.add_weights(name)
        adapt(base_layer, self)

    def add_weights(self, layer_name: str) -> None:
        """Adds an empty `ModuleDict` for the weights of adapters."""
        weights = nn.ModuleDict()
        self.add_module(layer_name, weights)
        self.base_layer.add_module(layer_name, weights)

    def get_base_layer(self) -> nn.Module:
        # PEFT's version also unwraps the layer of another method in the same place.
        return self.base_layer

    def remove_hooks(self) -> None:
        """Removes the hooks that belong to the layer."""
        while self.hooks:
            self.hooks.pop().remove()

    def expected_weights(self, adapter_name: str) -> Iterator[tuple[str, str, tuple[int, ...], bool]]:
        """
        Lists the weights of an adapter.

        Returns:
            `Iterator[tuple[str, str, tuple[int, ...], bool]]`: Description, name in this module, shape, and whether
            the dtype is floating-point, for each weight.
        """
        for layer_name in self.adapter_layer_names:
            modules = getattr(self, layer_name)
            if adapter_name not in modules:
                continue
            module = modules[adapter_name]
            if isinstance(module, M2PTPrompt):
                weights = [(name, shape, True) for name, shape in module.shapes.items()]
            else:
                # Buffers are saved too.
                tensors = module.state_dict(keep_vars=True).items()
                weights = [(name, tuple(tensor.shape), tensor.is_floating_point()) for name, tensor in tensors]
            for name, shape, is_floating in weights:
                weight_name = f"{layer_name}.{adapter_name}.{name}"
                yield self.describe_weight(layer_name, name), weight_name, shape, is_floating

    @abstractmethod
    def describe_weight(self, layer_name: str, name: str) -> str:
        """
        Describes a weight, for error messages.

        Args:
            layer_name (`str`):
                One of `adapter_layer_names`.
            name (`str`):
                Name of the weight in the module of the adapter.

        Returns:
            `str`
        """

    def _adapters(self, names: Sequence[str]) -> list[str]:
        """Filters adapters that have weights in this layer."""
        weights = [getattr(self, layer_name) for layer_name in self.adapter_layer_names]
        return [name for name in names if any(name in modules for modules in weights)]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version would also cast the weights to the dtype of the base layer, and so lose precision after
        # loading.
        for layer_name in self.adapter_layer_names:
            modules = getattr(self, layer_name)
            if adapter_name in modules and not any(weight.is_meta for weight in modules[adapter_name].parameters()):
                modules[adapter_name].to(device or self._device_for(layer_name))

    def _device_for(self, layer_name: str) -> torch.device | None:
        """The device on which the weights in one of `adapter_layer_names` are used first."""
        return device_of(self.get_base_layer())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Does nothing: prompts stay as they are while PEFT merges adapters of other methods."""

    def unmerge(self) -> None:
        """Does nothing, see `merge`."""

    def __repr__(self) -> str:
        return "m2pt." + super().__repr__()
