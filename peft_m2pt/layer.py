"""Where prompts live: what is called in the place of each adapted self-attention module."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from .adapted import base_class, base_modules
from .anatomy import Connector, Site
from .arguments import Role, check_call, read_signature
from .attention import attend_to_rows, extend_attention_function, record_rows
from .base import M2PTLayer, device_of
from .connector import project
from .init import PromptInitialiser
from .positions import prompt_arguments
from .rows import Rows, arrange
from .samples import SampleAdapters, sample_adapters
from .starts import Starts, find_starts, note_starts, noted_starts


class M2PTAttention(M2PTLayer):
    """
    A self-attention module with prompts.

    For a layer with prompt P of shape `[n, D]` (equations of the paper, arXiv 2409.15657, section 3, in the form in
    which they act):

        K = [W_k LN(P) ; K_tokens],  V = [W_v LN(P) ; V_tokens],  output = softmax(Q_tokens K^T / sqrt(d)) V

    In the language model, interaction prompts V of the vision encoder's width can stand behind those of the layer's
    own width: P becomes [P ; f_in(V)], where f_in is the connector.

    The module's own code computes the rows of K and V, including what its family does to keys: norms, rotary, grouped
    or fused projections.

    Args:
        site ([`~peft_m2pt.anatomy.Site`]):
            The attention module and its surroundings.
    """

    adapter_layer_names = ("m2pt_prompt", "m2pt_interaction")

    def __init__(self, site: Site) -> None:
        super().__init__(site.attention)
        self.site = site
        self.signature = read_signature(base_class(site.attention))
        self._kept: _KeptRows | None = None

    def update_layer(
        self,
        adapter_name: str,
        num_tokens: int,
        num_interaction_tokens: int,
        connector: Connector | None,
        init: PromptInitialiser,
    ) -> None:
        """
        Adds prompts for an adapter.

        Args:
            adapter_name (`str`):
                Name of the adapter.
            num_tokens (`int`):
                Number of prompt vectors of the layer's own width.
            num_interaction_tokens (`int`):
                Number of prompt vectors that the connector brings to this width.
            connector ([`~peft_m2pt.anatomy.Connector`], *optional*):
                The connector, if there are interaction prompts.
            init ([`~peft_m2pt.init.PromptInitialiser`]):
                Fills the prompts.
        """
        if num_tokens > 0:
            self.m2pt_prompt[adapter_name] = self._new_prompt(num_tokens, self.site.width, init.turn(self.site))
            init(self.m2pt_prompt[adapter_name], self.site)
        if num_interaction_tokens > 0:
            self.site = replace(self.site, connector=connector)
            num_rows = num_interaction_tokens * connector.rows_per_token
            prompt = self._new_prompt(num_rows, connector.width, init.turn(connector))
            self.m2pt_interaction[adapter_name] = prompt
            init(prompt, connector)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the adapted module, which attends to the prompts of the active adapters besides its own tokens."""
        adapters, base_layer = self._wanted_adapters(), self.base_layer
        if not adapters:
            if self.site.kind == "textual":
                note_starts(base_layer, self.site.path, self.signature, args, kwargs)
            return base_layer.call_without_adapters(*args, **kwargs)
        extend_attention_function(base_layer, self.site.path)
        arguments = self.signature.bind(args, kwargs)
        check_call(self.signature, arguments, base_layer, self.site.path)
        # Images that stand in one row share their rows, whether they are attended to one by one or not.
        is_packed = self.signature.find(Role.BOUNDARIES, arguments) is not None
        record = None if is_packed else partial(self._rows, adapters, arguments)
        rows = self._rows(adapters, arguments, 0)
        call = partial(base_layer.call_without_adapters, *args, **kwargs)
        return attend_to_rows(base_layer, self.site.path, rows, record, call)

    @property
    def is_active(self) -> bool:
        """Whether there are prompts of an adapter that is in use."""
        return bool(self._wanted_adapters())

    def _wanted_adapters(self) -> list[str]:
        if self.disable_adapters:
            return []
        samples = sample_adapters()
        return self._adapters(self.active_adapters if samples is None else list(dict.fromkeys(samples.names)))

    def describe_weight(self, layer_name: str, name: str) -> str:
        kind = "interaction" if layer_name == "m2pt_interaction" else self.site.kind
        what = "unit of the " if name == "scale" else ""
        return f"{what}{kind} prompt of layer {self.site.layer}"

    def _rows(self, adapters: list[str], arguments: dict[str, Any], call: int) -> Rows | list[Rows | None] | None:
        """
        Returns key and value of prompts in one of the calls of the attention function: for all samples, as a batch, or
        one after the other where several sequences or images are packed.

        While tokens are decoded one at a time, those of the step before serve again. The first call with a cache
        computes them anew, as does one with many tokens, where it costs little.
        """
        samples = sample_adapters()
        cache = None if torch.is_grad_enabled() else self.signature.find(Role.CACHE, arguments)
        if call > 0 or cache is None:
            # Later calls of the function are rare, and not worth a place to keep their rows.
            if call == 0:
                self._forget_rows()
            return self._record_all(adapters, samples, arguments, self._starts(arguments), call)
        tokens = arguments[self.signature.input_name]
        batch = None if samples is None else (samples, len(tokens))
        key = (tokens.dtype, tokens.device, _autocast_dtype(tokens.device.type), batch, *adapters)
        kept = self._kept
        can_be_kept = kept is not None and tokens.shape[-2] == 1 and kept.hold_for(cache, key)
        if can_be_kept and kept.starts is not None:
            can_be_kept = kept.starts is noted_starts(self.base_layer, cache)
        if can_be_kept and (kept.starts is None or kept.starts.count == 1 or torch.compiler.is_compiling()):
            return kept.rows
        starts = self._starts(arguments)
        if can_be_kept and kept.starts is starts:
            return kept.rows
        rows = self._record_all(adapters, samples, arguments, starts, call)
        is_for_next_token = starts is None or (starts.of_tokens is None and starts.is_complete)
        if torch.compiler.is_compiling() or not is_for_next_token:
            self._forget_rows()
        else:
            self._kept = _KeptRows(rows, starts, cache, key, self._sources(adapters))
        return rows

    def _starts(self, arguments: dict[str, Any]) -> Starts | None:
        """The tokens that prompts stand in front of. `None` for those without a position."""
        if self.site.kind == "visual":
            return None
        return find_starts(self.base_layer, self.site.path, self.signature, arguments)

    def _record_all(
        self,
        adapters: list[str],
        samples: SampleAdapters | None,
        arguments: dict[str, Any],
        starts: Starts | None,
        call: int,
    ) -> Rows | list[Rows | None] | None:
        if samples is None:
            return arrange({None: self._record(adapters, arguments, starts, call)}, None, starts, is_packed=False)
        boundaries = self.signature.find(Role.BOUNDARIES, arguments)
        num_parts = len(arguments[self.signature.input_name]) if boundaries is None else len(boundaries) - 1
        is_textual = self.site.kind == "textual"
        names = samples.of_tokens(num_parts) if is_textual else samples.of_images(num_parts, self.site.path)
        rows = {name: self._record([name], arguments, starts, call) for name in adapters}
        return arrange(rows, names, starts, is_packed=boundaries is not None)

    def _forget_rows(self) -> None:
        if self._kept is not None:
            self._kept = None

    def _sources(self, adapters: Sequence[str]) -> list[nn.Module]:
        """The modules from whose weights key and value of the prompts are computed."""
        modules = list(base_modules(self.base_layer))
        for name in self.site.norms:
            modules += getattr(self.site.block, name).modules()
        for name in adapters:
            modules += [prompts[name] for prompts in (self.m2pt_prompt, self.m2pt_interaction) if name in prompts]
        if self.site.connector is not None:
            modules += self.site.connector.module.modules()
        return modules

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._forget_rows()
        super().set_adapter(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        self._forget_rows()
        super().delete_adapter(adapter_name)

    def _record(self, adapters: Sequence[str], arguments: dict[str, Any], starts: Starts | None, call: int) -> Rows:
        """Lets the adapted module compute key and value of the prompts of some adapters, for each start."""
        tokens = arguments[self.signature.input_name]
        prompts = [self._prompt(name, tokens) for name in adapters]
        hidden_states = self.site.normed(torch.cat(prompts)).to(tokens.dtype)
        lengths = tuple(len(prompt) for prompt in prompts) if self.site.kind == "textual" else None
        arguments = prompt_arguments(self.signature, arguments, hidden_states, lengths, self.site.rotary, starts)
        shape = (1 if starts is None else starts.count, len(hidden_states))
        return record_rows(self.base_layer, self.site.path, arguments, shape, call)

    def _prompt(self, adapter_name: str, tokens: torch.Tensor) -> torch.Tensor:
        """The prompt rows of an adapter beside tokens: [P ; f_in(V)], where f_in is the connector."""
        rows = []
        if adapter_name in self.m2pt_prompt:
            rows.append(self.m2pt_prompt[adapter_name]().to(tokens))
        if adapter_name in self.m2pt_interaction:
            interaction = self.m2pt_interaction[adapter_name]()
            rows.append(project(self.site.connector, interaction, adapter_name).to(tokens))
        return torch.cat(rows)

    def _device_for(self, layer_name: str) -> torch.device | None:
        # Interaction prompts go through the connector first, which may be on another device than the layer.
        is_interaction = layer_name == "m2pt_interaction" and self.site.connector is not None
        return device_of(self.site.connector.module) if is_interaction else super()._device_for(layer_name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


class _KeptRows:
    """Rows for one cache, which stay right as long as none of the weights changes that they were computed from."""

    def __init__(
        self,
        rows: Rows | list[Rows | None] | None,
        starts: Starts | None,
        cache: Any,
        key: tuple[Any, ...],
        sources: Sequence[nn.Module],
    ) -> None:
        self.rows = rows
        self.starts = starts
        self.cache = weakref.ref(cache)
        self.key = key
        self.weights = [
            (tensors, name, weight, _version(weight), _pointer(weight))
            for module in sources
            # Many quantised layers keep their weights in buffers.
            for tensors in (module._parameters, module._buffers)
            for name, weight in tensors.items()
            if weight is not None
        ]

    def hold_for(self, cache: Any, key: tuple[Any, ...]) -> bool:
        """Whether these are the rows for the next token of a cache."""
        if self.cache() is not cache or self.key != key:
            return False
        # A compiled step does not look at weights: it takes the rows of the step before as they are.
        return torch.compiler.is_compiling() or self._weights_are_unchanged()

    def _weights_are_unchanged(self) -> bool:
        # Every layer asks for every token.
        for tensors, name, weight, version, pointer in self.weights:
            now = tensors[name]
            if now is not weight:
                # What is offloaded is another stand-in after every call.
                if not (now.is_meta and weight.is_meta):
                    return False
            elif version is None or now._version != version:
                return False
            elif pointer is not None and now.data_ptr() != pointer:
                return False
        return True


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    # Devices without data know of no autocast.
    is_on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_on else None


def _version(weight: torch.Tensor) -> int | None:
    # torch counts the changes of every tensor, except of those made in inference mode.
    return None if weight.is_inference() else weight._version


def _pointer(weight: torch.Tensor) -> int | None:
    # Quantised and sharded weights have no memory of their own.
    return weight.data_ptr() if type(weight) in (nn.Parameter, torch.Tensor) else None
