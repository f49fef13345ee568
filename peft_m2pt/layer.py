"""Where prompts live: a wrapper around each adapted self-attention module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .anatomy import Site
from .attention import Rows, attending, extend_attention_function, record_rows


NOT_MERGEABLE = (
    "M2PT cannot be merged into the base weights: prompts are additional keys and values that every token attends "
    "to, not a change of any weight. Keep the adapter beside the model (it adds about 0.1% of its parameters), or "
    "remove it with `unload()`."
)

# Arguments of attention modules that speak of the tokens, and must not reach a pass over prompt rows.
CACHE_ARGUMENTS = ("past_key_values", "past_key_value")
TOKEN_ARGUMENTS = ("attention_mask", "cache_position", "use_cache", *CACHE_ARGUMENTS)


class M2PTPrompt(nn.Module):
    """
    The prompt of one adapter in one layer.

    It is a module that is called, not a bare parameter, since sharded training gathers the parameters of a module when
    it is called.

    Args:
        num_tokens (`int`):
            Number n of prompt vectors.
        width (`int`):
            Their width D.
    """

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.width = width
        self.weight = nn.Parameter(torch.empty(num_tokens, width))

    def forward(self) -> torch.Tensor:
        """Returns the prompt, a `torch.Tensor` of shape `(num_tokens, width)`."""
        return self.weight

    def extra_repr(self) -> str:
        return f"num_tokens={self.num_tokens}, width={self.width}"


class M2PTAttention(nn.Module, BaseTunerLayer):
    """
    A self-attention module with prompts.

    For layer i with prompt P of shape `[n, D]` (equations of the paper, arXiv 2409.15657, section 3, in the form in
    which they act):

        K = [W_k LN(P) ; K_tokens],  V = [W_v LN(P) ; V_tokens],  output = softmax(Q_tokens K^T / sqrt(d)) V

    The module's own code computes the rows of K and V, including what its family does to keys: norms, rotary, grouped
    or fused projections.

    Args:
        site ([`~peft_m2pt.anatomy.Site`]):
            The attention module and its surroundings.
    """

    adapter_layer_names = ("m2pt_prompt",)

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.base_layer = site.attention
        self.site = site
        self.m2pt_prompt = nn.ModuleDict()
        self._argument_names = list(inspect.signature(type(site.attention).forward).parameters)[1:]
        self._kept: _KeptRows | None = None

    def update_layer(self, adapter_name: str, num_tokens: int, init: Callable[[torch.Tensor, Site], None]) -> None:
        """
        Adds a prompt for an adapter.

        Args:
            adapter_name (`str`):
                Name of the adapter.
            num_tokens (`int`):
                Number of prompt vectors.
            init (`Callable`):
                Fills a prompt, a `torch.Tensor` of shape `(num_tokens, width)`, in place for a site.
        """
        prompt = M2PTPrompt(num_tokens, self.site.width)
        init(prompt.weight, self.site)
        self.m2pt_prompt[adapter_name] = prompt
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the base layer, which attends to the prompts of the active adapters besides its own tokens."""
        prompts = [] if self.disable_adapters else self._active_prompts()
        if not prompts:
            return self.base_layer(*args, **kwargs)
        extend_attention_function(self.base_layer, self.site.path)
        rows = self._rows(prompts, dict(zip(self._argument_names, args), **kwargs))
        with attending(self.base_layer, self.site.path, rows):
            return self.base_layer(*args, **kwargs)

    def _active_prompts(self) -> list[M2PTPrompt]:
        return [self.m2pt_prompt[name] for name in self.active_adapters if name in self.m2pt_prompt]

    def _rows(self, prompts: Sequence[M2PTPrompt], arguments: dict[str, Any]) -> Rows:
        """
        Returns key and value of the prompts.

        Decoding, one token at a time on top of a cache, goes on with those of the step before. All other calls compute
        them anew, which costs little for many tokens, and lets no change of a weight go unseen.
        """
        if torch.is_grad_enabled():
            self._kept = None
            return self._record(prompts, arguments)
        tokens = arguments[self._argument_names[0]]
        decoding = tokens.shape[-2] == 1 and any(arguments.get(name) is not None for name in CACHE_ARGUMENTS)
        device_type = tokens.device.type
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        key = (tokens.dtype, tokens.device, autocast, *(id(prompt.weight) for prompt in prompts))
        kept = self._kept
        if not decoding or kept is None or not kept.holds_for(key):
            norm = getattr(self.site.block, self.site.norm)
            sources = [source for module in (*prompts, norm, self.base_layer) for source in module.parameters()]
            kept = self._kept = _KeptRows(self._record(prompts, arguments), key, sources)
        return kept.rows

    def _record(self, prompts: Sequence[M2PTPrompt], arguments: dict[str, Any]) -> Rows:
        """Lets the base layer compute key and value of the prompts, in a batch of 1."""
        hidden_states_name = self._argument_names[0]
        tokens = arguments[hidden_states_name]
        hidden_states = torch.cat([prompt() for prompt in prompts]).to(tokens.dtype)
        hidden_states = getattr(self.site.block, self.site.norm)(hidden_states).to(tokens.dtype)
        hidden_states = hidden_states.reshape(*[1] * (tokens.dim() - 2), *hidden_states.shape)
        # Text prompts stand right in front of the first token, at -n ... -1, each adapter's on its own.
        positions = [torch.arange(-prompt.num_tokens, 0, device=tokens.device) for prompt in prompts]
        position_ids = torch.cat(positions)[None]

        arguments = {name: None if name in TOKEN_ARGUMENTS else value for name, value in arguments.items()}
        arguments[hidden_states_name] = hidden_states
        if arguments.get("position_ids") is not None:
            arguments["position_ids"] = position_ids
        if arguments.get("position_embeddings") is not None:
            arguments["position_embeddings"] = self._position_embeddings(
                hidden_states, position_ids, arguments["position_embeddings"]
            )
        return record_rows(self.base_layer, self.site.path, arguments)

    def _position_embeddings(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor, of_tokens: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.site.rotary is None:
            # Visual prompts have no place in the image: they are not rotated (cos 1, sin 0).
            cos = of_tokens[0]
            cos = cos.new_ones(*[1] * (cos.dim() - 2), position_ids.shape[-1], cos.shape[-1])
            return cos, torch.zeros_like(cos)
        # The function below the decorators: these adapt the frequencies of some rotaries to the longest position they
        # see. The frequencies in use are those of the tokens, and so must be those of the prompts.
        rotary = self.site.rotary
        return inspect.unwrap(type(rotary).forward)(rotary, hidden_states, position_ids)

    def _apply(self, *args: Any, **kwargs: Any) -> M2PTAttention:
        self._kept = None  # computed from weights that are about to move or change their dtype
        return super()._apply(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(NOT_MERGEABLE)

    def unmerge(self) -> None:
        raise NotImplementedError("M2PT cannot be merged, so there is nothing to unmerge.")

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # An attention module has no `weight` of its own. Of a quantised one, the norm is what has a dtype.
        for module in (base_layer, getattr(self.site.block, self.site.norm)):
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    return parameter.device, parameter.dtype
        return super()._get_base_layer_device_and_dtype(base_layer)

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their attention modules, of which this wrapper has taken the place.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "m2pt." + super().__repr__()


class _KeptRows:
    """Rows, and the tensors they were computed from: as long as none of these changes, the rows stay right."""

    def __init__(self, rows: Rows, key: tuple[Any, ...], sources: Sequence[torch.Tensor]) -> None:
        self.rows = rows
        self.key = key
        self.sources = sources
        self.version = self._count_changes()

    def holds_for(self, key: tuple[Any, ...]) -> bool:
        return self.key == key and self.version is not None and self.version == self._count_changes()

    def _count_changes(self) -> int | None:
        # torch counts the changes of every tensor, except of those made in inference mode.
        if any(source.is_inference() for source in self.sources):
            return None
        return sum(source._version for source in self.sources)
