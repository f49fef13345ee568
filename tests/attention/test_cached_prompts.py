"""Prompts in front of the tokens in a cache: those of rows that are recomputed in every call, and nobody sees them."""

import copy
import pickle
import threading
import weakref

import pytest
import torch
from helpers.attention_kernels import stand_ins
from helpers.decoding import assert_equal, batch, compare, config_of, feed, filled
from helpers.models import make_config, on_top_of, randomise
from helpers.recomputed import counted, recomputed
from helpers.text_models import OTHER_TEXT, TEXT, WINDOW, make, make_ids, on_cache, outputs
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.executorch import register_dynamic_cache_export_support

from peft_m2pt import M2PTConfig


LAYERS = TEXT["num_hidden_layers"]


class Keeps(DynamicLayer):
    """Does what the layer does that it is derived from."""


class Forgets(DynamicLayer):
    """Drops old tokens."""

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = keys[:, :, -6:], values[:, :, -6:]
        return keys, values

    def get_seq_length(self):
        return 0 if not self.is_initialized else self.keys.shape[-2]


def of_layers(layer_class):
    def make_cache(config):
        cache = DynamicCache()
        cache.layer_class_to_replicate = layer_class
        return cache

    return make_cache


def quantized(config):
    cache_utils = pytest.importorskip("transformers.cache_utils")
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this version of transformers has no cache that is quantized without another package")
    return cache_utils.QuantizedCache("fp8", config)


CACHES = {
    "dynamic": (lambda config: DynamicCache(config=config), True),
    "dynamic, made as it goes": (lambda config: DynamicCache(), True),
    "subclass": (of_layers(Keeps), False),
    "subclass that forgets": (of_layers(Forgets), False),
    "static": (lambda config: StaticCache(config=config, max_cache_len=24), False),
    "quantized": (quantized, False),
}


class TestKinds:
    @pytest.mark.parametrize("make_cache, is_in_front", CACHES.values(), ids=CACHES)
    def test_of_caches(self, make_cache, is_in_front):
        model, ids = make(), batch()

        def run():
            return feed(model, make_cache(config_of(model)), ids, 0, 6, 7, 8, 9, 11, 12, 13)

        # The first of each two single tokens behind several is observed.
        compare(run, num_in_front=3 * LAYERS if is_in_front else 0)

    @pytest.mark.parametrize("name", ["mistral", "qwen"])
    def test_of_models(self, name):
        """Behind a sliding window, and with positions on three axes."""
        model, ids = make(name), batch()
        actual = compare(
            lambda: feed(model, DynamicCache(config=config_of(model)), ids, 0, 2, *range(3, 15)), 11 * LAYERS
        )
        with torch.no_grad():
            torch.testing.assert_close(actual, outputs(model, input_ids=ids, use_cache=False), atol=3e-5, rtol=1e-4)

    def test_of_latents(self):
        """DeepSeek caches what keys are made of later on, or so: keys are not what the layer returned."""
        model, ids = OTHER_TEXT["deepseek_v2"]().eval(), batch()
        model = get_peft_model(model, M2PTConfig(num_visual_tokens=0, num_textual_tokens=3)).eval()
        randomise(model, seed=2)
        compare(lambda: feed(model, DynamicCache(config=config_of(model)), ids, 0, 6, 7, 8, 9))

    @pytest.mark.parametrize("attn", ["eager", "flash_attention_2"])
    @pytest.mark.parametrize("name", ["llama", "mistral"])
    def test_of_attention(self, name, attn):
        with stand_ins():
            model, ids = make(name, attn=attn), batch()
            # The window of flash attention would hide prompts.
            is_in_front = attn == "eager" or name == "llama"
            compare(
                lambda: feed(model, DynamicCache(config=config_of(model)), ids, 0, 6, 7, 8, 9),
                2 * LAYERS if is_in_front else 0,
            )

    @torch.no_grad()
    def test_attentions_cover_the_tokens(self):
        model, ids = make(attn="eager"), batch()
        cache = DynamicCache(config=config_of(model))
        for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9)):
            output = model(input_ids=ids[:, start:stop], output_attentions=True, **on_cache(model, cache))
            assert all(weights.shape[-1] == stop for weights in output.attentions)

    @pytest.mark.parametrize("sides", ["left", "right"])
    def test_padded(self, sides):
        model, ids = make(), batch()
        mask = torch.ones_like(ids)
        mask[1, :3] = 0 if sides == "left" else 1
        mask[1, 4:6] = 1 if sides == "left" else 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)

        def run():
            cache, parts = DynamicCache(config=config_of(model)), []
            for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9), (9, 10)):
                inputs = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
                parts.append(outputs(model, input_ids=ids[:, start:stop], **inputs, **on_cache(model, cache)))
            return torch.cat(parts, dim=1)

        compare(run, 3 * LAYERS)


