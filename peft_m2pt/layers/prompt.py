"""The prompt of one adapter in one layer, and the scale at which it is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..attention.cached_prompts import Owner


# Relative to its norm, how far a row moves at a learning rate of 1, summed over the layers of a tower.
RELATIVE_STEP = 160


class M2PTPrompt(nn.Module):
    """
    The prompt of one adapter in one layer.

    A norm follows, so only the direction of a row matters, and a step of the optimizer turns it by about `lr / |P|`.
    In a pretrained model, `|P|` differs by orders of magnitude between layers, and the effects of all layers add up.
    So that one learning rate fits all layers, a prompt can be reparametrized:

        P = scale * W

    `W`, of shape `[n, D]`, is trained. `scale`, of shape `[n, 1]`, is fixed at initialization: `relative_step` times
    the median RMS of the rows. A step of AdamW, whose size is the learning rate, then moves a row by `relative_step *
    lr` of its norm.

    The prompt is a module and not a bare parameter because sharded training gathers parameters when their module is
    called.

    Args:
        num_tokens (`int`):
            Number n of prompt vectors.
        width (`int`):
            Their width D.
        dtype (`torch.dtype`, *optional*):
            The dtype of the trained weight.
        relative_step (`float`, *optional*):
            Size of a step at learning rate 1, relative to the norm of a row. `None` (default) trains P itself, without
            a scale.
    """

    def __init__(
        self, num_tokens: int, width: int, dtype: torch.dtype | None = None, relative_step: float | None = None
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.width = width
        self.relative_step = relative_step
        self.weight = nn.Parameter(torch.empty(num_tokens, width, dtype=dtype))
        # Non-persistent, but saved and loaded below: with FSDP2 and `cpu_ram_efficient_loading`, accelerate fails on
        # persistent buffers.
        self.register_buffer("scale", None if relative_step is None else torch.ones(num_tokens, 1), persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self._renew_owner()
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy has an owner of its own.
        self.owner = Owner()

    def _renew_owner(self) -> None:
        """Makes caches forget the prompt, since others take its place."""
        self.owner = self.owner.retire() if "owner" in vars(self) else Owner()

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of the saved tensors. That of the parameter itself may be the shape of a shard."""
        shapes = {"weight": (self.num_tokens, self.width)}
        return shapes if self.scale is None else {**shapes, "scale": (self.num_tokens, 1)}

    @torch.no_grad()
    def set_rows(self, rows: torch.Tensor) -> None:
        """
        Sets the prompt P, and the scale that follows from it.

        Args:
            rows (`torch.Tensor` of shape `(num_tokens, width)`):
                The prompt.
        """
        self._renew_owner()
        if self.scale is not None:
            self.scale.fill_(scale_of(rows, self.relative_step))
            rows = rows / self.scale.to(rows.device)
        self.weight.copy_(rows)

    def forward(self) -> torch.Tensor:
        """Returns the prompt, a `torch.Tensor` of shape `(num_tokens, width)`."""
        # Cloned because DDP overwrites buffers in place before each forward pass, and a backward pass may follow
        # several of these.
        return self.weight if self.scale is None else self.weight * self.scale.clone()

    @property
    def _is_sharded(self) -> bool:
        """Whether FSDP2 has sharded the weight. All entries of a state dict have to be DTensors then."""
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
        self._renew_owner()
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


def scale_of(rows: torch.Tensor, relative_step: float) -> torch.Tensor:
    """
    Returns `relative_step` times the median RMS of rows, rounded to a power of two so that scaling is lossless.

    The median, because the first token of a text is the attention sink of pretrained language models: its norm can be
    dozens of times that of the others, its gradients are by far the largest, and all other text is read with its help,
    so it should hardly move.

    Args:
        rows (`torch.Tensor` of shape `(num_rows, width)`):
            The rows.
        relative_step (`float`):
            See [`M2PTPrompt`].

    Returns:
        `torch.Tensor`: A float32 scalar, 1 for rows of zeros.
    """
    rms = rows.float().pow(2).mean(dim=-1).sqrt()
    scale = relative_step * (rms.median() if rms.median() > 0 else rms.max())
    mantissa, exponent = torch.frexp(scale)  # 0.5 to 1
    rounded = torch.where(mantissa < 0.5**0.5, exponent - 1, exponent)
    return torch.where(scale > 0, torch.exp2(rounded.float()), 1.0)
