"""Where prompts stand, in compiled models."""

import pytest
import torch
from helpers.text_models import (
    MODELS,
    OTHER_TEXT,
    CachesWithoutMasks,
    assert_close,
    make,
    make_ids,
    on_cache,
    outputs,
    packed_mask,
    pad,
)
from transformers import DynamicCache, StaticCache

from peft_m2pt import UnsupportedModelError


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
class TestCompiled:
    """Graphs cannot depend on what a mask shows: they take rows for each sample."""

    @pytest.mark.parametrize("name", ["mistral", "qwen"])
    @torch.no_grad()
    def test_padding(self, name):
        model = make(name)
        call, samples = model.get_base_model().get_decoder(), make_ids(9, 5)
        ids, mask = pad(samples, "left")
        expected = outputs(call, input_ids=ids, attention_mask=mask)
        compiled = torch.compile(call, backend="eager")
        for order in ([0, 1], [1, 0]):
            together = outputs(compiled, input_ids=ids[order], attention_mask=mask[order], use_cache=False)
            for output, other, of_sample in zip(together, expected[order], mask[order].bool()):
                assert_close(output[of_sample], other[of_sample])

    @torch.no_grad()
    def test_packing(self):
        """Exact where all sequences start at one position, and refused where they do not."""
        model, lengths = make(), (5, 4, 7)
        samples, mask = make_ids(*lengths), packed_mask(lengths)
        inputs = {"input_ids": torch.cat(samples, dim=1), "attention_mask": mask, "use_cache": False}
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        alone = torch.cat([outputs(model, input_ids=sample) for sample in samples], dim=1)
        compiled = torch.compile(model, backend="eager")
        assert_close(outputs(compiled, **inputs, position_ids=positions), alone)
        with pytest.raises(RuntimeError, match="several sequences in one row that start at different positions"):
            outputs(compiled, **inputs)

    @torch.no_grad()
    def test_chunks(self, monkeypatch):
        monkeypatch.setitem(MODELS, "llama4", OTHER_TEXT["llama4"])
        model, lengths = make("llama4"), (4, 4)
        compiled = torch.compile(model, backend="eager")
        ids, mask = torch.cat(make_ids(*lengths), dim=1), packed_mask(lengths)
        outputs(model, input_ids=ids, use_cache=False)
        # torch goes on uncompiled where a graph raises.
        with pytest.raises(UnsupportedModelError, match="a mask of shape .* in which a sequence may begin"):
            outputs(compiled, input_ids=ids, attention_mask=mask, use_cache=False)
        positions = torch.tensor([[0, 1, 2, 3, 8, 9, 10, 11]])
        torch._dynamo.reset()
        with pytest.raises((RuntimeError, UnsupportedModelError), match="position_ids by which a sequence may begin"):
            outputs(compiled, input_ids=ids, position_ids=positions, use_cache=False)
        positions = torch.arange(8)[None]
        expected = outputs(model, input_ids=ids, use_cache=False)
        assert_close(outputs(compiled, input_ids=ids, position_ids=positions, use_cache=False), expected)

    @torch.no_grad()
    def test_caches(self):
        """The first tokens and those behind them, each in a graph."""
        model, samples = make(), make_ids(11, 8)
        ids, mask = pad(samples, "left")
        cache = StaticCache(config=model.config, max_cache_len=16)
        compiled = torch.compile(model, backend="eager")
        # transformers hangs hooks on its modules in their first call.
        outputs(model, input_ids=ids[:, -1:], use_cache=False)
        for start, stop in ((0, 6), (6, 9), (9, 10), (10, 11)):
            inputs = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
            together = outputs(compiled, **inputs, **on_cache(model, cache))
        alone = [outputs(model, input_ids=sample, use_cache=False)[0, -1:] for sample in samples]
        assert_close(together, torch.stack(alone))

    @pytest.mark.parametrize("is_emptied", [False, True])
    @torch.no_grad()
    def test_token_by_token_without_a_mask(self, is_emptied):
        """In a cache that grows, and in one whose layers are emptied on the way."""
        model, ids = make(), torch.cat(make_ids(11, 11))
        compiled, cache = torch.compile(model, backend="eager"), DynamicCache()
        places, start = [0, 7, 8, 9], 0
        for first, last in zip(places, places[1:]):
            parts = [outputs(compiled, input_ids=ids[:, first:last], **on_cache(model, cache))]
        if is_emptied:
            for layer in cache.layers:
                layer.crop(-9)
            parts, places, start = [], [0, 1, 2, 3], 5
            for first, last in zip(places, places[1:]):
                positions = torch.arange(start + first, start + last).expand(2, -1)
                inputs = {"input_ids": ids[:, first:last], "position_ids": positions}
                parts.append(outputs(compiled, **inputs, **on_cache(model, cache)))
        length, together = places[-1], torch.cat(parts, dim=1)
        positions = torch.arange(start, start + length).expand(2, -1)
        expected = outputs(model, input_ids=ids[:, :length], position_ids=positions, use_cache=False)
        assert_close(together, expected[:, -together.shape[1] :])


@pytest.mark.usefixtures("dynamo")
class TestCompiledCaches(CachesWithoutMasks):
    @torch.no_grad()
    def test_samples_change_places(self):
        model, (ids, positions), cache = self.start("qwen", True, 5, 40)
        compiled, order = torch.compile(model, backend="eager"), torch.tensor([1, 0])
        self.feed(model, compiled, cache, (ids, positions), 6, 7, 8)
        cache.reorder_cache(order)
        inputs = ids[order], positions[..., order, :]
        expected = outputs(model, input_ids=inputs[0], position_ids=inputs[1], use_cache=False)
        assert_close(self.feed(model, compiled, cache, inputs, 8, 9, 10), expected[:, 8:10])

    @torch.no_grad()
    def test_emptied(self):
        self.check_emptied("qwen", True, lambda model: torch.compile(model, backend="eager"))
