"""What modules, hooks and caches may do with keys that a cache returns, from the first token on or later."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from helpers.decoding import batch, compare, config_of, feed
from helpers.recomputed import counted
from helpers.text_models import TEXT, make, on_cache, outputs
from packaging.version import Version
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import AttentionInterface

from peft_m2pt import UnsupportedModelError


LAYERS = TEXT["num_hidden_layers"]


class InUse:
    """A cache as a module has it that does something with what `update` returns."""

    def __init__(self, cache, use):
        self.cache = cache
        self.use = use

    def update(self, *args, **kwargs):
        return self.use(self.cache, *self.cache.update(*args, **kwargs))

    def __getattr__(self, name):
        return getattr(self.cache, name)


def let_modules_use(model, use):
    """Lets attention modules do something with what a cache returns."""
    for layer in model.get_base_model().model.layers:
        forward = layer.self_attn.forward

        def with_use(*args, forward=forward, **kwargs):
            caches = {name: InUse(value, use) for name, value in kwargs.items() if isinstance(value, Cache)}
            return forward(*args, **{**kwargs, **caches})

        layer.self_attn.forward = with_use
    return model


HELD = []


def hold(cache, keys, values):
    HELD.append(keys)
    return keys, values


def look(cache, keys, values):
    assert keys.shape[-2] > 0
    return keys, values


def double(cache, keys, values):
    return 1 * keys, values


def hold_part(cache, keys, values):
    HELD.append(keys[:, :, -1:])
    return keys, values


def drop_later(cache, keys, values):
    """Selects keys from a certain length on, as indexers do."""
    is_long = cache.get_seq_length(1) > 8
    return (keys[:, :, 1:], values[:, :, 1:]) if is_long else (keys, values)


def copy_later(cache, keys, values):
    return (keys.clone(), values) if cache.get_seq_length(1) > 8 else (keys, values)


class WithSink(DynamicCache):
    """Keeps the first token and the latest ones, from a certain length on."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.get_seq_length(layer_idx) > 8:
            layer = self.layers[layer_idx]
            layer.keys, layer.values = (torch.cat([x[:, :, :1], x[:, :, -6:]], dim=2) for x in (keys, values))
        return keys, values


@contextmanager
def attending_twice():
    get_interface = AttentionInterface.get_interface

    def get(*args):
        attend = get_interface(*args)

        def twice(*args, **kwargs):
            attend(*args, **kwargs)
            return attend(*args, **kwargs)

        return twice

    with mock.patch.object(AttentionInterface, "get_interface", get):
        yield


