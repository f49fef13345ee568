"""The prompt of one adapter in one layer, and in which unit it is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


# How many times its length a row may turn by a learning rate of 1, in all layers of a tower together.
TURN = 160


class M2PTPrompt(nn.Module):
    """
    The prompt of one adapter in one layer.

    What a training step does to a prompt depends on how long its rows are, since a norm follows: a row of length
    `|P|` turns by about `rate / |P|`. In a pretrained model, rows are hundreds of times longer in one layer than in
    another. What all layers do adds up, so that the more there are, the less each may turn. So that one learning rate
    fits all, a prompt can be trained in a unit of its own:

        P = scale * W

    where `W`, of shape `[n, D]`, is trained, and `scale`, of shape `[n, 1]`, stays what it was at the start: `turn`
    times the median of the rows' root mean squares. A step of AdamW, which is as large as the learning rate, turns a
    row by `turn` times that part of its length.

    It is a module that is called, not a bare parameter, since sharded training gathers the parameters of a module when
    it is called.

    Args:
        num_tokens (`int`):
            Number n of prompt vectors.
        width (`int`):
            Their width D.
        dtype (`torch.dtype`, *optional*):
            The dtype of what is trained.
        turn (`float`, *optional*):
            How many times its length a row turns by a learning rate of 1. By default, rows are trained as they are,
            without a unit.
    """

    def __init__(
        self, num_tokens: int, width: int, dtype: torch.dtype | None = None, turn: float | None = None
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.width = width
        self.turn = turn
        self.weight = nn.Parameter(torch.empty(num_tokens, width, dtype=dtype))
        # Saved and loaded below. accelerate, where FSDP2 is to load weights in one process only, keeps buffers that
        # torch does not save, and fails on others.
        self.register_buffer("scale", None if turn is None else torch.ones(num_tokens, 1), persistent=False)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of what is saved. A parameter's own may be that of a part of it."""
        shapes = {"weight": (self.num_tokens, self.width)}
        return shapes if self.scale is None else {**shapes, "scale": (self.num_tokens, 1)}

    @torch.no_grad()
    def fill(self, rows: torch.Tensor) -> None:
        """
        Lets the prompt be these rows, which are then trained in a unit of their own.

        Args:
            rows (`torch.Tensor` of shape `(num_tokens, width)`):
                The prompt.
        """
        if self.scale is not None:
            self.scale.fill_(unit_of(rows, self.turn))
            rows = rows / self.scale.to(rows.device)
        self.weight.copy_(rows)

    def forward(self) -> torch.Tensor:
        """Returns the prompt, a `torch.Tensor` of shape `(num_tokens, width)`."""
        # A copy, since DistributedDataParallel writes buffers anew in front of every call, and a backward pass may
        # follow several.
        return self.weight if self.scale is None else self.weight * self.scale.clone()

    @property
    def _is_sharded(self) -> bool:
        """Whether FSDP2 keeps the weights: all that is in a state dict has to be sharded then."""
        return hasattr(self.weight, "device_mesh")

    def __len__(self) -> int:
        return self.num_tokens

    def extra_repr(self) -> str:
        return f"num_tokens={self.num_tokens}, width={self.width}" + (", scaled" if self.scale is not None else "")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.scale is not None and not self._is_sharded:
            destination[f"{prefix}scale"] = self.scale

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = f"{prefix}scale"
        scale = state_dict.get(name)
        *_, strict, missing_keys, unexpected_keys, _ = args
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.scale is None:
            return
        if scale is not None:
            with torch.no_grad():
                self.scale.copy_(scale)
            if name in unexpected_keys:
                unexpected_keys.remove(name)
        elif strict and not self._is_sharded:
            missing_keys.append(name)


def unit_of(rows: torch.Tensor, turn: float) -> torch.Tensor:
    """
    A multiple of the median of the root mean squares of rows, rounded to a power of two: to divide by that, and to
    multiply, loses nothing in any precision.

    The median, since the first token of a text, on which pretrained language models park their attention, can be
    dozens of times longer than the others, and is best left nearly as it is: it has by far the largest gradients, and
    what depends on it is how all other text is read.

    Args:
        rows (`torch.Tensor` of shape `(num_rows, width)`):
            The rows.
        turn (`float`):
            The multiple.

    Returns:
        `torch.Tensor` with one number, in float32. Rows of zeros have the unit 1.
    """
    rms = rows.float().pow(2).mean(dim=-1).sqrt()
    unit = turn * (rms.median() if rms.median() > 0 else rms.max())
    mantissa, exponent = torch.frexp(unit)  # 0.5 to 1
    rounded = torch.where(mantissa < 0.5**0.5, exponent - 1, exponent)
    return torch.where(unit > 0, torch.exp2(rounded.float()), 1.0)