MOVES = {
    "crop": lambda cache: cache.crop(-2),
    "reorder_cache": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "batch_select_indices": lambda cache: cache.batch_select_indices(torch.tensor([1, 1])),
    "repeated and selected": lambda cache: (
        cache.batch_repeat_interleave(2),
        cache.batch_select_indices(torch.tensor([2, 0])),
    ),
    "keys changed in place": lambda cache: cache.layers[0].keys.mul_(0.5),
    "values replaced": lambda cache: setattr(cache.layers[1], "values", 2 * cache.layers[1].values),
}


class TestCachesThatAreMoved:
    @pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
    @pytest.mark.parametrize("name", ["llama", "mistral"])
    def test_between_two_tokens(self, name, move):
        model, ids = make(name), batch()
        length = 3 if name == "mistral" else 6

        def run():
            cache = DynamicCache(config=config_of(model))
            if hasattr(cache, "activate_past_recording") and move is MOVES["crop"]:
                cache.activate_past_recording()
            parts = [feed(model, cache, ids, 0, *range(length - 2, length))]
            for _ in range(2):
                move(cache)
                start = cache.get_seq_length()
                parts.append(feed(model, cache, ids, *range(start, start + 4)))
            return torch.cat(parts, dim=1)

        compare(run)

    @pytest.mark.parametrize("start", [2, 9])
    def test_past_that_is_recorded_from_some_token_on(self, start):
        """From tokens on that fill the window, or do not."""
        model, ids = make("mistral"), batch()

        def run():
            cache = DynamicCache(config=config_of(model))
            if not hasattr(cache, "activate_past_recording"):
                pytest.skip("this version of transformers cannot crop a cache with a window")
            first = feed(model, cache, ids, *range(start + 1))
            cache.activate_past_recording()
            second = feed(model, cache, ids, *range(start, start + 5))
            cache.crop(-1)
            return torch.cat([first, second, feed(model, cache, ids, *range(start + 3, start + 6))], dim=1)

        compare(run)

    @pytest.mark.parametrize(
        "empty", [lambda cache: cache.crop(-9), lambda cache: cache.reset()], ids=["crop", "reset"]
    )
    def test_emptied(self, empty):
        """The first token of what comes then may be a single one. It has the prompts of the weights of that time."""
        model, ids = make(), batch()

        def run():
            randomise(model, seed=2)
            cache = DynamicCache(config=config_of(model))
            first = feed(model, cache, ids, 0, 6, 7, 8, 9)
            empty(cache)
            if cache.get_seq_length() > 0:
                pytest.skip("this version of transformers writes zeros over the tokens of a cache that is reset")
            randomise(model, seed=3)
            return torch.cat([first, feed(model, cache, ids, *range(6))], dim=1)

        compare(run)

    @torch.no_grad()
    def test_copies(self):
        model, ids = make(), batch()
        cache = DynamicCache(config=config_of(model))
        feed(model, cache, ids, 0, 6, 7, 8)
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        expected = feed(model, cache, ids, 8, 9, 10, 11)
        for other in copies:
            with counted() as calls:
                assert_equal(feed(model, other, ids, 8, 9, 10, 11), expected)
            assert calls

    @torch.no_grad()
    def test_tokens_are_not_kept_twice(self):
        """In a search with beams, a cache would take twice the memory."""
        model, ids = make(), batch()
        cache = DynamicCache(config=config_of(model))
        feed(model, cache, ids, 0, 6, 7, 8, 9)
        old = [weakref.ref(layer.keys) for layer in cache.layers]
        cache.reorder_cache(torch.tensor([1, 0]))
        assert all(reference() is None for reference in old)

    @torch.no_grad()
    def test_no_module_is_copied(self):
        model, ids = make(), batch()
        cache = DynamicCache(config=config_of(model))
        feed(model, cache, ids, 0, 6, 7, 8)
        memo = {}
        copy.deepcopy(cache, memo)
        assert not any(isinstance(value, torch.nn.Module) for value in memo.values())

    @torch.no_grad()
    def test_what_others_see(self):
        model, ids = make(), batch()
        base = copy.deepcopy(model).unload()
        cache, of_base = DynamicCache(), DynamicCache()
        for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9)):
            model(input_ids=ids[:, start:stop], **on_cache(model, cache))
            base(input_ids=ids[:, start:stop], use_cache=True, **on_top_of(of_base))
            assert cache.get_seq_length() == of_base.get_seq_length() == stop
            assert cache.get_mask_sizes(1, 0) == of_base.get_mask_sizes(1, 0)
            shapes = [[tensor.shape for tensor in layer[:2]] for layer in cache]
            assert shapes == [[tensor.shape for tensor in layer[:2]] for layer in of_base]
            # In the first layer, keys and values do not depend on prompts.
            assert_equal(cache.layers[0].keys, of_base.layers[0].keys)
            assert isinstance(cache.layers[0], DynamicLayer) and repr(cache) == repr(of_base)
        rebuilt = DynamicCache((layer.keys, layer.values) for layer in cache.layers)
        assert torch.equal(rebuilt.layers[1].values, cache.layers[1].values)

    @torch.no_grad()
    def test_what_an_exported_program_sees(self):
        register_dynamic_cache_export_support()
        model, ids = make(), batch()
        cache, other = filled(model, ids), filled(model, ids)
        expected = [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]
        leaves, spec = tree_flatten(cache)
        assert len(leaves) == len(expected) and all(any(torch.equal(old, new) for new in leaves) for old in expected)
        assert {type(layer) for layer in cache.layers} == {DynamicLayer}
        with model.disable_adapter():
            assert_equal(*(feed(model, some, ids, 9, 10) for some in (tree_unflatten(leaves, spec), cache)))
            feed(model, other, ids, 9, 10)
        with counted() as calls:
            assert_equal(feed(model, cache, ids, 10, 11, 12), feed(model, other, ids, 10, 11, 12))
        assert len(calls) == 2 * 2 * LAYERS


