"""A call of an attention module: the positions of its tokens, and what these see in mask and cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..anatomy.arguments import Role, Signature
from ..errors import UnsupportedModelError
from ..upstream import attention_implementation, local_reach
from .cached_first_tokens import CachedFirstTokens, first_tokens_of_layer
from .first_tokens import Positions, position_tensors, sample_axis, take_tokens
from .packed_sequences import MASK_BASED, find_packing
from .visibility import Visibility, read_visibility


def layer_index(attention: nn.Module) -> int:
    """The index under which an attention module writes into a cache."""
    return getattr(attention, "layer_idx", None) or 0


def is_in_graph(tokens: torch.Tensor) -> bool:
    """Whether values of tensors are not available, since a graph is made of operations."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or tokens.is_meta


class ModuleCall:
    """
    A call of an attention module of the language model.

    Args:
        positions (`dict[str, Any]`):
            Those of its arguments that carry positions. Refused if they do not fit the tokens.
        attention, path, signature, arguments:
            As in [`~peft_m2pt.attention.find_first_tokens.find_first_tokens`].
    """

    def __init__(
        self, attention: nn.Module, path: str, signature: Signature, arguments: dict[str, Any], positions: Positions
    ) -> None:
        self.attention = attention
        self.path = path
        self.signature = signature
        self.arguments = arguments
        self.positions = positions
        self.mask = signature.find(Role.MASK, arguments)
        cache = signature.find(Role.CACHE, arguments)
        # That of an encoder-decoder holds one for self-attention.
        self.cache = getattr(cache, "self_attention_cache", cache)
        self.layer = layer_index(attention)
        self._past: int | torch.Tensor | None = None
        tokens = arguments[signature.input_name]
        self.batch_size, self.num_tokens = tokens.shape[0], tokens.shape[-2]
        self.device = tokens.device
        self.is_in_graph = is_in_graph(tokens)
        self.num_position_rows = max(tensor.shape[sample_axis(tensor)] for tensor in position_tensors(positions))
        """The batch size of the positions: 1 if all samples share them."""
        for tensor in position_tensors(positions):
            axis = sample_axis(tensor)
            has_layout = tensor.dim() + axis in (0, 1) and tensor.shape[axis + 1] == self.num_tokens
            if not has_layout or tensor.shape[axis] not in (1, self.batch_size):
                shape = (self.batch_size, self.num_tokens)
                raise self.refusal(f"positions of shape {tuple(tensor.shape)} for tokens of shape {shape}")

    @property
    def past(self) -> int | torch.Tensor:
        """The number of tokens in the cache."""
        if self._past is None:
            length = 0 if self.cache is None else self.cache.get_seq_length(self.layer)
            self._past = length if self.is_in_graph else int(length)
        return self._past

    @property
    def is_first(self) -> bool:
        """Whether the cache is known to be empty."""
        return isinstance(self.past, int) and self.past == 0

    @property
    def offset(self) -> int | torch.Tensor:
        """The number of tokens in the cache for which the mask has no columns."""
        return 0 if self.is_first else self.cache.get_mask_sizes(self.num_tokens, self.layer)[1]

    @property
    def cached(self) -> CachedFirstTokens | None:
        """The first tokens in the cache, if these fit the call."""
        cached = None if self.cache is None else first_tokens_of_layer(self.cache, self.layer)
        if cached is None or cached.first_tokens.positions.keys() != self.positions.keys():
            return None
        return cached if len(cached.indices) in (1, self.batch_size) else None

    @property
    def has_query_mask(self) -> bool:
        """Whether the mask has rows for the tokens, not only columns for keys."""
        return not isinstance(self.mask, torch.Tensor) or self.mask.dim() > 2

    @property
    def sees_all(self) -> bool:
        """Whether no sliding window or chunk of the layer hides a key."""
        reach = [length for length in local_reach(self.attention) if length is not None]
        return not reach or (not self.is_in_graph and self.past + self.num_tokens <= min(reach))

    @property
    def sources(self) -> list[Any]:
        """Everything that its first tokens depend on."""
        return [*position_tensors(self.positions), self.mask, self.cache]

    def take(self, samples: torch.Tensor, tokens: torch.Tensor) -> Positions:
        """The positions of some tokens, each given by its sample and its place in the row."""
        return take_tokens(self.positions, samples, tokens)

    def visibility(self) -> Visibility | None:
        """What the tokens see. `None` without a mask."""
        if self.mask is None:
            return None
        reach, first_column = local_reach(self.attention), self.past - self.offset
        return read_visibility(self.mask, self.batch_size, self.num_tokens, first_column, reach, self.is_in_graph)

    def packed_starts(self) -> torch.Tensor | None:
        """Where each packed sequence begins, if flash attention gets several in one row."""
        if self.mask is not None or attention_implementation(self.attention) in MASK_BASED:
            return None
        arguments = dict(self.arguments)
        if self.is_in_graph:
            arguments["position_ids"] = None
        boundaries = find_packing(self.batch_size, self.num_tokens, arguments).get("cu_seq_lens_q")
        return None if boundaries is None else boundaries[:-1].long()

    def refusal(self, what: str) -> UnsupportedModelError:
        """The error for something that hides where prompts stand."""
        return UnsupportedModelError(
            f"The attention '{self.path}' ({type(self.attention).__name__}) got {what}, so M2PT does not know where "
            f"prompts stand."
        )
