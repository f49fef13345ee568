"""What happens to a cache between two tokens, beside what models do: exact, or as the base model does it."""

import copy
import pickle
import subprocess
import sys
import weakref
from unittest import mock

import pytest
import torch
from helpers.attention_kernels import stand_ins
from helpers.decoding import batch, feed, filled
from helpers.models import on_top_of, randomise
from helpers.recomputed import recomputed
from helpers.text_models import make, on_cache, outputs
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from peft_m2pt.attention.prompt_kv import PromptKV
from peft_m2pt.attention.prompted_layers import join_prompts


# How the keys in a cache are changed.
CHANGES = {
    "assigned": lambda layer: setattr(layer, "keys", layer.keys * 2),
    "in place": lambda layer: layer.keys.mul_(2),
    "in part": lambda layer: layer.keys[:, :, 2:4].zero_(),
    "values": lambda layer: setattr(layer, "values", layer.values.clone() * 2),
}


class TestChanges:
    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    @torch.no_grad()
    def test_of_tokens(self, change):
        model, ids = make(), batch()

        def run():
            cache = DynamicCache()
            first = feed(model, cache, ids, 0, 6, 7, 8, 9)
            for layer in cache.layers:
                change(layer)
            return torch.cat([first, feed(model, cache, ids, 9, 10, 11)], dim=1)

        actual = run()
        with recomputed():
            torch.testing.assert_close(actual, run(), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("is_new", [True, False], ids=["new weights", "another start"])
    @pytest.mark.parametrize("how", ["reset", "crop", "other layers"])
    @torch.no_grad()
    def test_emptied(self, how, is_new):
        model, ids = make(), batch()
        cache = filled(model, ids)
        if how == "other layers":
            cache.layers = [DynamicLayer() for _ in cache.layers]
        for layer in cache.layers:
            layer.crop(-9) if how == "crop" else layer.reset()
        if cache.get_seq_length() != 0:
            pytest.skip("this transformers zeroes layers instead of emptying them")
        if is_new:
            randomise(model, seed=3)
        positions = (0 if is_new else 5) + torch.arange(3).expand(2, -1)
        parts = [
            outputs(model, input_ids=ids[:, i : i + 1], position_ids=positions[:, i : i + 1], **on_cache(model, cache))
            for i in range(3)
        ]
        expected = outputs(model, input_ids=ids[:, :3], position_ids=positions, use_cache=False)
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=0)

    @torch.no_grad()
    def test_a_mask_that_changes_uncounted(self):
        """torch counts no changes through `.data`."""
        model, ids = make(), batch()
        positions = torch.full((2, 1), 9)
        mask = torch.zeros(2, 1, 1, 10)

        def step(mask):
            return outputs(
                model, input_ids=ids[:, 9:10], attention_mask=mask, position_ids=positions, **on_cache(model, cache)
            )

        cache = filled(model, ids)
        step(mask)
        mask.data[..., 3:6] = torch.finfo(torch.float32).min
        cache = filled(model, ids)
        actual = step(mask)
        cache = filled(model, ids)
        assert torch.equal(actual, step(mask.clone()))

    @torch.no_grad()
    def test_flash_attention_of_a_mixed_batch(self):
        with stand_ins():
            model, ids = make(attn="flash_attention_2"), batch()
            names = ["__base__", "default"]
            actual = feed(model, DynamicCache(), ids, 0, 6, 7, 8, 9, adapter_names=names)
            with recomputed():
                expected = feed(model, DynamicCache(), ids, 0, 6, 7, 8, 9, adapter_names=names)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


class Interrupted(Exception):
    """What a hook raises."""


@torch.no_grad()
def test_other_prompts_take_the_place_of_those_before():
    layer, tokens = DynamicLayer(), torch.randn(2, 2, 2, 5, 4)
    layer.update(*tokens[:, :, :, :3])
    for index in (3, 4):
        prompts = PromptKV(*torch.randn(2, 1, 2, 3, 4))
        joined = join_prompts(layer, prompts, *tokens[:, :, :, index : index + 1])
        for actual, of_prompts, of_tokens in zip(joined, (prompts.key, prompts.value), tokens):
            assert torch.equal(
                actual, torch.cat([of_prompts.expand(2, -1, -1, -1), of_tokens[:, :, : index + 1]], dim=2)
            )


class TestErrors:
    @pytest.mark.parametrize("part", ["k_proj", "o_proj"])
    @torch.no_grad()
    def test_of_hooks(self, part):
        """They are raised, and the cache is left as by the base model."""
        model, ids = make(), batch()
        base = copy.deepcopy(model).unload()
        lengths = []
        for tuned in (model, base):
            cache, calls = DynamicCache(), []

            def step(start, stop, tuned=tuned, cache=cache):
                tuned(input_ids=ids[:, start:stop], use_cache=True, **on_top_of(cache))

            for start, stop in ((0, 6), (6, 7), (7, 8)):
                step(start, stop)

            def hook(*args, calls=calls):
                calls.append(1)
                raise Interrupted

            inner = model.get_base_model() if tuned is model else base
            getattr(inner.model.layers[1].self_attn, part).register_forward_hook(hook)
            with pytest.raises(Interrupted):
                step(8, 9)
            assert len(calls) == 1
            lengths.append([layer.get_seq_length() for layer in cache.layers])
        assert lengths[0] == lengths[1]


