"""What is found in a model: attention modules for prompts, and the connector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from .compiled import uncompiled
from .rotary import Rotary
from .towers import Kind


@dataclass(frozen=True)
class Site:
    """
    A self-attention module that gets prompts.

    Args:
        kind (`str`):
            "visual" or "textual".
        path (`str`):
            Module path in the model.
        layer (`int`):
            Index of the layer in its tower.
        attention (`nn.Module`):
            The attention module itself.
        block (`nn.Module`):
            The module that holds the norms.
        norms (`tuple[str, ...]`):
            Names of the modules in the block that the layer's input passes, in order, before the attention. Empty if
            there are none.
        width (`int`):
            Width D of the layer's input, and so of its prompts.
        rotary ([`~peft_m2pt.anatomy.rotary.Rotary`], *optional*):
            Computes rotations of positions. `None` if prompts have no position.
        connector ([`Connector`], *optional*):
            The connector, if the layer has interaction prompts.
    """

    kind: Kind
    path: str
    layer: int
    attention: nn.Module
    block: nn.Module
    norms: tuple[str, ...]
    width: int
    rotary: Rotary | None
    connector: Connector | None = None

    def normed(self, prompts: torch.Tensor) -> torch.Tensor:
        """The attention's input for prompts in the layer's input: LN(P)."""
        for name in self.norms:
            prompts = getattr(self.block, name)(prompts)
        return prompts


@dataclass(frozen=True)
class Connector:
    """
    The module that brings image features to the language model.

    Args:
        path (`str`):
            Module path in the model.
        parent (`nn.Module`):
            The module that holds it.
        name (`str`):
            Its name in the parent.
        width (`int`):
            Width of a row of its input.
        rows_per_token (`int`, *optional*):
            How many rows become one image token. `None` for connectors that mix all rows.
        argument_names (`tuple[str, ...]`):
            Names of the arguments of its `forward`. The first are the image features.
    """

    path: str
    parent: nn.Module
    name: str
    width: int
    rows_per_token: int | None
    argument_names: tuple[str, ...]

    kind: ClassVar[str] = "interaction"

    @property
    def module(self) -> nn.Module:
        """The connector, or what has replaced it."""
        return uncompiled(getattr(self.parent, self.name))

    def grouped(self, rows: torch.Tensor) -> torch.Tensor:
        """Groups rows by image token: `(num_tokens, rows_per_token, width)`."""
        return rows.reshape(-1, self.rows_per_token, self.width)
