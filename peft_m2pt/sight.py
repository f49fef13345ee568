"""What tokens see, read from the mask that an attention module is given: who is the first of a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask


# What a mask adds to the score of a hidden key is less than this.
HIDDEN = -1e3

# How many entries of a mask are looked at in one go.
NUM_ENTRIES = 2**26


@dataclass(frozen=True)
class Sight:
    """
    What tokens see.

    Args:
        columns (`torch.Tensor` of shape `(num_tokens,)`):
            The column of each token in the mask.
        first (`torch.Tensor` of shape `(batch_size, num_tokens)`):
            The column of the first key that each token sees. That of its sample, for padding.
        counts (`torch.Tensor` of shape `(batch_size, num_tokens)`):
            Whether a token is more than padding.
        before (`torch.Tensor` of shape `(batch_size, num_tokens)`):
            The column of the last key in front of each token, -1 if there is none.
        window (`int`, *optional*):
            How many tokens a token sees at most.
        has_some (`torch.Tensor` of shape `(batch_size,)`):
            Whether any token of a sample sees a key.
        first_of_samples (`torch.Tensor` of shape `(batch_size,)`):
            The column of the first key that any token of a sample sees.

    The batch size is 1 where the mask is the same for all samples.
    """

    columns: torch.Tensor
    first: torch.Tensor
    counts: torch.Tensor
    before: torch.Tensor
    window: int | None
    has_some: torch.Tensor
    first_of_samples: torch.Tensor

    @property
    def is_start(self) -> torch.Tensor:
        """Whether a token is the first of a sequence, of shape `(batch_size, num_tokens)`."""
        return self.counts & (self.first == self.columns)

    @property
    def is_unclear(self) -> torch.Tensor:
        """Of those: which may as well stand behind a hole that is as long as what they see, of the same shape."""
        if self.window is None:
            return torch.zeros_like(self.counts)
        return self.is_start & (self.before >= 0) & (self.columns - self.before >= self.window)


def look(
    mask: torch.Tensor | BlockMask,
    batch_size: int,
    num_tokens: int,
    num_before: int | torch.Tensor,
    reach: tuple[int | None, int | None],
    in_one_go: bool,
) -> Sight:
    """
    Reads what tokens see from a mask.

    Args:
        mask (`torch.Tensor` or `BlockMask`):
            The mask: of shape `(batch_size, num_keys)`, not 0 for a key that is seen; or of shape
            `(batch_size, ..., num_tokens, num_keys)`, with truth values or with what is added to scores; or in blocks.
        batch_size (`int`), num_tokens (`int`):
            How many samples there are, and how many tokens in each.
        num_before (`int` or `torch.Tensor`):
            How many columns stand in front of that of the first token.
        reach (`tuple[int | None, int | None]`):
            How many tokens a token sees at most, and of how many tokens chunks are that do not see each other. These
            are no sequences.
        in_one_go (`bool`):
            Whether to look at all of the mask at once, as code must that is compiled.

    Returns:
        [`Sight`]
    """
    num_keys = mask.seq_lengths[1] if isinstance(mask, BlockMask) else mask.shape[-1]
    if isinstance(num_before, int) and not in_one_go:
        # Behind the last token there are the empty places of a static cache.
        num_keys = min(num_keys, num_before + num_tokens)

    def parts() -> Iterator[torch.Tensor]:
        step = num_tokens if in_one_go else max(1, NUM_ENTRIES // (batch_size * num_keys))
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            yield (mask != 0)[:, None, :num_keys]
        elif step >= num_tokens:
            yield _visible(mask, batch_size, slice(0, num_tokens), num_keys)
        else:
            for start in range(0, num_tokens, step):
                yield _visible(mask, batch_size, slice(start, min(start + step, num_tokens)), num_keys)

    is_key = _find_keys(parts())
    found = [((part & is_key[:, None]).any(-1), _first(part & is_key[:, None])) for part in parts()]
    sees, first = (torch.cat(tensors, dim=1).expand(-1, num_tokens) for tensors in zip(*found))
    columns = num_before + torch.arange(num_tokens, device=is_key.device)
    counts = sees & is_key[:, columns]
    first_of_samples = _first(is_key)
    # The last key in front of each token.
    numbers = torch.arange(num_keys, device=is_key.device)
    before = torch.where(is_key, numbers, -1).cummax(-1).values
    before = nn.functional.pad(before, (1, 0), value=-1)[:, columns]
    window, chunk = reach
    if chunk is not None:
        first = _beyond_chunk(first, before, columns, first_of_samples, chunk)
    first = torch.where(counts, first, first_of_samples[:, None])
    return Sight(columns, first, counts, before, window, is_key.any(-1), first_of_samples)


def _first(flags: torch.Tensor) -> torch.Tensor:
    return flags.to(torch.uint8).argmax(-1)


def _visible(mask: torch.Tensor | BlockMask, batch_size: int, tokens: slice, num_keys: int) -> torch.Tensor:
    """Which of the keys some tokens see, of shape `(1 or batch_size, number of tokens, num_keys)`."""
    if isinstance(mask, BlockMask):
        return _visible_in_blocks(mask, batch_size, tokens, num_keys)
    if mask.shape[-2] > 1:
        mask = mask[..., tokens, :]
    mask = mask[..., :num_keys]
    visible = mask > HIDDEN if mask.is_floating_point() else mask != 0
    # Heads see the same.
    return visible.flatten(1, -3).any(1) if visible.dim() > 3 else visible


def _visible_in_blocks(mask: BlockMask, batch_size: int, tokens: slice, num_keys: int) -> torch.Tensor:
    device = mask.kv_indices.device
    queries = torch.arange(tokens.start, tokens.stop, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)
    samples = torch.arange(batch_size, device=device)[:, None, None]
    blocks = mask.to_dense()[:, 0].bool()
    is_looked_at = blocks[:, queries // mask.BLOCK_SIZE[0], keys // mask.BLOCK_SIZE[1]]
    return is_looked_at & mask.mask_mod(samples, torch.zeros_like(samples), queries, keys)


def _find_keys(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    """
    Which keys are seen, of shape `(batch_size, num_keys)`. What sees everything while others do not is padding, of
    which some masks say so, and makes no key of other padding.
    """
    seen_by_any = seen = None
    for part in parts:
        of_part = (part & ~part.all(-1, keepdim=True)).any(1)
        seen = of_part if seen is None else seen | of_part
        seen_by_any = part.any(1) if seen_by_any is None else seen_by_any | part.any(1)
    return torch.where(seen.any(-1, keepdim=True), seen, seen_by_any)


def _beyond_chunk(
    first: torch.Tensor, before: torch.Tensor, columns: torch.Tensor, first_of_samples: torch.Tensor, chunk: int
) -> torch.Tensor:
    """The first key that tokens see, or the one in front of a token that sees none because a chunk ends there."""
    is_cut_off = (first == columns) & (before >= 0)
    # Chunks are counted by columns, wherever padding hides where one begins, or by positions in each sequence.
    of_keys = [(numbers - first_of_samples[:, None]) // chunk for numbers in (before, columns)]
    cut_off_before = torch.where(first == columns, columns, -1).cummax(-1).values
    cut_off_before = nn.functional.pad(cut_off_before, (1, -1), value=-1)
    ends_chunk = (of_keys[0] < of_keys[1]) | (columns - cut_off_before == chunk)
    return torch.where(is_cut_off & ends_chunk, before, first)
