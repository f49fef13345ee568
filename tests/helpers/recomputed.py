"""What prompts in front of the tokens in a cache are compared with: rows that are recomputed in every call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from peft_m2pt import M2PTAttention
from peft_m2pt.attention import eager_sdpa, interface
from peft_m2pt.attention.prompt_kv import PromptKV
from peft_m2pt.attention.prompted_layers import join_prompts


@contextmanager
def recomputed() -> Iterator[None]:
    """In this context, caches keep no rows: in each call, the attention function gets new ones in front of keys."""
    with (
        mock.patch.object(M2PTAttention, "_kept_in", lambda self, *args: None),
        # Not beside the keys of the tokens, as for one query: the same kernel computes the same then.
        mock.patch.object(eager_sdpa, "sdpa_attention_forward", None),
    ):
        yield


@contextmanager
def counted() -> Iterator[list[PromptKV]]:
    """Records each call of a module that finds its prompts in front of the tokens in a cache."""
    calls: list[PromptKV] = []

    def counting(layer, prompts, *args):
        calls.append(prompts)
        return join_prompts(layer, prompts, *args)

    with mock.patch.object(interface, "join_prompts", counting):
        yield calls
