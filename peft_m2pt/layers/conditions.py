"""What the keys and values of prompts depend on in a call, besides adapters, weights and positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .mixed_batch import SampleAdapters, sample_adapters


@dataclass(frozen=True)
class Conditions:
    """
    Under which conditions prompts were computed.

    Args:
        dtype (`torch.dtype`), device (`torch.device`):
            Those of the tokens.
        device_type (`str`, *optional*):
            The key under which torch stores autocast. `None` for devices without it.
        autocast_dtype (`torch.dtype`, *optional*):
            That of autocast, if it is enabled.
        samples ([`~peft_m2pt.layers.mixed_batch.SampleAdapters`], *optional*):
            The adapters of a mixed batch.
        num_rows (`int`, *optional*):
            The size of a mixed batch.
    """

    dtype: torch.dtype
    device: torch.device
    device_type: str | None
    autocast_dtype: torch.dtype | None
    samples: SampleAdapters | None
    num_rows: int | None

    @staticmethod
    def of(tokens: torch.Tensor) -> Conditions:
        """The conditions in a call with these tokens."""
        device, samples = tokens.device, sample_adapters()
        device_type = device.type if torch.amp.is_autocast_available(device.type) else None
        num_rows = None if samples is None else len(tokens)
        return Conditions(tokens.dtype, device, device_type, _autocast_dtype(device_type), samples, num_rows)

    def hold_for(self, tokens: torch.Tensor) -> bool:
        """Whether they are those of a call with these tokens."""
        # Hot path: once per layer and token.
        samples = sample_adapters()
        if samples is not None or self.samples is not None:
            return self == Conditions.of(tokens)
        is_same = tokens.dtype is self.dtype and tokens.device == self.device
        return is_same and _autocast_dtype(self.device_type) is self.autocast_dtype


def _autocast_dtype(device_type: str | None) -> torch.dtype | None:
    is_enabled = device_type is not None and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_enabled else None
