"""The prompt of one adapter in one layer, and in which unit it is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class M2PTPrompt(nn.Module):
    """
    The prompt of one adapter in one layer.

    What a training step does to a prompt depends on how long its rows are, since a norm follows: a row of length
    `|P|` turns by about `rate / |P|`. In a pretrained model, rows are thousands of times longer in one layer than in
    another, and in late layers the first row dozens of times longer than its neighbours. So that one learning rate
    fits all, a prompt can be trained in units of its own rows:

        P = scale * W

    where `W`, of shape `[n, D]`, is trained, and `scale`, of shape `[n, 1]`, stays what it was at the start.

    It is a module that is called, not a bare parameter, since sharded training gathers the parameters of a module when
    it is called.

    Args:
        num_tokens (`int`):
            Number n of prompt vectors.
        width (`int`):
            Their width D.
        dtype (`torch.dtype`, *optional*):
            The dtype of what is trained.
        has_scale (`bool`, defaults to `False`):
            Whether each row has a unit of its own. Otherwise the prompt is what is trained.
    """

    def __init__(self, num_tokens: int, width: int, dtype: torch.dtype | None = None, has_scale: bool = False) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.width = width
        self.weight = nn.Parameter(torch.empty(num_tokens, width, dtype=dtype))
        # Saved and loaded below. accelerate, where FSDP2 is to load weights in one process only, keeps buffers that
        # torch does not save, and fails on others.
        self.register_buffer("scale", torch.ones(num_tokens, 1) if has_scale else None, persistent=False)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of what is saved. A parameter's own may be that of a part of it."""
        shapes = {"weight": (self.num_tokens, self.width)}
        return shapes if self.scale is None else {**shapes, "scale": (self.num_tokens, 1)}

    @torch.no_grad()
    def fill(self, rows: torch.Tensor) -> None:
        """
        Lets the prompt be these rows, each of which becomes the unit that it is trained in.

        Args:
            rows (`torch.Tensor` of shape `(num_tokens, width)`):
                The prompt.
        """
        if self.scale is not None:
            self.scale.copy_(units_of(rows))
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


def units_of(rows: torch.Tensor) -> torch.Tensor:
    """
    The root mean square of each row, rounded to a power of two: to divide by that, and to multiply, loses nothing in
    any precision.

    Args:
        rows (`torch.Tensor` of shape `(num_rows, width)`):
            The rows.

    Returns:
        `torch.Tensor` of shape `(num_rows, 1)`, in float32.
    """
    rms = rows.float().pow(2).mean(dim=-1, keepdim=True).sqrt()
    # Rows of zeros have no length of their own.
    rms = torch.where(rms > 0, rms, rms.max())
    rms = torch.where(rms > 0, rms, 1.0)
    mantissa, _ = torch.frexp(rms)  # 0.5 to 1
    return rms / mantissa * torch.where(mantissa < 0.5**0.5, 0.5, 1.0)