class TestObserved:
    @pytest.mark.parametrize("use", [hold, look, double, hold_part])
    def test_what_else_is_done_with_keys(self, use):
        model, ids = let_modules_use(make(), use), batch()
        compare(lambda: feed(model, DynamicCache(), ids, 0, 6, 7, 8, 9), 0)
        HELD.clear()

    @pytest.mark.parametrize("name, use", [("llama", drop_later), ("mistral", copy_later)])
    def test_what_changes_later(self, name, use):
        """The call is repeated, with prompts that the attention function adds. The cache does not notice."""
        model, ids = let_modules_use(make(name), use), batch()
        caches = []

        def run():
            caches.append(DynamicCache(config=config_of(model)))
            return feed(model, caches[-1], ids, 0, 6, *range(7, 14))

        with torch.no_grad(), counted() as calls:
            run()
        # The second token, and the third, whose call is repeated in all layers but the first.
        assert len(calls) >= 2 * LAYERS
        compare(run)
        for layer, other in zip(caches[0].layers, caches[-1].layers):
            assert layer.keys.shape == other.keys.shape
            assert layer.get_seq_length() == other.get_seq_length() == 13

    def test_caches_with_an_update_of_their_own(self):
        """They may look at keys at any time."""
        model, ids = make(), batch()
        compare(lambda: feed(model, WithSink(), ids, 0, 6, *range(7, 14)), 0)

    # Hooks of what comes before the attention function are also called for prompts, where these are recomputed.
    @pytest.mark.parametrize("part, num_calls", [("q_proj", 3 + 6), ("o_proj", 3 + 3)])
    def test_another_model_that_a_hook_calls(self, part, num_calls):
        model, ids = make(), batch()
        other, others = make("mistral").unload(), []

        def run():
            cache = DynamicCache()
            first = feed(model, cache, ids, 0, 6)

            def hook(*args):
                others.append(other(input_ids=ids[:, :4], use_cache=True).logits)

            hook = getattr(model.get_base_model().model.layers[0].self_attn, part).register_forward_hook(hook)
            rest = feed(model, cache, ids, 6, 7, 8, 9)
            hook.remove()
            return torch.cat([first, rest], dim=1)

        compare(run, 2 * LAYERS)
        with torch.no_grad():
            expected = other(input_ids=ids[:, :4]).logits
        assert len(others) == num_calls and all(torch.equal(logits, expected) for logits in others)

    def test_layers_that_share_keys(self):
        shared = []

        class SharingCache(DynamicCache):
            def update(self, key_states, value_states, layer_idx, *args, **kwargs):
                if layer_idx == 0:
                    shared[:] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
                else:
                    super().update(key_states, value_states, layer_idx, *args, **kwargs)
                return tuple(shared)

        model, ids = make(), batch()
        compare(lambda: feed(model, SharingCache(), ids, 0, 6, 7, 8, 9, 10), 0)

    @torch.no_grad()
    def test_attention_that_is_bypassed_later(self):
        model, ids, cache = make(), batch(), DynamicCache()
        feed(model, cache, ids, 0, 6, 7, 8, 9)
        model.get_base_model().model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (
            hidden_states,
            None,
        )
        with pytest.raises(UnsupportedModelError, match=r"'model.layers.1.self_attn' \(LlamaAttention\) bypassed"):
            feed(model, cache, ids, 9, 10)

    @torch.no_grad()
    def test_a_bias_that_comes_later(self):
        model, ids, cache = make(), batch(), DynamicCache()
        feed(model, cache, ids, 0, 6, 7, 8, 9)
        with pytest.raises(UnsupportedModelError, match="passes position_bias of shape"):
            feed(model, cache, ids, 9, 10, position_bias=torch.zeros(2, 4, 1, 10))

    def test_modules_that_attend_twice_later(self):
        model, ids = make(), batch()

        def run():
            cache = DynamicCache()
            first = feed(model, cache, ids, 0, 6, 7, 8, 9)
            with attending_twice():
                return torch.cat([first, feed(model, cache, ids, 9, 10, 11)], dim=1)

        compare(run)

    @torch.no_grad()
    def test_modules_that_attend_twice_later_to_tokens_alone(self):
        """What another `update` has done cannot be undone."""
        model, ids, cache = make(), batch(), DynamicCache()
        feed(model, cache, ids, 0, 6, 7, 8, 9)
        update = mock.patch.object(type(cache.layers[0]), "update", DynamicLayer.update.__wrapped__)
        message = r"'model.layers.0.self_attn' \(LlamaAttention\) calls its attention function more often than for the"
        with update, attending_twice(), pytest.raises(UnsupportedModelError, match=message):
            feed(model, cache, ids, 9, 10)

    @pytest.mark.parametrize("is_padded", [True, False])
    @pytest.mark.parametrize("attn, num_later", [("eager", 3), ("flex_attention", 0)])
    def test_another_attention_implementation(self, attn, num_later, is_padded):
        """Whose function M2PT has not extended yet, or which takes no prompts in front."""
        if attn == "flex_attention" and Version(torch.__version__) < Version("2.7"):
            pytest.skip("flex attention of this version of torch does not take heads of width 12")
        ids = batch()
        mask = torch.ones_like(ids)
        mask[1, : 2 * is_padded] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)

        def run():
            model = make()
            cache, parts = DynamicCache(config=config_of(model)), []
            for start, stop in ((0, 6), *((start, start + 1) for start in range(6, 13))):
                if start == 9:
                    model.set_attn_implementation(attn)
                    AttentionInterface._global_mapping.pop("eager", None)
                inputs = {"position_ids": positions[:, start:stop]}
                inputs |= {"attention_mask": mask[:, :stop]} if is_padded else {}
                parts.append(outputs(model, input_ids=ids[:, start:stop], **inputs, **on_cache(model, cache)))
            return torch.cat(parts, dim=1)

        # One is tried with the implementation before.
        compare(run, (2 + 1 + num_later) * LAYERS)
