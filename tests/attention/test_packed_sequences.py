"""Several sequences in one row of a batch: each gives what it gives alone."""

import pytest
import torch
from helpers.attention_kernels import stand_ins
from helpers.models import trained_by
from helpers.text_models import assert_close, blocks_of, make, make_ids, outputs, packed_mask


class TestPacking:
    LENGTHS = (5, 4, 7)

    @pytest.mark.parametrize("padding", [0, 3])
    @pytest.mark.parametrize(
        "name, form", [("llama", "boolean"), ("llama", "additive"), ("llama", "blocks"), ("qwen", "boolean")]
    )
    @torch.no_grad()
    def test_by_a_mask_alone(self, name, padding, form):
        with stand_ins():
            model = make(name, "flex_attention" if form == "blocks" else "sdpa")
            call, samples = model.get_base_model().get_decoder(), make_ids(*self.LENGTHS)
            ids = torch.cat([*samples[:-1], torch.zeros(1, padding, dtype=torch.long), samples[-1]], dim=1)
            # Beside it, a row of another kind.
            visible = packed_mask(self.LENGTHS, padding)
            other = torch.ones_like(visible).tril()
            visible, ids = torch.cat([visible, other]), torch.cat([ids, make_ids(ids.shape[1], seed=8)[0]])
            mask = {"boolean": visible, "additive": torch.zeros(()).masked_fill(~visible, -torch.inf)}.get(form)
            mask = blocks_of(visible) if mask is None else mask
            together = outputs(call, input_ids=ids, attention_mask=mask, use_cache=False)
            ends = torch.tensor(self.LENGTHS).cumsum(0) + torch.tensor([0, 0, padding])
            for sample, end in zip(samples, ends):
                alone = outputs(call, input_ids=sample, use_cache=False)[0]
                assert_close(together[0, end - sample.shape[1] : end], alone)
            assert_close(together[1], outputs(call, input_ids=ids[1:], use_cache=False)[0])

    @pytest.mark.parametrize("attn", ["sdpa", "flash_attention_2"])
    @torch.no_grad()
    def test_by_positions(self, attn):
        with stand_ins():
            model, samples = make(attn=attn), make_ids(*self.LENGTHS)
            positions = torch.cat([torch.arange(length) for length in self.LENGTHS])[None]
            together = outputs(model, input_ids=torch.cat(samples, dim=1), position_ids=positions, use_cache=False)
            alone = torch.cat([outputs(model, input_ids=sample) for sample in samples], dim=1)
            assert_close(together, alone)

    @torch.no_grad()
    def test_by_boundaries_alone(self):
        """Positions count on, from one sequence to the next."""
        with stand_ins():
            model, samples = make(attn="flash_attention_2"), make_ids(*self.LENGTHS)
            ends = torch.tensor([0, *self.LENGTHS]).cumsum(0).to(torch.int32)
            longest = max(self.LENGTHS)
            packing = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
            ids = torch.cat(samples, dim=1)
            decoder = model.get_base_model().get_decoder()
            for positions in (torch.arange(ids.shape[1])[None], torch.arange(ids.shape[1])[None] + 4):
                together = outputs(decoder, input_ids=ids, position_ids=positions, use_cache=False, **packing)
                assert_close(together, torch.cat([outputs(decoder, input_ids=sample) for sample in samples], dim=1))

    def test_gradients(self):
        """Of a packed row they are the sum of those of its sequences."""
        model, samples = make(), make_ids(*self.LENGTHS)
        outputs(model, input_ids=torch.cat(samples, 1), attention_mask=packed_mask(self.LENGTHS)).pow(
            2
        ).sum().backward()
        together = {name: weight.grad.clone() for name, weight in trained_by(model).items()}
        model.zero_grad()
        for sample in samples:
            outputs(model, input_ids=sample).pow(2).sum().backward()
        for name, weight in trained_by(model).items():
            torch.testing.assert_close(together[name], weight.grad, atol=1e-3, rtol=1e-3)
