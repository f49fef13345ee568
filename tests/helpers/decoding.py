"""Text models that are fed a few tokens at a time, on top of a cache."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from helpers.recomputed import counted, recomputed
from helpers.text_models import make_ids, on_cache, outputs


def batch(size=2, length=14):
    return torch.cat(make_ids(*[length] * size))


def config_of(model):
    return model.get_base_model().config.get_text_config(decoder=True)


def feed(model, cache, ids, *places, **kwargs):
    """The outputs for the tokens between each two of these places."""
    parts = [
        outputs(model, input_ids=ids[:, start:stop], **kwargs, **on_cache(model, cache))
        for start, stop in zip(places, places[1:])
    ]
    return torch.cat(parts, dim=1)


def filled(model, ids):
    """A cache with nine tokens, the last two of them with prompts in front."""
    cache = DynamicCache()
    with counted() as calls:
        feed(model, cache, ids, 0, 6, 7, 8, 9)
    assert calls
    return cache


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-6 * expected.abs().max().clamp(min=1).item(), rtol=0)


def compare(run, num_in_front=None):
    """Compares with rows that are recomputed in each call. `num_in_front`: the calls with prompts in the cache."""
    with torch.no_grad():
        with counted() as calls:
            actual = run()
        with recomputed(), counted() as others:
            expected = run()
    assert not others
    assert_equal(actual, expected)
    assert num_in_front is None or len(calls) == num_in_front
    return actual