class Rounding(DynamicLayer):
    """Keeps something else than what it is given."""

    def __setattr__(self, name, value):
        is_rounded = name in ("keys", "values") and value is not None and value.numel()
        super().__setattr__(name, (4 * value).round() / 4 if is_rounded else value)


REPLACED = """
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

update = DynamicLayer.update

def last_six(layer, *args, **kwargs):
    keys, values = update(layer, *args, **kwargs)
    layer.keys, layer.values = keys[:, :, -6:], values[:, :, -6:]
    return keys, values

DynamicLayer.update = last_six
from helpers.text_models import make, make_ids, on_cache, outputs
model, ids, cache = make(), torch.cat(make_ids(14, 14)), DynamicCache()
with torch.no_grad():
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9), (9, 10)):
        outputs(model, input_ids=ids[:, start:stop], **on_cache(model, cache))
assert cache.layers[0].keys.shape[-2] == 6
"""


class TestOfOthers:
    @torch.no_grad()
    def test_keys_that_somebody_holds_on_to(self):
        """They are ordinary tensors."""
        model, ids, held = make(), batch(), []
        update = DynamicCache.update

        def holding(*args, **kwargs):
            held.append(update(*args, **kwargs))
            return held[-1]

        with mock.patch.object(Cache, "update", holding):
            feed(model, DynamicCache(), ids, 0, 6, 7, 8)
        assert {type(keys) for pair in held for keys in pair} == {torch.Tensor}
        assert not any(hasattr(keys, "used_by") for pair in held for keys in pair)
        copy.deepcopy(held)

    @torch.no_grad()
    def test_layers_that_keep_something_else(self):
        model, ids = make(), batch()

        def run():
            cache = DynamicCache()
            cache.layer_class_to_replicate = Rounding
            return feed(model, cache, ids, 0, 6, *range(7, 14))

        actual = run()
        with recomputed():
            torch.testing.assert_close(actual, run(), atol=1e-5, rtol=0)

    def test_a_method_that_was_replaced_before(self, request):
        tests = request.config.rootpath / "tests"
        subprocess.run([sys.executable, "-W", "ignore", "-c", REPLACED], cwd=tests, check=True, capture_output=True)


class TestCopies:
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
    @torch.no_grad()
    def test_have_no_prompts(self, duplicate):
        model, ids = make(), batch()
        cache = filled(model, ids)
        twin = duplicate(cache)
        assert {type(layer) for layer in twin.layers} == {DynamicLayer}
        for layer in twin.layers:
            assert layer.keys.is_contiguous() and layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
        expected = feed(model, cache, ids, 9, 10, 11)
        torch.testing.assert_close(feed(model, twin, ids, 9, 10, 11), expected, atol=1e-5, rtol=0)

    @torch.no_grad()
    def test_of_a_single_head_have_no_prompts(self):
        layer, prompts = DynamicLayer(), PromptKV(*torch.randn(2, 1, 1, 3, 4))
        layer.update(*torch.randn(2, 1, 1, 5, 4))
        join_prompts(layer, prompts, *torch.randn(2, 1, 1, 1, 4))
        keys = copy.deepcopy(layer).keys
        assert torch.equal(keys, layer.keys) and keys.untyped_storage().nbytes() == keys.nbytes

    @torch.no_grad()
    def test_files_have_no_keys_of_prompts(self):
        model, ids = make(), batch()
        assert b"PromptKV" not in pickle.dumps(filled(model, ids))


class TestMemory:
    @pytest.mark.parametrize("how", ["base model", "assigned", "reset"])
    @torch.no_grad()
    def test_nothing_is_held_beside_the_tokens(self, how):
        model, ids = make(), batch()
        cache = filled(model, ids)
        if how == "base model":
            with model.disable_adapter():
                feed(model, cache, ids, 9, 10)
        for layer in cache.layers:
            if how == "assigned":
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            if how == "reset":
                layer.reset()
                if layer.get_seq_length() > 0:
                    pytest.skip("this version of transformers writes zeros over the tokens of a layer that is reset")
        for layer in cache.layers:
            held = [value for value in vars(layer).values() if torch.is_tensor(value)]
            assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in held)
            assert not any("joined" in name for name in vars(layer))

    @torch.no_grad()
    def test_former_keys_are_let_go_during_a_step(self):
        model, ids = make(), batch()
        cache = filled(model, ids)
        former = weakref.ref(vars(cache.layers[0])["m2pt_joined"].keys)
        alive = []
        projection = model.get_base_model().model.layers[0].self_attn.o_proj
        projection.register_forward_hook(lambda *args: alive.append(former() is not None))
        feed(model, cache, ids, 9, 10)
        assert alive == [False]
