"""
Trainable versions of a frozen module that share with it all that is not trained.

PEFT stores weights under `<name>.<adapter>.<weight>`, so what is trained is kept as flat, named parts. `graft` puts
the parts of an adapter into a second module that runs the code of the first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .adapted import base_children, without_adapters
from .base import device_of
from .names import uncompiled
from .upstream import FetchingFor
from .wrappers import own_module


def copied_parts(module: nn.Module) -> dict[str, nn.Module]:
    """
    Copies all weights of a module, but not those of other adapters in it. What is offloaded or partitioned is fetched
    for it.

    Args:
        module (`nn.Module`):
            The module.

    Returns:
        `dict[str, nn.Module]`: A copy of each module inside of it that has weights of its own, by path.
    """
    parts = {}
    for path, child in own_modules(module):
        if not any(True for _ in child.parameters(recurse=False)):
            continue
        with align_module_device(child), gather_params_ctx(child.parameters(recurse=False), modifier_rank=None):
            part = _bare_copy(child)
            part._modules = {}
            parts[path] = part = copy.deepcopy(part)
            call_hooks_of(child, part)
        for name, parameter in list(part._parameters.items()):
            # PEFT watches this call, to put new parameters on the meta device (low_cpu_mem_usage).
            part.register_parameter(name, parameter)
    return parts


def shape_of(module: nn.Module) -> nn.Module:
    """
    Makes a version of a module whose weights are stand-ins on the meta device. It tells shapes, wherever and in
    whatever form the weights are kept. All of it is float32.

    Args:
        module (`nn.Module`):
            The module, which stays as it is.

    Returns:
        `nn.Module`
    """
    module = uncompiled(module)
    if is_linear(module):
        return nn.Linear(module.in_features, module.out_features, device="meta")
    twin = _bare_copy(module)
    twin._parameters = {name: _shape_of_tensor(weight) for name, weight in module._parameters.items()}
    twin._buffers = {name: _shape_of_tensor(buffer) for name, buffer in module._buffers.items()}
    twin._modules = {name: shape_of(child) for name, child in base_children(module)}
    return twin


def _shape_of_tensor(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    # DeepSpeed leaves nothing in a weight that it has partitioned.
    shape = getattr(tensor, "ds_shape", tensor.shape)
    return torch.empty(shape, dtype=None if tensor.is_floating_point() else tensor.dtype, device="meta")


def own_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields path and module of all modules inside of one, as if no adapters of other methods were there."""
    module = own_module(module)
    yield path, module
    for name, child in base_children(module):
        yield from own_modules(child, f"{path}.{name}" if path else name)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, of any quantisation. Some have a norm of their own in front."""
    if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
        return False
    return not any(hasattr(child, "in_features") for child in module.children())


def quantised_linears(module: nn.Module) -> list[str]:
    """
    Lists the linear layers of a module whose weights are no parameters of plain floating-point numbers, by path.

    Args:
        module (`nn.Module`):
            The module.
    """
    linears = {path: child for path, child in own_modules(module) if is_linear(child)}
    weights = {path: getattr(linear, "weight", None) for path, linear in linears.items()}
    return [path for path, weight in weights.items() if not (isinstance(weight, nn.Parameter) and _is_plain(weight))]


def _is_plain(weight: torch.Tensor | None) -> bool:
    # Some quantised weights call themselves floating-point; their classes are those of other packages.
    is_of_torch = type(weight).__module__.partition(".")[0] == "torch"
    return isinstance(weight, torch.Tensor) and is_of_torch and weight.is_floating_point()


def _bare_copy(module: nn.Module) -> nn.Module:
    """
    A copy that shares all but hooks, and what accelerate has put around the `forward` of a module, which would call
    that.
    """
    twin = without_adapters(copy.copy(module))
    for name in ("forward", "_old_forward", "_hf_hook"):
        twin.__dict__.pop(name, None)
    twin.__dict__.update({name: type(hooks)() for name, hooks in vars(twin).items() if "_hooks" in name})
    return twin


class HooksOf:
    """
    Calls the hooks of a module around the call of another one that stands in for it.

    Users know the parts of a connector, and register hooks on these. They are called as hooks of that part, whenever
    they were registered, and until they are removed there.

    Args:
        module (`nn.Module`):
            The module whose hooks are called.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def before(self, stand_in: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook for the other module."""
        for key, hook in list(self.module._forward_pre_hooks.items()):
            if key in self.module._forward_pre_hooks_with_kwargs:
                result = hook(self.module, args, kwargs)
                args, kwargs = (args, kwargs) if result is None else result
            else:
                result = hook(self.module, args)
                result = args if result is None else result
                args = result if isinstance(result, tuple) else (result,)
        return args, kwargs

    def behind(self, stand_in: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook for the other module."""
        for key, hook in list(self.module._forward_hooks.items()):
            has_kwargs = key in self.module._forward_hooks_with_kwargs
            result = hook(self.module, args, kwargs, output) if has_kwargs else hook(self.module, args, output)
            output = output if result is None else result
        return output


def call_hooks_of(module: nn.Module, stand_in: nn.Module) -> None:
    """
    Lets the hooks of a module be called with another one that stands in for it.

    Args:
        module (`nn.Module`):
            The module that hooks are registered on.
        stand_in (`nn.Module`):
            The module that is called.
    """
    hooks = HooksOf(module)
    stand_in.register_forward_pre_hook(hooks.before, with_kwargs=True)
    stand_in.register_forward_hook(hooks.behind, with_kwargs=True)


def low_rank_parts(module: nn.Module, rank: int) -> dict[str, nn.Module]:
    """
    Makes updates B A of low rank for all linear layers of a module. They start without an effect (B = 0).

    Args:
        module (`nn.Module`):
            The module.
        rank (`int`):
            Rank of the updates.

    Returns:
        `dict[str, nn.Module]`: Two linear layers for each, by path: "<path>.lora_A" and "<path>.lora_B".
    """
    parts: dict[str, nn.Module] = {}
    for path, child in own_modules(module):
        if is_linear(child):
            weight = getattr(child, "weight", None)
            dtype = weight.dtype if _is_plain(weight) else None
            down = nn.Linear(child.in_features, rank, bias=False, dtype=dtype)
            up = nn.Linear(rank, child.out_features, bias=False, dtype=dtype)
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)
            parts |= {f"{path}.lora_A": down, f"{path}.lora_B": up}
    return parts


