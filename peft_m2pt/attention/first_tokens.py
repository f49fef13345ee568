"""The first tokens of sequences, which textual prompts stand in front of. Layers share them in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch


# What each positional argument of an attention module says: position ids, rotations, or a cosine and a sine.
Positions = dict[str, Any]


@dataclass(frozen=True)
class FirstTokens:
    """
    The first tokens of the sequences in a batch, and their positions.

    Args:
        positions (`dict[str, Any]`):
            Their positions, by the names of the positional arguments. Rotations are of shape
            `(..., count, 1, width)`, position ids of shape `(..., count, 1)`.
        by_sample (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            The index of each sample's first token. `None` if all share one, or if there is one for each in order.
        by_token (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
            The same for each token, if sequences in one row start at different positions.
        by_sequence (`list[int]`, *optional*):
            The same for each packed sequence, if flash attention separates these by their boundaries.
        is_complete (`bool`, defaults to `True`):
            Whether every sample has a first token. One that is all padding so far has none.
    """

    positions: Positions
    by_sample: torch.Tensor | None = None
    by_token: torch.Tensor | None = None
    by_sequence: list[int] | None = None
    is_complete: bool = True
    _computed: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        """The number of distinct first tokens."""
        tensor = next(position_tensors(self.positions))
        return tensor.shape[sample_axis(tensor)]

    def compute_once(self, key: Any, function: Callable[[], Any]) -> Any:
        """Computes something from the positions once for all layers, which share them in a forward pass."""
        if torch.compiler.is_compiling():
            return function()
        if key not in self._computed:
            self._computed[key] = function()
        return self._computed[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_computed": {}}

    @property
    def indices(self) -> torch.Tensor | None:
        """The index of each sample's first token. `None` if all share one."""
        if self.count == 1 or self.by_sample is not None:
            return self.by_sample
        return torch.arange(self.count, device=next(position_tensors(self.positions)).device)

    @property
    def of_last_sequences(self) -> FirstTokens:
        """Those of the last sequence in each row."""
        return self if self.by_token is None else replace(self, by_sample=self.by_token[:, -1], by_token=None)

    @property
    def positions_of_samples(self) -> Positions:
        """The position of each sample's first token, or the one that all share."""
        return self.positions if self.count == 1 else _select(self.positions, self.indices)

    def select(self, samples: torch.Tensor) -> FirstTokens:
        """Those of some samples, in the order given."""
        return self if self.count == 1 else replace(self, by_sample=self.indices[samples])


def deduplicate(positions: Positions) -> FirstTokens:
    """First tokens at these positions, with equal positions merged."""
    rows = torch.cat([_flatten(tensor) for tensor in position_tensors(positions)], dim=1)
    if len(rows) == 1:
        return FirstTokens(positions)
    if bool((rows == rows[:1]).all()):
        return FirstTokens(_select(positions, torch.zeros(1, dtype=torch.long, device=rows.device)))
    unique, indices = rows.unique(dim=0, return_inverse=True)
    examples = indices.new_zeros(len(unique)).scatter_(0, indices, torch.arange(len(rows), device=rows.device))
    return FirstTokens(_select(positions, examples), by_sample=indices)


def differ_from_first(given: Positions, first: Positions) -> torch.Tensor:
    """Which tokens have another position than the first of their sample, of shape `(batch_size, num_tokens)`."""
    differ = []
    for tensor, start in zip(position_tensors(given), position_tensors(first)):
        # Rotations of equal positions may differ in the last bit.
        of_tensor = (tensor - start).abs() > 1e-5
        of_tensor = of_tensor.any(-1) if sample_axis(tensor) == -3 else of_tensor
        differ.append(of_tensor.flatten(0, -3).any(0) if of_tensor.dim() > 2 else of_tensor)
    return torch.stack(torch.broadcast_tensors(*differ)).any(0)


def position_tensors(positions: Positions) -> Iterator[torch.Tensor]:
    """Yields the tensors in which positions are given."""
    for value in positions.values():
        yield from value if isinstance(value, (tuple, list)) else (value,)


def map_positions(function: Callable[..., torch.Tensor], positions: Positions, *others: Positions) -> Positions:
    """Applies a function to each tensor in which positions are given."""
    result = {}
    for name, value in positions.items():
        values = (value, *(other[name] for other in others))
        is_pair = isinstance(value, (tuple, list))
        result[name] = tuple(map(function, *values)) if is_pair else function(*values)
    return result


def sample_axis(tensor: torch.Tensor) -> int:
    """The axis of samples, in front of that of tokens. Rotations have a width behind it, position ids do not."""
    return -3 if tensor.is_floating_point() or tensor.is_complex() else -2


def take_tokens(positions: Positions, samples: torch.Tensor, tokens: torch.Tensor) -> Positions:
    """The positions of some tokens, each given by its sample and its place in the row."""

    def take(tensor: torch.Tensor) -> torch.Tensor:
        axis = sample_axis(tensor)
        rows = torch.zeros_like(samples) if tensor.shape[axis] == 1 else samples
        taken = tensor[..., rows, tokens, :] if axis == -3 else tensor[..., rows, tokens]
        return taken.unsqueeze(axis + 1)

    return map_positions(take, positions)


def align(flags: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Flags of samples, in a shape that broadcasts with a tensor of their positions."""
    return flags.view(-1, 1, 1) if sample_axis(tensor) == -3 else flags.view(-1, 1)


def _select(positions: Positions, indices: torch.Tensor) -> Positions:
    return map_positions(lambda tensor: tensor.index_select(sample_axis(tensor), indices), positions)


def _flatten(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.movedim(sample_axis(tensor), 0).flatten(1)
    return (torch.view_as_real(tensor).flatten(1) if tensor.is_complex() else tensor).float()
