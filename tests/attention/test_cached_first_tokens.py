"""What is noted of first tokens goes along with the cache that they are in."""

import copy

import pytest
import torch
from helpers.models import PAD_TOKEN, cache_of, randomise
from helpers.text_models import MODELS, CachesWithoutMasks, assert_close, make, make_ids, on_cache, outputs, pad
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from peft_m2pt import UnsupportedModelError


EMPTYING = {
    "reset": lambda cache: [layer.reset() for layer in cache.layers],
    "crop": lambda cache: [layer.crop(-8) for layer in cache.layers],
    "layers": lambda cache: setattr(cache, "layers", [DynamicLayer() for _ in cache.layers]),
}


class TestCaches:
    """Left padding is counted as positions, so that the prompts of each sample stand somewhere else."""

    def start(self, name="llama", length=6, **kwargs):
        model, samples = make(name), make_ids(11, 8)
        ids, mask = pad(samples, "left")
        cache = cache_of(model(input_ids=ids[:, :length], attention_mask=mask[:, :length], use_cache=True, **kwargs))
        return model, samples, ids, mask, cache

    def go_on(self, model, ids, mask, cache, start, stop):
        return outputs(model, input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], **on_cache(model, cache))

    def expected(self, model, samples, length):
        alone = [outputs(model, input_ids=sample, use_cache=False)[0, -length:] for sample in samples]
        return torch.stack(alone)

    @pytest.mark.parametrize("length", [1, 2, 6])
    @pytest.mark.parametrize("name", MODELS)
    @torch.no_grad()
    def test_going_on(self, name, length):
        """In chunks, of which the first one may be nothing but padding for a sample, and then token by token."""
        model, samples, ids, mask, cache = self.start(name, length)
        parts = [self.go_on(model, ids, mask, cache, start, start + 1) for start in range(length, 7)]
        parts.append(self.go_on(model, ids, mask, cache, 7, 9))
        parts += [self.go_on(model, ids, mask, cache, start, start + 1) for start in (9, 10)]
        assert_close(torch.cat(parts, dim=1)[:, -4:], self.expected(model, samples, 4))

    @torch.no_grad()
    def test_tokens_one_by_one_take_the_rows_of_the_first_step(self, monkeypatch):
        model, samples, ids, mask, cache = self.start()
        expected = self.expected(copy.deepcopy(model), samples, 5)
        monkeypatch.setattr("peft_m2pt.layers.attention.record_prompt_kv", None)
        parts = [self.go_on(model, ids, mask, cache, start, start + 1) for start in range(6, 11)]
        assert_close(torch.cat(parts, dim=1), expected)

    @torch.no_grad()
    def test_new_weights(self):
        model, samples, ids, mask, cache = self.start()
        before = copy.deepcopy(cache)
        with model.disable_adapter():
            self.go_on(model, ids, mask, before, 6, 7)
        randomise(model, seed=9)
        fresh = copy.deepcopy(model)
        self.go_on(model, ids, mask, cache, 6, 7)
        step = self.go_on(model, ids, mask, cache, 7, 8)
        other = copy.deepcopy(before)
        assert step.shape == self.go_on(fresh, ids, mask, other, 7, 8).shape

    @torch.no_grad()
    def test_copies(self):
        model, samples, ids, mask, cache = self.start()
        expected = self.expected(copy.deepcopy(model), samples, 5)
        for _ in range(2):
            assert_close(self.go_on(model, ids, mask, copy.deepcopy(cache), 6, 11), expected)

    @torch.no_grad()
    def test_cut_back(self):
        model, samples, ids, mask, cache = self.start()
        self.go_on(model, ids, mask, cache, 6, 10)
        cache.crop(-3)
        assert_close(self.go_on(model, ids, mask, cache, 7, 11), self.expected(model, samples, 4))

    @torch.no_grad()
    def test_samples_change_places(self):
        model, samples, ids, mask, cache = self.start()
        order = torch.tensor([1, 1, 0])
        cache.batch_select_indices(order)
        for start, stop in ((6, 7), (7, 10), (10, 11)):
            step = self.go_on(model, ids[order], mask[order], cache, start, stop)
        assert_close(step, self.expected(model, samples, 1)[order])

    @torch.no_grad()
    def test_emptied(self):
        """Its next token is the first one, wherever it stands."""
        model, samples, ids, mask, cache = self.start()
        positions = torch.tensor([[7]]).expand(2, -1)
        expected = outputs(model, input_ids=ids[:, -1:], position_ids=positions, use_cache=False)
        model, samples, ids, mask, cache = self.start()
        cache.crop(-6)
        assert cache.get_seq_length() == 0
        actual = outputs(model, input_ids=ids[:, -1:], position_ids=positions, **on_cache(model, cache))
        assert_close(actual, expected)

    @pytest.mark.parametrize("empty", EMPTYING.values(), ids=EMPTYING)
    @torch.no_grad()
    def test_emptied_layer_by_layer(self, empty):
        model, ids = make(), torch.cat(make_ids(9, 9))
        positions = 5 + torch.arange(3).expand(2, -1)
        expected = outputs(model, input_ids=ids[:, :3], position_ids=positions, use_cache=False)
        cache = cache_of(model(input_ids=ids[:, :7], use_cache=True))
        outputs(model, input_ids=ids[:, 7:8], **on_cache(model, cache))
        empty(cache)
        if cache.get_seq_length() != 0:
            pytest.skip("this transformers zeroes layers instead of emptying them")
        parts = [
            outputs(model, input_ids=ids[:, i : i + 1], position_ids=positions[:, i : i + 1], **on_cache(model, cache))
            for i in range(3)
        ]
        assert_close(torch.cat(parts, dim=1), expected)

    @torch.no_grad()
    def test_static(self):
        model, samples = make(), make_ids(11, 8)
        ids, mask = pad(samples, "left")
        cache = StaticCache(config=model.config, max_cache_len=16)
        for order in (torch.tensor([0, 1]), torch.tensor([1, 0])):
            parts = [
                self.go_on(model, ids[order], mask[order], cache, start, stop)
                for start, stop in ((0, 6), (6, 7), (7, 9), (9, 11))
            ]
            assert_close(torch.cat(parts, dim=1)[:, -5:], self.expected(model, samples, 5)[order])
            cache.reset()

    @torch.no_grad()
    def test_filled_without_the_adapter(self):
        """Prompts of tokens that are in the cache stand where they would have stood."""
        model, samples = make(), make_ids(11, 8)
        ids, mask = pad(samples, "left")
        steps = []
        for batch in (slice(0, 2), slice(0, 1), slice(1, 2)):
            first = 11 - int(mask[batch].sum(1).max())
            with model.disable_adapter():
                output = model(input_ids=ids[batch, first:6], attention_mask=mask[batch, first:6], use_cache=True)
            steps.append(
                self.go_on(model, ids[batch, first:], mask[batch, first:], cache_of(output), 6 - first, 11 - first)
            )
        assert_close(steps[0], torch.cat(steps[1:]))

    @pytest.mark.parametrize("length", [1, 3])
    @torch.no_grad()
    def test_unknown(self, length):
        model, samples = make(), make_ids(11)
        cache = cache_of(model(input_ids=samples[0][:, :6], use_cache=True))
        unknown = type(cache)((layer.keys, layer.values) for layer in cache.layers)
        with pytest.raises(UnsupportedModelError, match="model.layers.0.self_attn.* a cache whose first tokens"):
            outputs(model, input_ids=samples[0][:, 6 : 6 + length], **on_cache(model, unknown))


