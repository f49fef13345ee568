"""The interaction layer f_in, which is called in the place of a multimodal model's connector."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn

from ..adapted import layer_of
from ..anatomy.modules import device_of, dtype_of, own_modules
from ..anatomy.sites import Connector
from .base import M2PTLayer
from .initializer import PromptInitializer
from .mixed_batch import sample_adapters
from .prompt import M2PTPrompt
from .trainable_copy import assemble_trainable, copy_parts, make_low_rank_parts


class M2PTConnector(M2PTLayer):
    """
    A connector f_in, with a trainable copy and interaction prompts for each adapter.

    Image features F of shape `[..., num_tokens, D]` go through the active adapter's copy of the connector. With
    `interaction_placement="image"`, its interaction prompts V of shape `[n, D]` are prepended:

        image tokens = f_in([V ; F])

    Args:
        site ([`~peft_m2pt.anatomy.sites.Connector`]):
            The connector and its surroundings in the model.
    """

    adapter_layer_names = ("m2pt_interaction",)
    m2pt_interaction: MutableMapping[str, M2PTPrompt]

    def __init__(self, site: Connector) -> None:
        super().__init__(site.module)
        self.site = site
        # The connectors built from the trained parts, which are in attributes `m2pt_connector_<part>`. Not submodules,
        # since they share weights with the frozen connector.
        self._tuned: dict[str, _Tuned] = {}
        # Adapters whose weights are in the state dict that is being loaded.
        self._being_loaded: set[str] = set()

    def update_layer(
        self,
        adapter_name: str,
        tune: bool,
        rank: int | None,
        num_interaction_tokens: int,
        init: PromptInitializer,
    ) -> None:
        """
        Adds the weights of an adapter.

        Args:
            adapter_name (`str`):
                Name of the adapter.
            tune (`bool`):
                Whether it trains the connector.
            rank (`int`, *optional*):
                Rank of the trained update. `None` for a full copy of the connector.
            num_interaction_tokens (`int`):
                Number of prompt vectors in front of the image features.
            init ([`~peft_m2pt.layers.initializer.PromptInitializer`]):
                Makes the prompts.
        """
        if tune:
            connector = self.base_layer
            parts = copy_parts(connector) if rank is None else make_low_rank_parts(connector, rank)
            for path, part in parts.items():
                layer_name = _layer_name(path)
                if layer_name not in self.adapter_layer_names:
                    self.adapter_layer_names = (*self.adapter_layer_names, layer_name)
                    self.add_weights(layer_name)
                getattr(self, layer_name)[adapter_name] = part
            if rank is None and not any(tuned.is_copy for tuned in self._tuned.values()):
                self._register_load_hooks()
            self._tuned[adapter_name] = _Tuned(assemble_trainable(connector, parts), is_copy=rank is None)
        if num_interaction_tokens > 0:
            prompt = init.make_prompt(num_interaction_tokens, self.site, dtype_of(self.base_layer))
            self.m2pt_interaction[adapter_name] = prompt
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Projects image features, and the interaction prompts of the active adapters, to the language model."""
        arguments = dict(zip(self.site.argument_names, args), **kwargs)
        samples = sample_adapters()
        if samples is None or self.disable_adapters:
            return self._forward([] if self.disable_adapters else self.active_adapters, arguments)
        name, *others = arguments
        features = arguments[name]
        adapters = samples.for_images(len(features), self.site.path)
        if len(set(adapters)) == 1:
            return self._forward(adapters[:1], arguments)
        prompts = self.m2pt_interaction
        counts = {adapter: len(prompts[adapter]) if adapter in prompts else 0 for adapter in adapters}
        if others or len(set(counts.values())) > 1:
            reason = (
                f"takes {others} for all images at once" if others else f"adds different numbers of tokens: {counts}"
            )
            raise ValueError(
                f"adapter_names={list(samples.names)}: the connector '{self.site.path}' {reason}. Run the samples of "
                f"each adapter separately."
            )
        # Consecutive images of the same adapter are batched.
        parts = [
            self._forward([adapter], {name: torch.stack([features[i] for i, _ in group])})
            for adapter, group in groupby(enumerate(adapters), key=lambda pair: pair[1])
        ]
        return torch.cat(parts)

    def _forward(self, active_adapters: Sequence[str], arguments: dict[str, Any]) -> Any:
        features = arguments[self.site.argument_names[0]]
        prompts = [self.m2pt_interaction[name] for name in active_adapters if name in self.m2pt_interaction]
        if prompts:
            prompts = [prompt().to(features).expand(*features.shape[:-2], -1, -1) for prompt in prompts]
            arguments[self.site.argument_names[0]] = torch.cat([*prompts, features], dim=-2)
        return self.call_connector(self._adapters(active_adapters), arguments)

    def describe_weight(self, layer_name: str, name: str) -> str:
        if layer_name == "m2pt_interaction":
            return "scale of the interaction prompt" if name == "scale" else "interaction prompt"
        return f"connector weight '{layer_name.removeprefix('m2pt_connector_')}.{name}'"

    def train(self, mode: bool = True) -> M2PTConnector:
        super().train(mode)
        for tuned in self._tuned.values():
            tuned.connector.train(mode)
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._tuned.pop(adapter_name, None)

    def _before_load(self, connector: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        own = [name for name in state_dict if name.startswith(f"{prefix}m2pt_connector")]
        self._being_loaded = {name for name in self._tuned if any(f".{name}." in weight for weight in own)}

    def _after_load(self, *args: Any) -> None:
        self._being_loaded = set()

    def _register_load_hooks(self) -> None:
        self.hooks.append(self.base_layer.register_load_state_dict_pre_hook(self._before_load))
        self.hooks.append(self.base_layer.register_load_state_dict_post_hook(self._after_load))
        for path, part in own_modules(self.base_layer):
            if _layer_name(path) in self.adapter_layer_names:
                hook = partial(self._update_copies, _layer_name(path))
                self.hooks.append(part.register_load_state_dict_pre_hook(hook))

    @torch.no_grad()
    def _update_copies(
        self, layer_name: str, part: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any
    ) -> None:
        """Loads weights of the frozen connector into the active adapter's copy too, unless that is trained."""
        copies = getattr(self, layer_name)
        frozen = {**part._parameters, **part._buffers}
        changed = {
            name: state_dict[f"{prefix}{name}"]
            for name, weight in frozen.items()
            if weight is not None and _differs(state_dict.get(f"{prefix}{name}"), weight)
        }
        for adapter_name in filter(copies.__contains__, self.active_adapters if changed else []):
            if adapter_name in self._being_loaded:
                continue
            weights = {**copies[adapter_name]._parameters, **copies[adapter_name]._buffers}
            if any(_differs(frozen[name], weights[name]) for name in changed):
                warnings.warn(
                    f"Weights {list(changed)} are loaded into a part of the connector '{self.site.path}', of which "
                    f"adapter '{adapter_name}' has trained a copy. The copy is left unchanged, and is used while the "
                    f"adapter is active."
                )
                continue
            for name, weight in changed.items():
                weights[name].copy_(weight)

    def call_connector(self, adapters: Sequence[str], arguments: dict[str, Any]) -> Any:
        """Calls the connector tuned by one of these adapters, or the frozen one."""
        names = [name for name in adapters if name in self._tuned]
        if len(names) > 1:
            raise ValueError(
                f"The adapters {names} have each tuned the connector '{self.site.path}', so only one of them can be "
                f"active at a time. Activate one with set_adapter(...), or train with tune_connector=False."
            )
        # accelerate moves the inputs of the frozen connector to its device, but not those of the tuned one.
        arguments = _move(arguments, device_of(self.base_layer))
        if not names:
            return self.base_layer.call_without_adapters(**arguments)
        tuned = self._tuned[names[0]]
        if not tuned.is_copy:
            return tuned.connector(**arguments)
        # The copy may have a higher precision than the model.
        dtype = arguments[self.site.argument_names[0]].dtype
        return _move(tuned.connector(**_move(arguments, None, dtype_of(tuned.connector))), None, dtype)


def _move(value: Any, device: torch.device | None, dtype: torch.dtype | None = None) -> Any:
    """Moves the tensors in an input or output of a connector to a device, and casts those of floating point."""
    if isinstance(value, torch.Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return type(value)(**{name: _move(item, device, dtype) for name, item in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_move(item, device, dtype) for item in value)
    return value


def _layer_name(path: str) -> str:
    """The attribute that holds the trained versions of a part of the connector."""
    return "_".join(["m2pt_connector", *path.split(".")]).removesuffix("_")


def _differs(loaded: torch.Tensor | None, weight: torch.Tensor) -> bool:
    """Whether loading changes a weight, as far as it is in memory and not sharded."""
    is_plain = type(weight) in (nn.Parameter, torch.Tensor) and not weight.is_meta
    if loaded is None or not is_plain or loaded.is_meta or loaded.shape != weight.shape:
        return False
    return not torch.equal(loaded.to(weight), weight)


class _Tuned(NamedTuple):
    connector: nn.Module
    is_copy: bool


def project(site: Connector, rows: torch.Tensor, adapter_name: str) -> torch.Tensor:
    """
    Projects interaction prompts to the width of the language model, with the model's present connector.

    Args:
        site ([`~peft_m2pt.anatomy.sites.Connector`]):
            The connector, which may be adapted.
        rows (`torch.Tensor` of shape `(num_interaction_tokens * rows_per_token, width)`):
            Interaction prompts.
        adapter_name (`str`):
            Name of the adapter that they belong to.

    Returns:
        `torch.Tensor` of shape `(num_interaction_tokens, text_width)`.
    """
    module, layer = site.module, layer_of(site.module)
    rows = site.grouped(rows.to(dtype_of(module) or rows.dtype))
    if layer is None:
        return module(rows.to(device_of(module))).flatten(0, -2)
    return layer.call_connector([adapter_name], {site.argument_names[0]: rows}).flatten(0, -2)
