"""
Modules of the base model that M2PT has adapted in place.

An adapted module keeps its place, weights, children, hooks and names, so code that reads, saves or trains the model
works as before. Two things differ: a call of the module calls its layer, and `named_modules` also yields that layer,
at the path of the module, where PEFT looks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


# The attribute of an adapted module that holds its layer. Not a child, which would have a name of its own.
LAYER = "m2pt_layer"


class Adapted(nn.Module):
    """
    A mixin for the class of an adapted module, which is changed in place, as `torch.nn.utils.parametrize` does.

    **Attributes** (not annotated, since transformers evaluates annotations of its classes):
        - **m2pt_base_class** (`type[nn.Module]`) -- The original class of the module.
        - **m2pt_layer** ([`~peft_m2pt.layers.base.M2PTLayer`]) -- The layer.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.m2pt_layer(*args, **kwargs)

    def call_without_adapters(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module with its hooks, as if it were not adapted."""
        return super().__call__(*args, **kwargs)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        if self not in memo:
            yield prefix, self.m2pt_layer
        yield from super().named_modules(memo, prefix, remove_duplicate)

    def train(self, mode: bool = True) -> nn.Module:
        self.m2pt_layer.train(mode)
        return super().train(mode)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at runtime, so pickle cannot import it.
        return _make_empty, (base_class(self),), *super().__reduce_ex__(protocol)[2:]


def _make_empty(module_class: type[nn.Module]) -> nn.Module:
    adapted_class = _adapted_class(module_class)
    return adapted_class.__new__(adapted_class)


# Not `functools.cache`, which torch.compile would trace through.
_adapted_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _adapted_class(module_class: type[nn.Module]) -> type[nn.Module]:
    if module_class not in _adapted_classes:
        names = ("__module__", "__qualname__", "__doc__")
        contents = {"m2pt_base_class": module_class, **{name: getattr(module_class, name) for name in names}}
        if not issubclass(module_class, BaseTunerLayer):
            # PEFT's name for the module without an adapter.
            contents["base_layer"] = property(lambda module: module.forward)
        _adapted_classes[module_class] = type(module_class.__name__, (Adapted, module_class), contents)
    return _adapted_classes[module_class]


def base_class(module: nn.Module) -> type[nn.Module]:
    """The original class of a module."""
    return module.m2pt_base_class if isinstance(module, Adapted) else type(module)


def layer_of(module: nn.Module) -> Any:
    """The layer of an adapted module. `None` for other modules."""
    return module.m2pt_layer if isinstance(module, Adapted) else None


def adapt(module: nn.Module, layer: nn.Module) -> None:
    """Makes calls of a module call a layer instead."""
    module.__dict__[LAYER] = layer
    module.__class__ = _adapted_class(type(module))


def release(module: nn.Module) -> None:
    """Restores an adapted module, and removes the weights and hooks of its layer."""
    layer = module.__dict__.pop(LAYER)
    layer.remove_hooks()
    module.__class__ = base_class(module)
    for name in layer._modules:
        del module._modules[name]


def without_adapters(module: nn.Module) -> nn.Module:
    """
    Removes the layer from a shallow copy of an adapted module. The original keeps it.

    Args:
        module (`nn.Module`):
            The copy. That of another module is returned as it is.
    """
    if isinstance(module, Adapted):
        module._modules = dict(base_children(module))
        del module.__dict__[LAYER]
        module.__class__ = base_class(module)
    return module


def base_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields name and module of each child of a module, without those of its layer."""
    own = module.m2pt_layer._modules if isinstance(module, Adapted) else ()
    for name, child in module.named_children():
        if name not in own:
            yield name, child


def base_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yields a module and all modules inside it, without those of M2PT layers."""
    yield module
    for _, child in base_children(module):
        yield from base_modules(child)