def add_other(model):
    model.add_adapter("other", make_config(num_visual_tokens=0, num_interaction_tokens=0, num_textual_tokens=2))
    randomise(model, seed=7)
    model.eval()


def add_again(model):
    model.delete_adapter("default")
    model.add_adapter("default", M2PTConfig(num_visual_tokens=0, num_textual_tokens=3))
    randomise(model, seed=8)
    model.set_adapter("default")
    model.eval()


def load_other_weights(model):
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, {name: 0.5 * weight for name, weight in state.items()})


def load_saved(model, folder):
    other = copy.deepcopy(model)
    randomise(other, seed=9)
    other.save_pretrained(folder)
    model.load_adapter(folder, "default")
    model.eval()


def replace_parameters(model):
    for module in model.modules():
        if type(module).__name__ == "M2PTPrompt":
            module.weight = torch.nn.Parameter(0.5 * module.weight.detach())


CHANGES = {
    "switched": lambda model, folder: model.set_adapter("other"),
    "switched and back": lambda model, folder: [model.set_adapter("other"), model.set_adapter("default")],
    "both": lambda model, folder: model.base_model.set_adapter(["default", "other"]),
    "deleted": lambda model, folder: [model.set_adapter("other"), model.delete_adapter("default")],
    "deleted and added": lambda model, folder: add_again(model),
    "other weights loaded": lambda model, folder: load_other_weights(model),
    "load_adapter": load_saved,
    "parameters replaced": lambda model, folder: replace_parameters(model),
    "disabled": lambda model, folder: model.base_model.disable_adapter_layers(),
    "unloaded": lambda model, folder: model.unload(),
}


