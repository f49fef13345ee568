"""What the layers of M2PT have in common: being called in the place of a module of the base model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from .adapted import adapt, base_modules
from .prompt import M2PTPrompt
from .upstream import offloaded_to


NOT_MERGEABLE = (
    "M2PT cannot be merged into the base weights: prompts are additional keys and values that every token attends "
    "to, not a change of any weight. Keep the adapter beside the model (it adds about 0.1% of its parameters), or "
    "remove it with `unload()`."
)


def own_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """
    Yields the parameters of a module, without those of its children, and then its buffers, in which many quantised
    layers keep their weights.

    Args:
        module (`nn.Module`):
            The module.
    """
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """
    The floating-point type in which a module computes: that of its first parameter of such a type or, where it has
    none, of its first buffer.

    Args:
        module (`nn.Module`):
            The module.

    Returns:
        `torch.dtype`, or `None` if it has no floating-point tensors.
    """
    holders = list(base_modules(module))
    for tensors in (nn.Module.parameters, nn.Module.buffers):
        for holder in holders:
            for tensor in tensors(holder, recurse=False):
                if tensor.is_floating_point():
                    return tensor.dtype
    return None


def device_of(module: nn.Module) -> torch.device | None:
    """
    The device on which a module computes first: that of its first tensor or, where its weights are offloaded, the one
    to which they are fetched.

    Args:
        module (`nn.Module`):
            The module.

    Returns:
        `torch.device`, or `None` if it has no tensors.
    """
    for holder in base_modules(module):
        for tensor in own_tensors(holder):
            return offloaded_to(holder) or tensor.device
    return None


class M2PTLayer(nn.Module, BaseTunerLayer):
    """
    What is called in the place of a module of the base model. The module holds its weights, see
    [`~peft_m2pt.adapted.Adapted`].

    Args:
        base_layer (`nn.Module`):
            The module of the base model.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.training = base_layer.training
        # No child, as the module is where it was.
        self.__dict__["base_layer"] = base_layer
        self.hooks: list[RemovableHandle] = []
        for name in self.adapter_layer_names:
            self.add_weights(name)
        adapt(base_layer, self)

    def add_weights(self, layer_name: str) -> None:
        """
        Makes a place for weights of adapters.

        Args:
            layer_name (`str`):
                Its name, which is in `adapter_layer_names`.
        """
        weights = nn.ModuleDict()
        self.add_module(layer_name, weights)
        self.base_layer.add_module(layer_name, weights)

    def get_base_layer(self) -> nn.Module:
        # PEFT's version would go on, to what another method has adapted in the same place.
        return self.base_layer

    def remove_hooks(self) -> None:
        """Removes what the layer has hung on other modules."""
        while self.hooks:
            self.hooks.pop().remove()

    def expected_weights(self, adapter_name: str) -> Iterator[tuple[str, str, tuple[int, ...], bool]]:
        """
        Lists the weights of an adapter.

        Args:
            adapter_name (`str`):
                Name of the adapter.

        Returns:
            `Iterator[tuple[str, str, tuple[int, ...], bool]]`: For each weight what it is, its name in this module,
            its shape, and whether it is of floating-point numbers.
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
        Says what a weight is, for error messages.

        Args:
            layer_name (`str`):
                One of `adapter_layer_names`.
            name (`str`):
                Name of the weight in the module of the adapter.

        Returns:
            `str`
        """

    def _adapters(self, names: Sequence[str]) -> list[str]:
        """Which of these adapters have weights here."""
        weights = [getattr(self, layer_name) for layer_name in self.adapter_layer_names]
        return [name for name in names if any(name in modules for modules in weights)]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # New weights get their dtype when they are made: PEFT's version would set it here, also after loading, and
        # would cast away what half precision cannot hold.
        for layer_name in self.adapter_layer_names:
            modules = getattr(self, layer_name)
            if adapter_name in modules and not any(weight.is_meta for weight in modules[adapter_name].parameters()):
                modules[adapter_name].to(device or self._device_for(layer_name))

    def _device_for(self, layer_name: str) -> torch.device | None:
        """Where the weights of one of `adapter_layer_names` are used first."""
        return device_of(self.get_base_layer())

    def _new_prompt(self, num_tokens: int, width: int, turn: float | None) -> M2PTPrompt:
        """Makes a prompt in the dtype of the base layer."""
        return M2PTPrompt(num_tokens, width, dtype_of(self.get_base_layer()), turn)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(NOT_MERGEABLE)

    def unmerge(self) -> None:
        raise NotImplementedError("M2PT cannot be merged, so there is nothing to unmerge.")

    def __repr__(self) -> str:
        return "m2pt." + super().__repr__()
