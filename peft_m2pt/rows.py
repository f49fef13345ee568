"""Key and value of prompt rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Rows:
    """
    Key and value of the prompt rows of one attention module.

    Args:
        key (`torch.Tensor` of shape `(1 or batch_size, num_key_value_heads, num_rows, head_dim)`):
            Keys, normed and rotated as the module does it.
        value (`torch.Tensor` of shape `(1 or batch_size, num_key_value_heads, num_rows, value_head_dim)`):
            Values.
        visible (`torch.Tensor` of shape `(batch_size, num_rows)`, *optional*):
            Which rows each sample sees. `None` if it sees all.
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
        return Rows(key, value, positions < torch.tensor(counts, device=key.device)[:, None])


def _put_in_front(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows.to(tokens.dtype).expand(tokens.shape[0], -1, -1, -1), tokens], dim=2)


def pad_rows(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Adds zeros behind the rows of a tensor of shape `(..., length, width)`, up to a number of rows."""
    return nn.functional.pad(rows, (0, 0, 0, num_rows - rows.shape[-2]))
