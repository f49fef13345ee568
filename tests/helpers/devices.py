"""
Several devices on a machine that has none but its CPU.

torch knows names of devices that nothing here implements, such as "lazy:1". Tensors on them are computed on the CPU,
and as on real devices, what is computed from several tensors needs them on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


CPU = torch.device("cpu")
# What `torch.cuda` is to "cuda": gradient checkpointing asks for it.
MODULE = SimpleNamespace(
    device=lambda device: nullcontext(), get_rng_state=torch.get_rng_state, set_rng_state=torch.set_rng_state
)
aten = torch.ops.aten
# They may be given tensors of several devices.
BETWEEN_DEVICES = {
    aten.copy_.default,
    aten.fill_.Tensor,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class _Elsewhere(torch.Tensor):
    """A tensor that says that it is on another device."""

    # Not of a package that quantises weights.
    __module__ = torch.__name__
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls, data: torch.Tensor, device: torch.device | None = None, requires_grad: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        if device is None:
            # accelerate makes a parameter of the class of another, with what is known of that.
            return torch.nn.Parameter(data, requires_grad)
        layout = {"strides": data.stride(), "storage_offset": data.storage_offset(), "dtype": data.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, data.shape, device=device, **layout)
        tensor.on_cpu = data
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def __repr__(self, **kwargs: Any) -> str:
        return f"{self.on_cpu!r} on {self.device}"


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Values(TorchFunctionMode):
    """What does not come to the mode above."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor:
            return function(*args, **{**kwargs, "device": None}).to(kwargs.get("device"))
        if function in (torch.Tensor.tolist, torch.Tensor.untyped_storage):
            return function(_on_cpu(args[0]))
        if function is torch.Tensor.new_tensor:
            return function(_on_cpu(args[0]), *args[1:], **kwargs).to(args[0].device)
        return function(*args, **kwargs)


def _is_autocast_enabled(device_type: str | None = None) -> bool:
    if device_type is None:
        return _is_enabled()
    return device_type != "lazy" and _is_enabled(device_type)


_is_enabled = torch.is_autocast_enabled


@contextmanager
def several_devices() -> Iterator[None]:
    """In this context there are the devices "lazy:0", "lazy:1", ..."""
    module = patch.object(torch, "lazy", MODULE, create=True)
    autocast = patch.object(torch, "is_autocast_enabled", _is_autocast_enabled)
    with _Operations(), _Values(), module, autocast:
        yield


def _run(function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    # Numbers on the CPU go anywhere.
    devices = {tensor.device for tensor in tensors if tensor.dim() > 0 or tensor.device != CPU}
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        kwargs = {**kwargs, "device": CPU}
    elif function in BETWEEN_DEVICES:
        device = tensors[0].device
    elif len(devices) > 1:
        raise RuntimeError(f"{function}: tensors on {sorted(map(str, devices))}")
    else:
        device = next(iter(devices), CPU)
    output = function(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
    # What is changed in place stays the tensor that it was.
    known = {id(_on_cpu(tensor)): tensor for tensor in tensors}
    return tree_map(lambda value: known.get(id(value), _on_device(value, device)), output)


def _on_cpu(value: Any) -> Any:
    return value.on_cpu if isinstance(value, _Elsewhere) else value


def _on_device(value: Any, device: torch.device) -> Any:
    return _Elsewhere(value, device) if isinstance(value, torch.Tensor) and device != CPU else value
