"""Keeps the first tokens that attention modules without prompts put into a cache."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..adapted import base_class
from ..anatomy.arguments import read_signature
from ..anatomy.attention_calls import find_attention_call
from ..attention.find_first_tokens import cache_first_tokens


def cache_first_tokens_of_others(model: nn.Module, attention: nn.Module) -> list[RemovableHandle]:
    """
    Makes attention modules that never have prompts keep the first tokens of what they put into a cache, which a module
    with prompts reads: those of an encoder that shares the decoder's config.

    Returns:
        `list[RemovableHandle]`: The hooks. None in most models.
    """
    handles = []
    for path, module in model.named_modules():
        is_other = base_class(module) is not base_class(attention)
        is_other = is_other and getattr(module, "config", None) is attention.config
        if is_other and hasattr(module, "layer_idx") and find_attention_call(type(module)) is not None:
            handles.append(module.register_forward_pre_hook(partial(_cache, path), with_kwargs=True))
    return handles


def _cache(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache_first_tokens(module, path, read_signature(type(module)), args, kwargs)
