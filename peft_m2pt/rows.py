"""Key and value of prompt rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn


if TYPE_CHECKING:
    from .starts import Starts


@dataclass
class Rows:
    """
    Key and value of the prompt rows of one attention module.

    Args:
        key (`torch.Tensor` of shape `(1 or batch_size, num_key_value_heads, num_rows, head_dim)`):
            Keys, normed and rotated as the module does it.
        value (`torch.Tensor` of shape `(1 or batch_size, num_key_value_heads, num_rows, value_head_dim)`):
            Values.
        visible (`torch.Tensor` of shape `(batch_size, 1 or num_tokens, num_rows)`, *optional*):
            Which rows each token sees. `None` if it sees all.
    """

    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.key.shape[2]

    def put_in_front(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Puts the rows in front of key and value of tokens.

        Args:
            key (`torch.Tensor` of shape `(batch_size, num_key_value_heads, key_length, head_dim)`):
                Keys of tokens.
            value (`torch.Tensor` of shape `(batch_size, num_key_value_heads, key_length, value_head_dim)`):
                Values of tokens.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Keys and values, of length `num_rows + key_length`.
        """
        return _put_in_front(self.key, key), _put_in_front(self.value, value)

    @staticmethod
    def of_batch(rows: Sequence[Rows | None]) -> Rows | None:
        """Puts the rows of each sample side by side, as a batch. `None` stands for no rows."""
        some = next((row for row in rows if row is not None), None)
        if some is None:
            return None
        none = Rows(some.key[:, :, :0], some.value[:, :, :0])
        rows = [none if row is None else row for row in rows]
        counts = [len(row) for row in rows]
        key = torch.cat([pad_rows(row.key, max(counts)) for row in rows])
        value = torch.cat([pad_rows(row.value, max(counts)) for row in rows])
        if min(counts) == max(counts):
            return Rows(key, value)
        positions = torch.arange(max(counts), device=key.device)
        return Rows(key, value, positions < torch.tensor(counts, device=key.device)[:, None, None])

    def select(self, numbers: torch.Tensor | Sequence[int]) -> Rows:
        """Those of some elements of the batch."""
        numbers = torch.as_tensor(numbers, device=self.key.device)
        return Rows(self.key.index_select(0, numbers), self.value.index_select(0, numbers))

    @staticmethod
    def side_by_side(rows: Sequence[Rows], is_seen: Sequence[torch.Tensor]) -> Rows:
        """
        Puts the elements of batches side by side, in a batch of 1.

        Args:
            rows (`Sequence[Rows]`):
                The rows of which all see all.
            is_seen (`Sequence[torch.Tensor]`):
                For each, who sees which element of its batch: tensors of shape `(batch_size, num_tokens, elements)`.
        """
        key, value = (
            torch.cat([part.transpose(0, 1).flatten(1, 2)[None] for part in parts], dim=2)
            for parts in zip(*((row.key, row.value) for row in rows))
        )
        visible = [seen.repeat_interleave(len(row), dim=-1) for row, seen in zip(rows, is_seen)]
        return Rows(key, value, torch.cat(visible, dim=-1))


def arrange(
    rows: dict[str | None, Rows], names: Sequence[str] | None, starts: Starts | None, is_packed: bool
) -> Rows | list[Rows | None] | None:
    """
    Gives each part of what attention is computed of its rows.

    Args:
        rows (`dict[str | None, Rows]`):
            Rows by the names of adapters, in a batch for each start.
        names (`Sequence[str]`, *optional*):
            The adapter of each sample, or of each image. One without rows has none. `None` if all have all rows.
        starts ([`~peft_m2pt.starts.Starts`], *optional*):
            The tokens that they stand in front of. `None` if it does not matter where they stand.
        is_packed (`bool`):
            Whether images are packed into one row.

    Returns:
        `Rows` or `list[Rows | None]`: Rows for all, as a batch, or of each packed sequence or image. `None` for none.
    """
    if starts is not None and starts.of_sequences is not None:
        of_row = rows.get(None if names is None else names[0])
        return None if of_row is None else [of_row.select([number]) for number in starts.of_sequences]
    if starts is not None and starts.of_tokens is not None:
        return _side_by_side(rows, names, starts)
    numbers = None if starts is None else starts.of_samples
    if names is None:
        return rows[None] if numbers is None else rows[None].select(numbers)
    of_parts = [rows.get(name) for name in names]
    if starts is not None and (numbers := starts.numbers) is not None:
        of_parts = [
            row if row is None else row.select(number) for row, number in zip(of_parts, numbers[:, None].unbind())
        ]
    return of_parts if is_packed else Rows.of_batch(of_parts)


def _side_by_side(rows: dict[str | None, Rows], names: Sequence[str] | None, starts: Starts) -> Rows | None:
    """Rows for each start, side by side, of which each token sees those of its own sequence."""
    of_tokens = starts.of_tokens
    is_seen = {name: of_tokens[..., None] == torch.arange(starts.count, device=of_tokens.device) for name in rows}
    if names is not None:
        for name in rows:
            uses = torch.tensor([other == name for other in names], device=of_tokens.device)
            is_seen[name] = is_seen[name] & uses[:, None, None]
    return Rows.side_by_side(list(rows.values()), list(is_seen.values())) if rows else None


def _put_in_front(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows.to(tokens.dtype).expand(tokens.shape[0], -1, -1, -1), tokens], dim=2)


def pad_rows(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Adds zeros behind the rows of a tensor of shape `(..., length, width)`, up to a number of rows."""
    return nn.functional.pad(rows, (0, 0, 0, num_rows - rows.shape[-2]))
