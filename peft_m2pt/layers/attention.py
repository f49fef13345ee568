"""The layer that holds the prompts of a self-attention module, and is called in its place."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..adapted import base_class, base_modules
from ..anatomy.arguments import Role, check_call, read_signature
from ..anatomy.modules import device_of, dtype_of
from ..anatomy.sites import Connector, Site
from ..attention.cached_first_tokens import first_tokens_in_cache
from ..attention.cached_prompts import PROMPTS, CachedPrompts, InFront, Owner, keep_prompts
from ..attention.find_first_tokens import cache_first_tokens, find_first_tokens
from ..attention.first_tokens import FirstTokens
from ..attention.interface import (
    NotInFront,
    attend_in_front,
    attend_with_prompts,
    extend_attention_function,
    record_prompt_kv,
)
from ..attention.module_call import is_in_graph, layer_index
from ..attention.paged import check_requests, first_token_of_requests, prompts_in_cache
from ..attention.prompt_arguments import prompt_arguments
from ..attention.prompt_kv import PromptKV, assign_prompt_kv
from ..errors import UnsupportedModelError
from ..upstream import is_known_to_be_empty, is_paged, layer_in_cache, updates_layers
from .base import M2PTLayer
from .conditions import Conditions
from .connector import project
from .initializer import PromptInitializer
from .mixed_batch import SampleAdapters, sample_adapters
from .prompt import M2PTPrompt


class M2PTAttention(M2PTLayer):
    """
    A self-attention module with prompts.

    For a layer with prompt P of shape `[n, D]`, section 3 of the paper (arXiv 2409.15657) amounts to

        K = [W_k LN(P) ; K_tokens],  V = [W_v LN(P) ; V_tokens],  output = softmax(Q_tokens K^T / sqrt(d)) V

    In the language model, interaction prompts V of the vision encoder's width can be appended: P becomes
    [P ; f_in(V)], where f_in is the connector.

    The prompt rows of K and V are computed by the module's own code, so fused or grouped projections, key norms and
    rotary embeddings are those of the model.

    Args:
        site ([`~peft_m2pt.anatomy.sites.Site`]):
            The attention module and its surroundings in the model.
    """

    adapter_layer_names = ("m2pt_prompt", "m2pt_interaction")
    m2pt_prompt: MutableMapping[str, M2PTPrompt]
    m2pt_interaction: MutableMapping[str, M2PTPrompt]

    def __init__(self, site: Site) -> None:
        super().__init__(site.attention)
        self.site = site
        self.signature = read_signature(base_class(site.attention))
        self.owner = Owner()

    def update_layer(
        self,
        adapter_name: str,
        num_tokens: int,
        num_interaction_tokens: int,
        connector: Connector | None,
        init: PromptInitializer,
    ) -> None:
        """
        Adds prompts for an adapter.

        Args:
            adapter_name (`str`):
                Name of the adapter.
            num_tokens (`int`):
                Number of prompt vectors of the layer's own width.
            num_interaction_tokens (`int`):
                Number of interaction prompts, which the connector projects to this width.
            connector ([`~peft_m2pt.anatomy.sites.Connector`], *optional*):
                The connector, if there are interaction prompts.
            init ([`~peft_m2pt.layers.initializer.PromptInitializer`]):
                Makes the prompts.
        """
        self.owner = self.owner.retire()
        if num_tokens > 0:
            self.m2pt_prompt[adapter_name] = init.make_prompt(num_tokens, self.site, dtype_of(self.base_layer))
        if num_interaction_tokens > 0:
            self.site = replace(self.site, connector=connector)
            num_rows = num_interaction_tokens * connector.rows_per_token
            prompt = init.make_prompt(num_rows, connector, dtype_of(self.base_layer))
            self.m2pt_interaction[adapter_name] = prompt
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the adapted module so that its tokens also attend to the prompts of the active adapters."""
        # Hot path, down to attend_in_front: once per layer and token. Each function that is called is paid for.
        cache = self.signature.find_cache(args, kwargs)
        kept = None if cache is None else self._kept_in(cache, args, kwargs)
        in_front = None if kept is None else kept.in_front
        layer = None if in_front is None else layer_in_cache(cache, kept.layer)
        if layer is not None and in_front.is_safe and not torch.compiler.is_dynamo_compiling():
            if self.signature.unknown:
                check_call(self.signature, self.signature.bind(args, kwargs), self.base_layer, self.site.path)
            try:
                return attend_in_front(self.base_layer, self.site.path, in_front.prompts, layer, args, kwargs)
            except NotInFront:
                # The attention function adds them, and it is observed again.
                in_front.is_safe = None
        return self._attend(args, kwargs, cache, kept)

    def _attend(self, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any, kept: CachedPrompts | None) -> Any:
        """Calls the adapted module, whose attention function adds prompts."""
        base_layer, in_front, layer = self.base_layer, None, None
        if kept is not None and not is_in_graph(self.signature.find_input(args, kwargs)):
            if is_known_to_be_empty(cache, kept.layer):
                kept = None
            else:
                in_front, layer = kept.in_front, layer_in_cache(cache, kept.layer)
        adapters, has_requests = self._adapters_in_use(), is_paged(cache)
        if not adapters:
            if self.site.kind == "textual":
                if not has_requests:
                    cache_first_tokens(base_layer, self.site.path, self.signature, args, kwargs)
                elif prompts_in_cache(cache) is not None:
                    self._put_in_front_of_requests(cache, None)
            return base_layer.call_without_adapters(*args, **kwargs)
        arguments = self.signature.bind(args, kwargs)
        extend_attention_function(base_layer, self.site.path, has_requests)
        check_call(self.signature, arguments, base_layer, self.site.path)
        # Packed images share one set of prompt rows, even if attention is computed image by image.
        is_packed = self.signature.find(Role.BOUNDARIES, arguments) is not None
        record = None if is_packed else partial(self._rows, adapters, arguments)
        rows = self._rows_or_kept(adapters, arguments, cache, kept)
        call = partial(base_layer.call_without_adapters, *args, **kwargs)
        return attend_with_prompts(base_layer, self.site.path, rows, record, call, has_requests, in_front, layer)

    @property
    def is_active(self) -> bool:
        """Whether the module has prompts of an adapter in use."""
        return bool(self._adapters_in_use())

    def _adapters_in_use(self) -> list[str]:
        if self.disable_adapters:
            return []
        samples = sample_adapters()
        return self._adapters(self.active_adapters if samples is None else list(dict.fromkeys(samples.names)))

    def describe_weight(self, layer_name: str, name: str) -> str:
        kind = "interaction" if layer_name == "m2pt_interaction" else self.site.kind
        prefix = "scale of the " if name == "scale" else ""
        return f"{prefix}{kind} prompt of layer {self.site.layer}"

    def _rows(
        self, adapters: list[str], arguments: dict[str, Any], call: int
    ) -> PromptKV | list[PromptKV | None] | None:
        """
        Returns keys and values of the prompts for the n-th call of the attention function: one for all samples, a
        batch, or a list where sequences or images are packed.
        """
        cache = self.signature.find(Role.CACHE, arguments)
        if is_paged(cache):
            return self._rows_of_requests(adapters, arguments, cache, call)
        return self._record_all(adapters, sample_adapters(), arguments, self._first_tokens(arguments), call)

    def _kept_in(self, cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CachedPrompts | None:
        """The prompts that a cache keeps, if this call has a single token and no gradients, and they fit it."""
        kept_by_path = getattr(cache, PROMPTS, None)
        kept = None if kept_by_path is None else kept_by_path.get(self.site.path)
        if kept is None or self._disable_adapters or torch.is_grad_enabled():
            return None
        tokens = self.signature.find_input(args, kwargs)
        if tokens.size(-2) > 1 or kept.owners[0] is not self.owner or not kept.conditions.hold_for(tokens):
            return None
        for owner in kept.owners:
            if not owner.is_current:
                return None
        first = kept.first_tokens
        return kept if first is None or first is first_tokens_in_cache(cache, kept.layer) else None

    def _rows_or_kept(
        self, adapters: list[str], arguments: dict[str, Any], cache: Any, kept: CachedPrompts | None
    ) -> PromptKV | list[PromptKV | None] | None:
        """
        Returns keys and values of the prompts.

        Decoding one token at a time takes those that the cache keeps. The first call with a cache computes them anew,
        as do calls with many tokens, where that is cheap.
        """
        is_compiling = torch.compiler.is_compiling()
        if kept is not None and (kept.are_certain or is_compiling):
            return kept.prompts
        if cache is None or is_paged(cache):
            return self._rows(adapters, arguments, 0)
        first = self._first_tokens(arguments)
        if kept is not None and kept.first_tokens is first:
            return kept.prompts
        rows = self._record_all(adapters, sample_adapters(), arguments, first, 0)
        fits_next_token = first is None or (first.by_token is None and first.is_complete)
        is_kept = fits_next_token and not is_compiling and not torch.is_grad_enabled()
        keep_prompts(cache, self.site.path, self._keep(adapters, rows, first, arguments, cache) if is_kept else None)
        return rows

    def _keep(
        self,
        adapters: list[str],
        rows: PromptKV | list[PromptKV | None] | None,
        first: FirstTokens | None,
        arguments: dict[str, Any],
        cache: Any,
    ) -> CachedPrompts:
        """What a cache keeps of prompts for its next token."""
        kinds = (self.m2pt_prompt, self.m2pt_interaction)
        owners = (self.owner, *(of_kind[name].owner for of_kind in kinds for name in adapters if name in of_kind))
        conditions = Conditions.of(arguments[self.signature.input_name])
        is_certain = first is None or first.count == 1
        in_front = InFront(rows) if isinstance(rows, PromptKV) and is_certain and updates_layers(cache) else None
        return CachedPrompts(layer_index(self.base_layer), rows, first, owners, conditions, is_certain, in_front)

    def _rows_of_requests(self, adapters: list[str], arguments: dict[str, Any], cache: Any, call: int) -> PromptKV:
        """
        Returns key and value of prompts in front of the requests of continuous batching, which stay the same for all
        that a paged cache holds.
        """
        noted = prompts_in_cache(cache)
        if noted is None:
            raise UnsupportedModelError(
                f"The attention '{self.site.path}' ({type(self.base_layer).__name__}) was called with a paged cache "
                f"that is older than its prompts, or was not made by init_continuous_batching(...). Stop its manager, "
                f"call model.destroy_cached_continuous_batching_manager() if it is kept, and begin anew."
            )
        check_requests(self.base_layer, self.site.path, self.signature, arguments, self.site.rotary)
        key = (Conditions.of(arguments[self.signature.input_name]), *adapters)
        kept = noted.get(self.site.path)
        if call == 0 and kept is not None and kept.are_valid_for(cache, key):
            return kept.rows
        start = first_token_of_requests(self.signature, arguments, self.site.rotary)
        rows = self._record(adapters, arguments, start, call)
        if call == 0:
            sources = self._sources(adapters)
            if self.site.rotary is not None:
                sources += self.site.rotary.module.modules()
            self._put_in_front_of_requests(cache, _RowsOfRequests(rows, cache, key, sources))
        return rows

    def _put_in_front_of_requests(self, cache: Any, kept: _RowsOfRequests | None) -> None:
        """Notes what stands in front of the requests in a paged cache, which has to be what stood there before."""
        noted = prompts_in_cache(cache)
        before = noted.setdefault(self.site.path, kept)
        if not _have_equal_rows(before, kept):
            raise self.change_of_prompts()
        noted[self.site.path] = kept

    def change_of_prompts(self) -> UnsupportedModelError:
        """The error for requests whose prompts were changed."""
        return UnsupportedModelError(
            f"The adapter in use, its weights or those of the model were changed while requests of continuous "
            f"batching were running: other prompts than before would stand in front of them at '{self.site.path}'. "
            f"Wait for all requests before such a change, and add those that failed again."
        )

    def are_requests_as_before(self, cache: Any) -> bool:
        """Whether new requests in a paged cache have the prompts of those before."""
        noted, adapters = prompts_in_cache(cache), self._adapters_in_use()
        if self.site.path not in noted:
            return True
        kept = noted[self.site.path]
        if kept is None or not adapters:
            return kept is None and not adapters
        return kept.are_valid_for(cache, (kept.key[0], *adapters))

    def _first_tokens(self, arguments: dict[str, Any]) -> FirstTokens | None:
        """Where the sequences start that prompts are put in front of. `None` for prompts without positions."""
        if self.site.kind == "visual":
            return None
        return find_first_tokens(self.base_layer, self.site.path, self.signature, arguments)

    def _record_all(
        self,
        adapters: list[str],
        samples: SampleAdapters | None,
        arguments: dict[str, Any],
        first: FirstTokens | None,
        call: int,
    ) -> PromptKV | list[PromptKV | None] | None:
        if samples is None:
            return assign_prompt_kv(
                {None: self._record(adapters, arguments, first, call)}, None, first, is_packed=False
            )
        boundaries = self.signature.find(Role.BOUNDARIES, arguments)
        num_parts = len(arguments[self.signature.input_name]) if boundaries is None else len(boundaries) - 1
        is_textual = self.site.kind == "textual"
        names = samples.for_rows(num_parts) if is_textual else samples.for_images(num_parts, self.site.path)
        rows = {name: self._record([name], arguments, first, call) for name in adapters}
        return assign_prompt_kv(rows, names, first, is_packed=boundaries is not None)

    def _sources(self, adapters: Sequence[str]) -> list[nn.Module]:
        """The modules whose weights determine keys and values of the prompts."""
        modules = list(base_modules(self.base_layer))
        for name in self.site.norms:
            modules += getattr(self.site.block, name).modules()
        for name in adapters:
            modules += [prompts[name] for prompts in (self.m2pt_prompt, self.m2pt_interaction) if name in prompts]
        if self.site.connector is not None:
            modules += self.site.connector.module.modules()
        return modules

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        before = list(self.active_adapters)
        super().set_adapter(*args, **kwargs)
        if self.active_adapters != before:
            self.owner = self.owner.retire()

    def delete_adapter(self, adapter_name: str) -> None:
        self.owner = self.owner.retire()
        super().delete_adapter(adapter_name)

    def _record(
        self, adapters: Sequence[str], arguments: dict[str, Any], first: FirstTokens | None, call: int
    ) -> PromptKV:
        """Makes the adapted module compute keys and values of prompts, once for each start."""
        tokens = arguments[self.signature.input_name]
        prompts = [self._prompt(name, tokens) for name in adapters]
        hidden_states = self.site.normed(torch.cat(prompts)).to(tokens.dtype)
        lengths = tuple(len(prompt) for prompt in prompts) if self.site.kind == "textual" else None
        arguments = prompt_arguments(self.signature, arguments, hidden_states, lengths, self.site.rotary, first)
        shape = (1 if first is None else first.count, len(hidden_states))
        return record_prompt_kv(self.base_layer, self.site.path, arguments, shape, call)

    def _prompt(self, adapter_name: str, tokens: torch.Tensor) -> torch.Tensor:
        """The prompt rows of an adapter, [P ; f_in(V)], on the device and in the dtype of the tokens."""
        rows = []
        if adapter_name in self.m2pt_prompt:
            rows.append(self.m2pt_prompt[adapter_name]().to(tokens))
        if adapter_name in self.m2pt_interaction:
            interaction = self.m2pt_interaction[adapter_name]()
            rows.append(project(self.site.connector, interaction, adapter_name).to(tokens))
        return torch.cat(rows)

    def _device_for(self, layer_name: str) -> torch.device | None:
        # Interaction prompts enter the connector first, which may be on another device than the layer.
        is_interaction = layer_name == "m2pt_interaction" and self.site.connector is not None
        return device_of(self.site.connector.module) if is_interaction else super()._device_for(layer_name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy has an owner of its own.
        self.owner = Owner()


class _RowsOfRequests:
    """Prompt rows in front of requests in a paged cache, valid until a weight changes that they were computed from."""

    def __init__(
        self,
        rows: PromptKV,
        cache: Any,
        key: tuple[Any, ...],
        sources: Sequence[nn.Module],
    ) -> None:
        self.rows = rows
        self.cache = weakref.ref(cache)
        self.key = key
        self.weights = [
            (tensors, name, weight, _version(weight), _pointer(weight))
            for module in sources
            # Quantized layers, such as those of BitNet, GPTQ and AWQ, keep their weights in buffers.
            for tensors in (module._parameters, module._buffers)
            for name, weight in tensors.items()
            if weight is not None
        ]

    def are_valid_for(self, cache: Any, key: tuple[Any, ...]) -> bool:
        """Whether the rows can be used for the next token of a cache."""
        if self.cache() is not cache or self.key != key:
            return False
        # A compiled step cannot check weights and reuses the rows unconditionally.
        return torch.compiler.is_compiling() or self._weights_are_unchanged()

    def _weights_are_unchanged(self) -> bool:
        # Hot path: once per layer and token.
        for tensors, name, weight, version, pointer in self.weights:
            now = tensors[name]
            if now is not weight:
                # accelerate replaces offloaded weights by a new meta tensor after each call.
                if not (now.is_meta and weight.is_meta):
                    return False
            elif version is None or now._version != version:
                return False
            elif pointer is not None and now.data_ptr() != pointer:
                return False
        return True


def _have_equal_rows(kept: _RowsOfRequests | None, other: _RowsOfRequests | None) -> bool:
    if kept is other or kept is None or other is None:
        return kept is other
    pairs = ((getattr(kept.rows, name), getattr(other.rows, name)) for name in ("key", "value"))
    return all(first.dtype == second.dtype and torch.equal(first, second) for first, second in pairs)


def _version(weight: torch.Tensor) -> int | None:
    # Inference tensors have no version counter.
    return None if weight.is_inference() else weight._version


def _pointer(weight: torch.Tensor) -> int | None:
    # Subclasses (quantized, sharded) may have no storage of their own.
    return weight.data_ptr() if type(weight) in (nn.Parameter, torch.Tensor) else None
