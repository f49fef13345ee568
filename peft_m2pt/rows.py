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
        counts = [0 if row is None else len(row) for row in rows]
        positions = torch.arange(max(counts), device=some.key.device)
        visible = positions < torch.tensor(counts, device=some.key.device)[:, None]
        key, value = (
            torch.cat([_padded(None if row is None else getattr(row, name), part, max(counts)) for row in rows])
            for name, part in (("key", some.key), ("value", some.value))
        )
        return Rows(key, value, None if min(counts) == max(counts) else visible)


def _put_in_front(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows.to(tokens.dtype).expand(tokens.shape[0], -1, -1, -1), tokens], dim=2)


def _padded(rows: torch.Tensor | None, like: torch.Tensor, num_rows: int) -> torch.Tensor:
    rows = like[:, :, :0] if rows is None else rows
    return nn.functional.pad(rows, (0, 0, 0, num_rows - rows.shape[2]))
