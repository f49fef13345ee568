"""What prompts in front of the tokens in a cache are compared with: rows that are recomputed in every call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from peft_m2pt import M2PTAttention
from peft_m2pt.attention import eager_sdpa
from peft_m2pt.attention.cached_prompts import InFront


@contextmanager
def recomputed() -> Iterator[None]:
    """In this context, caches keep no rows. In each call, the attention function adds new ones to its keys."""
    with (
        mock.patch.object(M2PTAttention, "_kept_in", lambda self, *args: None),
        mock.patch.object(eager_sdpa, "_attend_one_query", _attend_to_all),
    ):
        yield


def _attend_to_all(prompts, query, key, value, attention_mask, scaling):
    key, value = prompts.prepend_to(key, value)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
    return output.transpose(1, 2)


@contextmanager
def counted() -> Iterator[list[InFront]]:
    """Takes down each call of a module that finds its prompts in front of the tokens in a cache."""
    calls: list[InFront] = []
    join = InFront.join

    def counting(in_front, *args):
        calls.append(in_front)
        return join(in_front, *args)

    with mock.patch.object(InFront, "join", counting):
        yield calls