class TestOwners:
    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_changes_between_two_tokens(self, change, tmp_path):
        ids = batch()

        def run():
            model = make()
            add_other(model)
            model.set_adapter("default")
            cache = DynamicCache(config=config_of(model))
            first = feed(model, cache, ids, 0, 6, 7, 8, 9)
            change(model, tmp_path)
            callee = model.get_base_model() if change is CHANGES["unloaded"] else model
            return torch.cat([first, feed(callee, cache, ids, 9, 10, 11, 12)], dim=1)

        compare(run)

    def test_in_turns(self):
        """The adapter and the base model take turns on one cache."""
        model, ids = make(), batch()

        def run():
            cache, parts = DynamicCache(config=config_of(model)), []
            parts.append(feed(model, cache, ids, 0, 6, 7, 8))
            for start in (8, 10):
                with model.disable_adapter():
                    parts.append(feed(model, cache, ids, start, start + 1))
                parts.append(feed(model, cache, ids, start + 1, start + 2))
            return torch.cat(parts, dim=1)

        compare(run)

    @torch.no_grad()
    def test_a_cache_keeps_the_rows_of_the_weights_that_it_was_filled_with(self):
        model, ids = make(), batch()
        unchanged, config = copy.deepcopy(model), config_of(model)
        cache, other = DynamicCache(config=config), DynamicCache(config=config)
        feed(model, cache, ids, 0, 6, 7, 8)
        feed(unchanged, other, ids, 0, 6, 7, 8)
        randomise(model, seed=5)
        assert_equal(feed(model, cache, ids, 8, 9, 10), feed(unchanged, other, ids, 8, 9, 10))
        # A new one sees new weights.
        cache = DynamicCache(config=config)
        assert_equal(feed(model, cache, ids, 0, 6, 7, 8), feed(copy.deepcopy(model), DynamicCache(), ids, 0, 6, 7, 8))

    @torch.no_grad()
    def test_another_model_on_the_same_cache(self):
        model, ids = make(), batch()
        cache = DynamicCache(config=config_of(model))
        feed(model, cache, ids, 0, 6, 7, 8)
        other = copy.deepcopy(model)
        randomise(other, seed=5)
        with recomputed():
            expected = feed(other, copy.deepcopy(cache), ids, 8, 9, 10, 11)
        assert_equal(feed(other, cache, ids, 8, 9, 10, 11), expected)

    def test_mixed_batches(self):
        model, ids = make(), batch(3)
        add_other(model)
        names = ["other", "__base__", "default"]
        compare(
            lambda: feed(model, DynamicCache(config=config_of(model)), ids, 0, 6, 7, 8, 9, 10, adapter_names=names),
            3 * LAYERS,
        )

    def test_other_names_for_the_next_token(self):
        model, ids = make(), batch()
        add_other(model)

        def run():
            cache, parts = DynamicCache(config=config_of(model)), []
            for start, stop, names in (
                (0, 6, ["other", "default"]),
                (6, 7, ["other", "default"]),
                (7, 8, ["other", "default"]),
                (8, 9, ["default", "other"]),
                (9, 10, None),
            ):
                kwargs = {} if names is None else {"adapter_names": names}
                parts.append(feed(model, cache, ids, start, stop, **kwargs))
            return torch.cat(parts, dim=1)

        compare(run)

    def test_two_threads(self):
        model = make()
        add_other(model)
        model.set_adapter("default")
        samples = make_ids(14, 14)

        def run(ids, results, key):
            with torch.no_grad():
                results[key] = feed(model, DynamicCache(config=config_of(model)), ids, 0, *range(4, 15))

        alone, together = {}, {}
        for key, ids in enumerate(samples):
            run(ids, alone, key)
        threads = [threading.Thread(target=run, args=(ids, together, key)) for key, ids in enumerate(samples)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for key in alone:
            assert torch.equal(alone[key], together[key])


class TestConditions:
    def test_gradients(self):
        model, ids = make(), batch()
        gradients = []
        for context in (counted, recomputed):
            with context():
                cache = DynamicCache(config=config_of(model))
                with torch.no_grad():
                    feed(model, cache, ids, 0, 6, 7, 8, 9)
                step = feed(model, cache, ids, 9, 10)
                step.sum().backward()
                gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
                model.zero_grad()
        for actual, expected in zip(*gradients, strict=True):
            assert actual.any()
            assert_equal(actual, expected)

    def test_autocast(self):
        model, ids = make(), batch()

        def run():
            cache = DynamicCache(config=config_of(model))
            first = feed(model, cache, ids, 0, 6, 7, 8)
            with torch.autocast("cpu", torch.bfloat16):
                second = feed(model, cache, ids, 8, 9, 10, 11)
            return torch.cat([first, second.float(), feed(model, cache, ids, 11, 12, 13)], dim=1)

        with torch.no_grad():
            actual = run()
            with recomputed():
                torch.testing.assert_close(actual, run(), atol=0.1, rtol=0.05)
            with counted() as calls:
                run()
        # Each change makes the cache keep other prompts, which are observed anew.
        assert len(calls) == 2 * LAYERS

    def test_dtype(self):
        ids = batch()

        def run():
            model = make()
            cache = DynamicCache(config=config_of(model))
            first = feed(model, cache, ids, 0, 6, 7, 8)
            model.double()
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.double(), layer.values.double()
            return torch.cat([first.double(), feed(model, cache, ids, 8, 9, 10, 11)], dim=1)

        compare(run, 2 * LAYERS)

    def test_inference_mode(self):
        model, ids = make(), batch()
        mask = torch.ones_like(ids)

        def run():
            with torch.inference_mode():
                cache = DynamicCache(config=config_of(model))
                parts = [
                    outputs(model, input_ids=ids[:, a:b], attention_mask=mask[:, :b], **on_cache(model, cache))
                    for a, b in ((0, 6), (6, 7), (7, 8), (8, 9))
                ]
                return torch.cat(parts, dim=1)

        compare(run, 2 * LAYERS)


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "chunks": {"prefill_chunk_size": 4},
}


def test_assisted_generation():
    """A small model proposes tokens, and what is not accepted is removed from both caches."""
    model, assistant, ids = make(), make(), batch(1, 6)

    def run():
        output = model.generate(
            input_ids=ids,
            assistant_model=assistant.get_base_model(),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(output.logits)

    randomise(assistant, seed=5)
    actual = compare(run)
    with torch.no_grad():
        alone = model.generate(
            input_ids=ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    torch.testing.assert_close(actual, torch.stack(alone.logits), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_generation(options, name):
    model, ids = make(name), batch(1, 2 + WINDOW)

    def run():
        torch.manual_seed(3)
        kwargs = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
        output = model.generate(input_ids=ids, output_logits=True, return_dict_in_generate=True, **kwargs)
        return torch.stack(output.logits)

    compare(run)
