"""The interaction layer f_in: what is called in the place of the connector of a multimodal model."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn

from .adapted import layer_of
from .anatomy import Connector
from .base import M2PTLayer, device_of, dtype_of
from .graft import copied_parts, graft, low_rank_parts, own_modules
from .init import PromptInitialiser
from .prompt import M2PTPrompt
from .samples import sample_adapters
from .threads import PerThread


# How many image tokens are in the input of the model that is being called, where that is known.
_num_image_tokens = PerThread()


class M2PTConnector(M2PTLayer):
    """
    A connector f_in, with a trainable copy and interaction prompts for each adapter.

    While an adapter is active, image features F of shape `[..., num_tokens, D]` go through its copy of the connector,
    and in placement "image" its interaction prompts V of shape `[n, D]` stand in front of them:

        image tokens = f_in([V ; F])

    Args:
        site ([`~peft_m2pt.anatomy.Connector`]):
            The connector and its surroundings.
    """

    adapter_layer_names = ("m2pt_interaction",)

    def __init__(self, site: Connector) -> None:
        super().__init__(site.module)
        self.site = site
        # What adapters train of the connector is held by attributes `m2pt_connector_<part>`. Here are the connectors
        # that they are parts of; these are no children of this module, since they share weights with the frozen one.
        self._tuned: dict[str, _Tuned] = {}
        # Adapters whose own weights are in the state dict that is being loaded.
        self._being_loaded: set[str] = set()

    def update_layer(
        self,
        adapter_name: str,
        tune: bool,
        rank: int | None,
        num_interaction_tokens: int,
        init: PromptInitialiser,
    ) -> None:
        """
        Adds what an adapter trains of the connector.

        Args:
            adapter_name (`str`):
                Name of the adapter.
            tune (`bool`):
                Whether it trains the connector.
            rank (`int`, *optional*):
                Rank of the update that it trains. `None` for a copy of the connector.
            num_interaction_tokens (`int`):
                Number of prompt vectors in front of the image features.
            init ([`~peft_m2pt.init.PromptInitialiser`]):
                Fills the prompts.
        """
        if tune:
            connector = self.base_layer
            parts = copied_parts(connector) if rank is None else low_rank_parts(connector, rank)
            for path, part in parts.items():
                layer_name = _layer_name(path)
                if layer_name not in self.adapter_layer_names:
                    self.adapter_layer_names = (*self.adapter_layer_names, layer_name)
                    self.add_weights(layer_name)
                getattr(self, layer_name)[adapter_name] = part
            if rank is None and not any(tuned.is_copy for tuned in self._tuned.values()):
                self._watch_loads()
            self._tuned[adapter_name] = _Tuned(graft(connector, parts), is_copy=rank is None)
        if num_interaction_tokens > 0:
            self.m2pt_interaction[adapter_name] = self._new_prompt(
                num_interaction_tokens, self.site.width, init.turn(self.site)
            )
            init(self.m2pt_interaction[adapter_name], self.site)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Brings image features to the language model, together with the prompts of the active adapters."""
        arguments = dict(zip(self.site.argument_names, args), **kwargs)
        samples = sample_adapters()
        if samples is None or self.disable_adapters:
            return self._forward([] if self.disable_adapters else self.active_adapters, arguments)
        _num_image_tokens.value = None
        name, *others = arguments
        features = arguments[name]
        adapters = samples.of_images(len(features), self.site.path)
        if len(set(adapters)) == 1:
            return self._forward(adapters[:1], arguments)
        prompts = self.m2pt_interaction
        counts = {adapter: len(prompts[adapter]) if adapter in prompts else 0 for adapter in adapters}
        if others or len(set(counts.values())) > 1:
            reason = f"takes {others} for all images at once" if others else f"gives images other lengths: {counts}"
            raise ValueError(
                f"adapter_names={list(samples.names)}: the connector '{self.site.path}' {reason}. Run the samples of "
                f"each adapter apart."
            )
        # Neighbours that use the same adapter go together.
        parts = [
            self._forward([adapter], {name: torch.stack([features[i] for i, _ in group])})
            for adapter, group in groupby(enumerate(adapters), key=lambda pair: pair[1])
        ]
        return torch.cat(parts)

    def _forward(self, active_adapters: Sequence[str], arguments: dict[str, Any]) -> Any:
        features = arguments[self.site.argument_names[0]]
        prompts = [self.m2pt_interaction[name] for name in active_adapters if name in self.m2pt_interaction]
        if (num_image_tokens := _num_image_tokens.value) is not None:
            _num_image_tokens.value = None
            self._check_image_tokens(num_image_tokens, len(features), features.shape[-2], sum(map(len, prompts)))
        if prompts:
            prompts = [prompt().to(features).expand(*features.shape[:-2], -1, -1) for prompt in prompts]
            arguments[self.site.argument_names[0]] = torch.cat([*prompts, features], dim=-2)
        return self._call(self._adapters(active_adapters), arguments)

    def describe_weight(self, layer_name: str, name: str) -> str:
        if layer_name == "m2pt_interaction":
            return "unit of the interaction prompt" if name == "scale" else "interaction prompt"
        return f"connector weight '{layer_name.removeprefix('m2pt_connector_')}.{name}'"

    def train(self, mode: bool = True) -> M2PTConnector:
        super().train(mode)
        for tuned in self._tuned.values():
            tuned.connector.train(mode)
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._tuned.pop(adapter_name, None)

    def register_hooks(self, model: nn.Module) -> None:
        """
        Watches the calls of the whole model, to say what is wrong if its input has another number of image tokens than
        the connector gives.

        Args:
            model (`nn.Module`):
                The model.
        """
        if self._note_image_tokens not in model._forward_pre_hooks.values():
            self.hooks += [
                model.register_forward_pre_hook(self._note_image_tokens, with_kwargs=True),
                model.register_forward_hook(_forget_image_tokens, always_call=True),
            ]

    def _begin_of_load(
        self, connector: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any
    ) -> None:
        own = [name for name in state_dict if name.startswith(f"{prefix}m2pt_connector")]
        self._being_loaded = {name for name in self._tuned if any(f".{name}." in weight for weight in own)}

    def _end_of_load(self, *args: Any) -> None:
        self._being_loaded = set()

    def _watch_loads(self) -> None:
        self.hooks.append(self.base_layer.register_load_state_dict_pre_hook(self._begin_of_load))
        self.hooks.append(self.base_layer.register_load_state_dict_post_hook(self._end_of_load))
        for path, part in own_modules(self.base_layer):
            if _layer_name(path) in self.adapter_layer_names:
                hook = partial(self._take_over, _layer_name(path))
                self.hooks.append(part.register_load_state_dict_pre_hook(hook))

    @torch.no_grad()
    def _take_over(
        self, layer_name: str, part: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any
    ) -> None:
        """
        Lets weights that are loaded into a part of the connector count for the copy of the active adapter, as long as
        that has learned nothing yet.
        """
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
                    f"adapter '{adapter_name}' has trained a copy: the copy stays as it is, and is what image "
                    f"features go through while the adapter is active."
                )
                continue
            for name, weight in changed.items():
                weights[name].copy_(weight)

    def _note_image_tokens(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            # A number in a tensor is not known then. transformers makes its own check part of the graph.
            return
        arguments = dict(zip(inspect.signature(type(model).forward).parameters, (model, *args)), **kwargs)
        if arguments.get("input_ids") is None or sample_adapters() is not None:
            return
        num_image_tokens = (arguments["input_ids"] == model.config.image_token_id).sum()
        encoded = (arguments.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None:
            # `generate` has called the vision encoder and the connector already.
            num_prompts = sum(map(len, self._active_prompts()))
            features = encoded.pooler_output
            self._check_image_tokens(num_image_tokens, len(features), len(features[0]) - num_prompts, num_prompts)
        elif arguments.get("pixel_values") is not None:
            _num_image_tokens.value = num_image_tokens

    def _check_image_tokens(
        self, num_image_tokens: torch.Tensor, num_images: int, num_features: int, num_prompts: int
    ) -> None:
        if num_image_tokens == num_images * (num_features + num_prompts):
            return
        if num_prompts > 0:
            way_out = "where config is the M2PTConfig of the active adapter."
        else:
            way_out = "where config has interaction_placement='layers', for which the processor is set back."
        raise ValueError(
            f"The input has {int(num_image_tokens)} image tokens for {num_images} image(s), but each image needs "
            f"{num_features + num_prompts}: {num_features} for its own features and {num_prompts} for the interaction "
            f"prompts of the active adapter. Prepare the processor with peft_m2pt.adapt_processor(processor, config), "
            f"{way_out}"
        )

    def _active_prompts(self) -> list[M2PTPrompt]:
        names = [] if self.disable_adapters else self.active_adapters
        return [self.m2pt_interaction[name] for name in names if name in self.m2pt_interaction]

    def project(self, rows: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """
        Brings interaction prompts to the width of the language model, with the connector of an adapter.

        Args:
            rows (`torch.Tensor` of shape `(num_interaction_tokens * rows_per_token, width)`):
                Interaction prompts.
            adapter_name (`str`):
                Name of the adapter.

        Returns:
            `torch.Tensor` of shape `(num_interaction_tokens, text_width)`.
        """
        return self._call([adapter_name], {self.site.argument_names[0]: self.site.grouped(rows)}).flatten(0, -2)

    def _call(self, adapters: Sequence[str], arguments: dict[str, Any]) -> Any:
        """Calls the connector that these adapters have tuned, or the frozen one."""
        names = [name for name in adapters if name in self._tuned]
        if len(names) > 1:
            raise ValueError(
                f"The adapters {names} have each tuned the connector '{self.site.path}' in their own way, so only one "
                f"of them can be active at a time. Activate one with set_adapter(...), or train with "
                f"tune_connector=False."
            )
        # accelerate brings what the frozen connector is given to its device, but not what is given to another one.
        arguments = _bring(arguments, device_of(self.base_layer))
        if not names:
            return self.base_layer.call_without_adapters(**arguments)
        tuned = self._tuned[names[0]]
        if not tuned.is_copy:
            return tuned.connector(**arguments)
        # The copy may be kept in a higher precision than the model.
        dtype = arguments[self.site.argument_names[0]].dtype
        return _bring(tuned.connector(**_bring(arguments, None, dtype_of(tuned.connector))), None, dtype)


def _bring(value: Any, device: torch.device | None, dtype: torch.dtype | None = None) -> Any:
    """Brings the tensors in what a connector takes or gives to a device, and floating-point numbers to a type."""
    if isinstance(value, torch.Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return type(value)(**{name: _bring(item, device, dtype) for name, item in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_bring(item, device, dtype) for item in value)
    return value


def _layer_name(path: str) -> str:
    """The attribute of the connector that holds what adapters train of a part of it."""
    return "_".join(["m2pt_connector", *path.split(".")]).removesuffix("_")


def _differs(loaded: torch.Tensor | None, weight: torch.Tensor) -> bool:
    """Whether a load changes a weight that is here, and whole."""
    is_plain = type(weight) in (nn.Parameter, torch.Tensor) and not weight.is_meta
    if loaded is None or not is_plain or loaded.is_meta or loaded.shape != weight.shape:
        return False
    return not torch.equal(loaded.to(weight), weight)


def _forget_image_tokens(*args: Any) -> None:
    _num_image_tokens.value = None


class _Tuned(NamedTuple):
    connector: nn.Module
    is_copy: bool


def project(site: Connector, rows: torch.Tensor, adapter_name: str) -> torch.Tensor:
    """
    Brings interaction prompts to the width of the language model, with the connector that the model has now.

    Args:
        site ([`~peft_m2pt.anatomy.Connector`]):
            The connector, which may be adapted.
        rows (`torch.Tensor` of shape `(num_interaction_tokens * rows_per_token, width)`):
            Interaction prompts.
        adapter_name (`str`):
            Name of the adapter that they belong to.

    Returns:
        `torch.Tensor` of shape `(num_interaction_tokens, text_width)`.
    """
    module = site.module
    dtype = dtype_of(module) or rows.dtype
    layer = layer_of(module)
    if layer is not None:
        return layer.project(rows.to(dtype), adapter_name)
    return module(site.grouped(rows.to(device_of(module), dtype))).flatten(0, -2)
