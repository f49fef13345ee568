"""Keys and values of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .first_tokens import FirstTokens


@dataclass
class PromptKV:
    """
    Keys and values of the prompts of one attention module.

    Args:
        key (`torch.Tensor` of shape `(1 or batch_size, num_key_value_heads, num_prompts, head_dim)`):
            Keys, normed and rotated as the module does it.
        value (`torch.Tensor` of shape `(1 or batch_size, num_key_value_heads, num_prompts, value_head_dim)`):
            Values.
        visible (`torch.Tensor` of shape `(batch_size, 1 or num_tokens, num_prompts)`, *optional*):
            Which prompts each token sees. `None` if it sees all.
        is_in_front (`bool`, defaults to `False`):
            Whether they are in front of the keys and values of tokens already.
    """

    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor | None = None
    is_in_front: bool = False

    def __len__(self) -> int:
        return self.key.shape[2]

    def count_tokens(self, key: torch.Tensor) -> int:
        """The number of tokens whose keys an attention function got."""
        return key.shape[2] - (len(self) if self.is_in_front else 0)

    def prepend_to(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Puts the prompts in front of key and value of tokens, if they are not there.

        Args:
            key (`torch.Tensor` of shape `(batch_size, num_key_value_heads, key_length, head_dim)`):
                Keys of tokens.
            value (`torch.Tensor` of shape `(batch_size, num_key_value_heads, key_length, value_head_dim)`):
                Values of tokens.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Keys and values, of length `num_prompts + key_length`.
        """
        if self.is_in_front:
            return key, value
        return _prepend(self.key, key), _prepend(self.value, value)

    @staticmethod
    def stack(samples: Sequence[PromptKV | None]) -> PromptKV | None:
        """Makes a batch of the prompts of each sample. `None` stands for no prompts."""
        some = next((prompts for prompts in samples if prompts is not None), None)
        if some is None:
            return None
        none = PromptKV(some.key[:, :, :0], some.value[:, :, :0])
        samples = [none if prompts is None else prompts for prompts in samples]
        counts = [len(prompts) for prompts in samples]
        key = torch.cat([pad_length(prompts.key, max(counts)) for prompts in samples])
        value = torch.cat([pad_length(prompts.value, max(counts)) for prompts in samples])
        if min(counts) == max(counts):
            return PromptKV(key, value)
        positions = torch.arange(max(counts), device=key.device)
        return PromptKV(key, value, positions < torch.tensor(counts, device=key.device)[:, None, None])

    def select(self, indices: torch.Tensor | Sequence[int]) -> PromptKV:
        """Those of some elements of the batch."""
        indices = torch.as_tensor(indices, device=self.key.device)
        return PromptKV(self.key.index_select(0, indices), self.value.index_select(0, indices))

    @staticmethod
    def concatenate(prompts: Sequence[PromptKV], is_seen: Sequence[torch.Tensor]) -> PromptKV:
        """
        Concatenates all elements of batches into a batch of 1.

        Args:
            prompts (`Sequence[PromptKV]`):
                The batches, in which every token sees all prompts.
            is_seen (`Sequence[torch.Tensor]`):
                For each, who sees which of its elements: tensors of shape `(batch_size, num_tokens, num_elements)`.
        """
        key, value = (
            torch.cat([part.transpose(0, 1).flatten(1, 2)[None] for part in parts], dim=2)
            for parts in zip(*((batch.key, batch.value) for batch in prompts))
        )
        visible = [seen.repeat_interleave(len(batch), dim=-1) for batch, seen in zip(prompts, is_seen)]
        return PromptKV(key, value, torch.cat(visible, dim=-1))


def assign_prompt_kv(
    prompts: dict[str | None, PromptKV], names: Sequence[str] | None, first: FirstTokens | None, is_packed: bool
) -> PromptKV | list[PromptKV | None] | None:
    """
    Gives each sample, packed sequence or image the prompts of its adapter at its position.

    Args:
        prompts (`dict[str | None, PromptKV]`):
            Prompts by the name of their adapter, in a batch with an element for each first token.
        names (`Sequence[str]`, *optional*):
            The adapter of each sample or image, which may have no prompts. `None` if all use those under `None`.
        first ([`~peft_m2pt.attention.first_tokens.FirstTokens`], *optional*):
            The first tokens. `None` for prompts without a position.
        is_packed (`bool`):
            Whether images are packed into one row.

    Returns:
        `PromptKV` or `list[PromptKV | None]`: A batch for all samples, or one for each packed sequence or image.
        `None` for no prompts.
    """
    if first is not None and first.by_sequence is not None:
        of_row = prompts.get(None if names is None else names[0])
        return None if of_row is None else [of_row.select([index]) for index in first.by_sequence]
    if first is not None and first.by_token is not None:
        return _assign_by_token(prompts, names, first)
    indices = None if first is None else first.by_sample
    if names is None:
        return prompts[None] if indices is None else prompts[None].select(indices)
    assigned = [prompts.get(name) for name in names]
    if first is not None and (indices := first.indices) is not None:
        assigned = [
            one if one is None else one.select(index) for one, index in zip(assigned, indices[:, None].unbind())
        ]
    return assigned if is_packed else PromptKV.stack(assigned)


def _assign_by_token(
    prompts: dict[str | None, PromptKV], names: Sequence[str] | None, first: FirstTokens
) -> PromptKV | None:
    """All prompts in a batch of 1, of which each token sees those of its own sequence and adapter."""
    by_token = first.by_token
    is_seen = {name: by_token[..., None] == torch.arange(first.count, device=by_token.device) for name in prompts}
    if names is not None:
        for name in prompts:
            uses = torch.tensor([other == name for other in names], device=by_token.device)
            is_seen[name] = is_seen[name] & uses[:, None, None]
    return PromptKV.concatenate(list(prompts.values()), list(is_seen.values())) if prompts else None


def _prepend(prompts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([prompts.to(tokens.dtype).expand(tokens.shape[0], -1, -1, -1), tokens], dim=2)


def pad_length(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Pads a tensor of shape `(..., length, width)` with zeros at the end, up to a length."""
    return nn.functional.pad(tensor, (0, 0, 0, length - tensor.shape[-2]))