class TestCachesWithoutMasks(CachesWithoutMasks):
    MOVES = {
        "reorder_cache": (torch.tensor([1, 0]), torch.tensor([1, 0])),
        "batch_select_indices": (torch.tensor([1, 0, 1]), torch.tensor([1, 0, 1])),
        "batch_repeat_interleave": (2, torch.tensor([0, 0, 1, 1])),
    }

    @pytest.mark.parametrize("move, is_static", [*((move, False) for move in MOVES), ("reorder_cache", True)])
    @pytest.mark.parametrize("name", MODELS)
    @torch.no_grad()
    def test_samples_change_places(self, name, move, is_static):
        model, (ids, positions), cache = self.start(name, is_static, 5, 40)
        argument, order = self.MOVES[move]
        getattr(cache, move)(argument)
        inputs = ids[order], positions[..., order, :]
        step = self.feed(model, model, cache, inputs, 6, 7, 8, 11, 12)
        expected = outputs(model, input_ids=inputs[0], position_ids=inputs[1], use_cache=False)
        assert_close(step, expected[:, 6:12])

    @torch.no_grad()
    def test_beams(self):
        """Beams of samples that start elsewhere are those of each sample alone."""
        model, (ids, positions) = make(), self.inputs("llama", 5, 40)
        options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD_TOKEN}
        alone = [
            model.generate(input_ids=ids[i : i + 1], position_ids=positions[i : i + 1], **options) for i in (0, 1)
        ]
        together = model.generate(input_ids=ids, position_ids=positions, **options)
        for output, other in zip(together, alone):
            assert output.tolist()[: other.shape[1]] == other[0].tolist()

    @pytest.mark.parametrize("name, is_static", [*((name, True) for name in MODELS), ("llama", False)])
    @torch.no_grad()
    def test_emptied(self, name, is_static):
        self.check_emptied(name, is_static, lambda model: model)

    @torch.no_grad()
    def test_the_first_token_is_cut_away(self):
        (ids,) = make_ids(3)
        expected = outputs(make(), input_ids=ids, use_cache=False)
        ids, mask = torch.nn.functional.pad(ids, (3, 0)), torch.tensor([[0] * 3 + [1] * 3])
        model = make()
        cache = DynamicCache(config=model.config)
        outputs(model, input_ids=ids[:, :4], attention_mask=mask[:, :4], **on_cache(model, cache))
        cache.crop(-1)
        for i in range(3, 6):
            inputs = {"position_ids": torch.tensor([[20 + i]]), "attention_mask": mask[:, : i + 1]}
            step = outputs(model, input_ids=ids[:, [i]], **inputs, **on_cache(model, cache))
            assert_close(step, expected[:, i - 3 : i - 2])

    @torch.no_grad()
    def test_another_number_of_samples(self):
        """Somebody has changed the tensors of a cache by hand."""
        model, (ids, positions), cache = self.start("llama", False, 5, 40)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[[1, 0, 1]], layer.values[[1, 0, 1]]
        with pytest.raises(UnsupportedModelError, match="a cache whose first tokens stand at unknown positions"):
            self.feed(model, model, cache, (ids[[1, 0, 1]], positions[[1, 0, 1]]), 6, 7)
