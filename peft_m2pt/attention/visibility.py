"""Reads from an attention mask which token is the first of the sequence of each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask


# An additive mask hides a key whose score it lowers further than this.
HIDDEN = -1e3


# A larger mask is read in parts of this many entries.
MAX_ENTRIES = 2**26


@dataclass(frozen=True)
class Visibility:
    """
    Which keys the tokens of a call see.

    Args:
        columns (`torch.Tensor` of shape `(num_tokens,)`):
            The column of each token in the mask.
        first_visible (`torch.Tensor` of shape `(batch_size, num_tokens)`):
            The column of the first key that each token sees. For padding, that of its sample.
        is_token (`torch.Tensor` of shape `(batch_size, num_tokens)`):
            False for padding.
        previous_key (`torch.Tensor` of shape `(batch_size, num_tokens)`):
            The column of the last key before each token, -1 if there is none.
        window (`int`, *optional*):
            The length of the sliding window.
        has_keys (`torch.Tensor` of shape `(batch_size,)`):
            Whether any token of a sample sees a key.
        first_of_sample (`torch.Tensor` of shape `(batch_size,)`):
            The column of the first key that any token of a sample sees.

    The batch size is 1 if the mask is the same for all samples.
    """

    columns: torch.Tensor
    first_visible: torch.Tensor
    is_token: torch.Tensor
    previous_key: torch.Tensor
    window: int | None
    has_keys: torch.Tensor
    first_of_sample: torch.Tensor

    @property
    def is_start(self) -> torch.Tensor:
        """Whether a token is the first of a sequence, of shape `(batch_size, num_tokens)`."""
        return self.is_token & (self.first_visible == self.columns)

    @property
    def is_ambiguous(self) -> torch.Tensor:
        """Whether a start may also be a token behind a hole that is as long as the sliding window."""
        if self.window is None:
            return torch.zeros_like(self.is_token)
        return self.is_start & (self.previous_key >= 0) & (self.columns - self.previous_key >= self.window)


def read_visibility(
    mask: torch.Tensor | BlockMask,
    batch_size: int,
    num_tokens: int,
    first_column: int | torch.Tensor,
    reach: tuple[int | None, int | None],
    in_one_go: bool,
) -> Visibility:
    """
    Reads from a mask which keys tokens see.

    Args:
        mask (`torch.Tensor` or `BlockMask`):
            Of shape `(batch_size, num_keys)`, with 0 for padding; or of shape
            `(batch_size, ..., num_tokens, num_keys)`, boolean (`True`: visible) or additive; or in blocks.
        batch_size (`int`), num_tokens (`int`):
            The number of samples, and of tokens in each.
        first_column (`int` or `torch.Tensor`):
            The column of the first token.
        reach (`tuple[int | None, int | None]`):
            The length of the sliding window and of attention chunks. What these hide does not separate sequences.
        in_one_go (`bool`):
            Whether to read the mask as a whole, whatever its size, as compiled code must.

    Returns:
        [`Visibility`]
    """
    num_keys = mask.seq_lengths[1] if isinstance(mask, BlockMask) else mask.shape[-1]
    if isinstance(first_column, int) and not in_one_go:
        # The rest is the empty part of a static cache.
        num_keys = min(num_keys, first_column + num_tokens)

    def parts() -> Iterator[torch.Tensor]:
        step = num_tokens if in_one_go else max(1, MAX_ENTRIES // (batch_size * num_keys))
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            yield (mask != 0)[:, None, :num_keys]
        elif step >= num_tokens:
            yield _visible(mask, batch_size, slice(0, num_tokens), num_keys)
        else:
            for start in range(0, num_tokens, step):
                yield _visible(mask, batch_size, slice(start, min(start + step, num_tokens)), num_keys)

    is_key = _find_keys(parts())
    found = [((part & is_key[:, None]).any(-1), _first(part & is_key[:, None])) for part in parts()]
    sees_key, first_visible = (torch.cat(tensors, dim=1).expand(-1, num_tokens) for tensors in zip(*found))
    columns = first_column + torch.arange(num_tokens, device=is_key.device)
    is_token = sees_key & is_key[:, columns]
    first_of_sample = _first(is_key)
    numbers = torch.arange(num_keys, device=is_key.device)
    previous_key = torch.where(is_key, numbers, -1).cummax(-1).values
    previous_key = nn.functional.pad(previous_key, (1, 0), value=-1)[:, columns]
    window, chunk = reach
    if chunk is not None:
        first_visible = _beyond_chunk(first_visible, previous_key, columns, first_of_sample, chunk)
    first_visible = torch.where(is_token, first_visible, first_of_sample[:, None])
    return Visibility(columns, first_visible, is_token, previous_key, window, is_key.any(-1), first_of_sample)


def _first(flags: torch.Tensor) -> torch.Tensor:
    return flags.to(torch.uint8).argmax(-1)


def _visible(mask: torch.Tensor | BlockMask, batch_size: int, tokens: slice, num_keys: int) -> torch.Tensor:
    """Which keys some of the tokens see, of shape `(1 or batch_size, number of tokens, num_keys)`."""
    if isinstance(mask, BlockMask):
        return _visible_in_blocks(mask, batch_size, tokens, num_keys)
    if mask.shape[-2] > 1:
        mask = mask[..., tokens, :]
    mask = mask[..., :num_keys]
    visible = mask > HIDDEN if mask.is_floating_point() else mask != 0
    # All heads see the same.
    return visible.flatten(1, -3).any(1) if visible.dim() > 3 else visible


def _visible_in_blocks(mask: BlockMask, batch_size: int, tokens: slice, num_keys: int) -> torch.Tensor:
    device = mask.kv_indices.device
    queries = torch.arange(tokens.start, tokens.stop, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)
    samples = torch.arange(batch_size, device=device)[:, None, None]
    blocks = mask.to_dense()[:, 0].bool()
    is_in_block = blocks[:, queries // mask.BLOCK_SIZE[0], keys // mask.BLOCK_SIZE[1]]
    return is_in_block & mask.mask_mod(samples, torch.zeros_like(samples), queries, keys)


def _find_keys(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    """
    Which keys are tokens, of shape `(batch_size, num_keys)`.

    Some masks show padded queries every key: these do not make a token of padding, unless all queries see every key.
    """
    seen_by_any = seen = None
    for part in parts:
        of_part = (part & ~part.all(-1, keepdim=True)).any(1)
        seen = of_part if seen is None else seen | of_part
        seen_by_any = part.any(1) if seen_by_any is None else seen_by_any | part.any(1)
    return torch.where(seen.any(-1, keepdim=True), seen, seen_by_any)


def _beyond_chunk(
    first: torch.Tensor, previous: torch.Tensor, columns: torch.Tensor, first_of_sample: torch.Tensor, chunk: int
) -> torch.Tensor:
    """The first key that each token sees; for a token that sees none because a chunk ends, the key before it."""
    is_cut_off = (first == columns) & (previous >= 0)
    # Chunks are counted by columns, in which padding may hide their beginning, or by positions in each sequence.
    chunk_of_previous, chunk_of_token = ((keys - first_of_sample[:, None]) // chunk for keys in (previous, columns))
    previous_cut = torch.where(first == columns, columns, -1).cummax(-1).values
    previous_cut = nn.functional.pad(previous_cut, (1, -1), value=-1)
    ends_chunk = (chunk_of_previous < chunk_of_token) | (columns - previous_cut == chunk)
    return torch.where(is_cut_off & ends_chunk, previous, first)
