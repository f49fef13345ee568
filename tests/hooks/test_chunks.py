"""Language models whose tokens do not see those of other chunks."""

import pytest
import torch
from helpers.text_models import (
    MODELS,
    OTHER_TEXT,
    assert_as_alone,
    assert_close,
    causal,
    make,
    make_ids,
    on_cache,
    outputs,
    packed_mask,
    pad,
)
from transformers import DynamicCache, masking_utils

from peft_m2pt import UnsupportedModelError
from peft_m2pt.attention.visibility import read_visibility


class TestChunks:
    """The end of a chunk, behind which tokens see none before themselves, is no end of a sequence."""

    CHUNK = 4

    @pytest.fixture(autouse=True)
    def llama4(self, monkeypatch):
        monkeypatch.setitem(MODELS, "llama4", OTHER_TEXT["llama4"])

    def inputs(self, lengths, starts=None):
        positions = [torch.arange(length) + start for length, start in zip(lengths, starts or [0] * len(lengths))]
        return {"input_ids": torch.cat(make_ids(*lengths), dim=1), "position_ids": torch.cat(positions)[None]}

    def check(self, lengths, **inputs):
        call = make("llama4").get_base_model().get_decoder()
        alone = torch.cat([outputs(call, input_ids=sample) for sample in make_ids(*lengths)], dim=1)
        assert_close(outputs(call, **inputs, use_cache=False), alone)

    @pytest.mark.skipif(
        not hasattr(masking_utils, "remap_positions_for_packed_sequence"),
        reason="this transformers counts the chunks of a packed sequence from the beginning of the row",
    )
    @pytest.mark.parametrize("lengths", [(4, 4, 4), (3, 4, 2), (9, 5, 7), (8, 5, 7), (3, 9)])
    @torch.no_grad()
    def test_packing_by_positions(self, lengths):
        self.check(lengths, **self.inputs(lengths))

    @pytest.mark.parametrize("lengths", [(4, 4, 4), (3, 4, 2), (3, 3, 2)])
    @torch.no_grad()
    def test_packing_by_a_mask(self, lengths):
        """Sequences that fit into chunks, since a mask that is given serves for all layers."""
        self.check(lengths, **self.inputs(lengths), attention_mask=packed_mask(lengths))

    @torch.no_grad()
    def test_packing_by_a_mask_alone(self):
        self.check((3, 3, 2), input_ids=self.inputs((3, 3, 2))["input_ids"], attention_mask=packed_mask((3, 3, 2)))

    @pytest.mark.parametrize("spans", [(0, 6, *range(7, 15)), (0, 6, 9, 14), (0, 4, 8, 12, 14), (0, 2, 5, 6, 8, 14)])
    @torch.no_grad()
    def test_caches(self, spans):
        model, samples = make("llama4"), make_ids(14, 9)
        ids, mask = pad(samples, "left")
        cache = DynamicCache(config=model.config)
        together = [
            outputs(model, input_ids=ids[:, a:b], attention_mask=mask[:, :b], **on_cache(model, cache))
            for a, b in zip(spans, spans[1:])
        ]
        assert_as_alone(model, samples, torch.cat(together, dim=1), mask)

    @pytest.mark.parametrize("seed", range(10))
    def test_holes(self, seed):
        """Wherever they are, all tokens of a sample have one first token."""
        generator = torch.Generator().manual_seed(seed)
        mask = torch.randint(2, (2, 21), generator=generator)
        mask[:, :3], mask[:, 9:14], mask[:, 3] = 0, 0, 1
        numbers = torch.arange(21) - 3
        of_chunks = numbers[:, None] // self.CHUNK == numbers // self.CHUNK
        visibility = read_visibility(causal(mask) & of_chunks, 2, 21, 0, (None, self.CHUNK), False)
        first = visibility.first_visible
        for _ in range(21):
            first = first.gather(1, first)
        assert (first[visibility.is_token] == 3).all()

    def refuse(self, match, call=lambda model: model, **inputs):
        with pytest.raises((UnsupportedModelError, RuntimeError), match=match):
            outputs(call(make("llama4")), **inputs, use_cache=False)

    @torch.no_grad()
    def test_a_sequence_begins_with_a_chunk(self):
        """Nothing tells a layer that it is no chunk: a mask that is given serves for all, and positions go on."""
        lengths = (5, 3, 4)
        ids, mask = self.inputs(lengths)["input_ids"], packed_mask(lengths)
        of_chunks = torch.arange(12)[:, None] // self.CHUNK == torch.arange(12) // self.CHUNK
        match = (
            r"'model' \(Llama4TextModel\) got a mask of shape \(1, 1, 12, 12\) in which a sequence may begin where a "
            r"chunk of 4 tokens does.*Pass position_ids that start at 0"
        )
        masks = [mask, torch.zeros(()).masked_fill(~mask, -torch.inf)]
        for given in (*masks, {"full_attention": mask, "chunked_attention": mask & of_chunks}):
            self.refuse(match, input_ids=ids, attention_mask=given)
        self.refuse(match, **self.inputs(lengths, (0, 8, 0)), attention_mask=mask)

    @pytest.mark.parametrize("starts", [(0, 8), (0, 9), (5, 5)])
    @torch.no_grad()
    def test_packed_sequences_start_elsewhere(self, starts):
        self.refuse("got position_ids by which a sequence may begin where a chunk", **self.inputs((4, 5), starts))

    @torch.no_grad()
    def test_one_sequence(self):
        """What `generate` makes beforehand is not refused."""
        model, (ids,) = make("llama4"), make_ids(14)
        mask = packed_mask([14])
        of_chunks = torch.arange(14)[:, None] // self.CHUNK == torch.arange(14) // self.CHUNK
        masks = {"full_attention": mask, "chunked_attention": mask & of_chunks}
        expected = outputs(model, input_ids=ids, use_cache=False)
        assert_close(outputs(model, input_ids=ids, attention_mask=masks, use_cache=False), expected)