def graft(module: nn.Module, parts: dict[str, nn.Module], path: str = "") -> nn.Module:
    """
    Makes a module that computes as another one does, but with trained parts in it.

    Args:
        module (`nn.Module`):
            The module, which stays as it is.
        parts (`dict[str, nn.Module]`):
            What `copied_parts` or `low_rank_parts` have made of it.
        path (`str`, *optional*):
            Path of the module in the one that the parts were made of.

    Returns:
        `nn.Module`: A module that shares with the first all that is not among the parts.
    """
    # What is compiled would call the frozen weights.
    module = uncompiled(module)
    if f"{path}.lora_A" in parts:
        return LowRankLinear(module, parts[f"{path}.lora_A"], parts[f"{path}.lora_B"])
    if isinstance(module, AuxiliaryTrainingWrapper):
        # The parts are those of the module in use.
        return graft(own_module(module), parts, path)
    if isinstance(module, BaseTunerLayer):
        # Another adapter, whose update stays on top.
        grafted = _bare_copy(module)
        grafted._modules = {**dict(base_children(module)), "base_layer": graft(module.base_layer, parts, path)}
        call_hooks_of(module, grafted)
        return grafted
    children = dict(base_children(module))
    if path in parts and not children:
        return parts[path]
    has_parts = any(part == path or part.startswith(f"{path}." if path else "") for part in parts)
    if not has_parts and any(True for _ in (*module.parameters(), *module.buffers())):
        return module
    grafted = _bare_copy(module)
    call_hooks_of(module, grafted)
    grafted._modules = {
        name: graft(child, parts, f"{path}.{name}" if path else name) for name, child in children.items()
    }
    holder = parts.get(path, module)
    # The same dictionaries, so that parameters which are replaced later are seen.
    grafted._parameters, grafted._buffers = holder._parameters, holder._buffers
    fetching = FetchingFor(holder)
    grafted.register_forward_pre_hook(fetching.before)
    grafted.register_forward_hook(fetching.behind)
    return grafted


class LowRankLinear(nn.Module):
    """
    A frozen linear layer with an update of low rank: W x + b + B A x.

    Args:
        linear (`nn.Linear`):
            The frozen layer.
        down (`nn.Linear`):
            The matrix A.
        up (`nn.Linear`):
            The matrix B.
    """

    def __init__(self, linear: nn.Linear, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = down
        self.up = up
        call_hooks_of(linear, self)

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        # Its hooks are called with the update.
        output = self.linear.forward(*args, **kwargs)
        (x,) = (*args, *kwargs.values())
        # Contiguous, since torch otherwise multiplies in another order if the matrices need gradients.
        x = x.to(device_of(self.down), self.down.weight.dtype).contiguous()
        return output + self.up(self.down(x)).to(output)

    def __getattr__(self, name: str) -> Any:
        # Connectors read widths of their linear layers.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "linear" or name.startswith("_"):
                raise
            return getattr(self.linear, name)
