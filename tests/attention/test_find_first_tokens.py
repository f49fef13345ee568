"""Where prompts stand: a sample gives what it gives alone, whatever stands beside it, and whoever calls what."""

import gc
import threading

import pytest
import torch
from families import FAMILIES
from families.checks import Tuned
from helpers.attention_kernels import stand_ins
from helpers.models import randomise, trained_by
from helpers.text_models import (
    MODELS,
    OTHER_TEXT,
    PARTS,
    WINDOW,
    assert_as_alone,
    assert_close,
    blocks_of,
    causal,
    make,
    make_ids,
    outputs,
    packed_mask,
    pad,
)

from peft_m2pt import M2PTConfig, UnsupportedModelError


FORMS = {
    "2-D": lambda mask: mask,
    "2-D of floats": lambda mask: mask.float(),
    "boolean": causal,
    "additive": lambda mask: torch.zeros(()).masked_fill(~causal(mask), torch.finfo(torch.float32).min),
    "a million": lambda mask: torch.zeros(()).masked_fill(~causal(mask), -1e6),
    "padding sees all": lambda mask: causal(mask) | ~mask.bool()[:, None, :, None],
    "blocks": lambda mask: blocks_of(causal(mask)),
}


@pytest.mark.parametrize("sides", ["left", "right", "both"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_padding(name, part, sides):
    call = PARTS[part](make(name))
    samples = make_ids(9, 5, 7)
    ids, mask = pad(samples, sides)
    assert_as_alone(call, samples, outputs(call, input_ids=ids, attention_mask=mask), mask)
    embeddings = make(name).get_input_embeddings()(ids)
    assert_as_alone(call, samples, outputs(call, inputs_embeds=embeddings, attention_mask=mask), mask)


# What a decoder takes as it is: a mask of numbers that are added, wherever "eager" attention adds them, and one with a
# window of its own.
TAKEN = [
    *((name, attn, form) for name in MODELS for attn in ("eager", "sdpa") for form in ("2-D", "2-D of floats")),
    *(
        (name, attn, form)
        for name in ("llama", "qwen")
        for attn in ("eager", "sdpa")
        for form in ("additive", "a million")
    ),
    *((name, "sdpa", form) for name in ("llama", "qwen") for form in ("boolean", "padding sees all")),
    *(("llama", "flex_attention", form) for form in ("2-D", "blocks")),
    *((name, "flash_attention_2", "2-D") for name in MODELS),
]


@pytest.mark.parametrize("name, attn, form", TAKEN)
@torch.no_grad()
def test_forms_of_masks(name, attn, form):
    with stand_ins():
        call, samples = make(name, attn).get_base_model().get_decoder(), make_ids(9, 5)
        ids, mask = pad(samples, "left")
        together = outputs(call, input_ids=ids, attention_mask=FORMS[form](mask), use_cache=False)
        assert_as_alone(call, samples, together, mask)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_positions_given(name):
    """Positions start anywhere, and elsewhere in each sample."""
    model, samples = make(name), make_ids(7, 7)
    positions = torch.arange(7) + torch.tensor([[5], [40]])
    if name == "qwen":
        positions = positions.expand(3, -1, -1)
    together = outputs(model, input_ids=torch.cat(samples), position_ids=positions)
    assert_close(together, torch.cat([outputs(model, input_ids=sample) for sample in samples]))
    for part in PARTS.values():
        call = part(model)
        together = outputs(call, input_ids=torch.cat(samples), position_ids=positions)
        assert_close(together, torch.cat([outputs(call, input_ids=sample) for sample in samples]))


@pytest.mark.parametrize("name", OTHER_TEXT)
@torch.no_grad()
def test_other_rotations(name, monkeypatch):
    monkeypatch.setitem(MODELS, name, OTHER_TEXT[name])
    model, samples = make(name), make_ids(9, 5, 7)
    ids, mask = pad(samples, "left")
    assert_as_alone(model, samples, outputs(model, input_ids=ids, attention_mask=mask), mask)
    positions = torch.arange(7) + torch.tensor([[5], [30]])
    if name != "llama4":  # whose queries know how far they are from position 0
        together = outputs(model, input_ids=ids[:2, 2:], position_ids=positions)
        assert_close(together, torch.cat([outputs(model, input_ids=row[None]) for row in ids[:2, 2:]]))


IDEFICS = next(family for family in FAMILIES if family.name == "idefics")


@pytest.mark.skipif(
    not IDEFICS.is_known, reason="in this transformers, rotations of Idefics start at 0 in each call, so it is refused"
)
@torch.no_grad()
def test_rotations_inside_of_the_attention():
    """Idefics gives its attention positions."""
    tuned = Tuned(IDEFICS)
    inputs = {
        name: value[:, 3:] if name in ("input_ids", "attention_mask") else value
        for name, value in tuned.inputs.items()
    }
    inputs["image_attention_mask"] = inputs["image_attention_mask"][:, 3:]
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    expected = tuned.model(**inputs, position_ids=positions).logits
    actual = tuned.model(**inputs, position_ids=positions + torch.tensor([[4], [20]])).logits
    assert_close(actual, expected)
    assert not torch.allclose(expected, tuned.base(**inputs, position_ids=positions).logits, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_holes(name):
    """What stands behind a hole keeps its position, and with it its distance from the prompts."""
    model = make(name)
    ids, mask = torch.cat(make_ids(12, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, 2:WINDOW] = 0
    mask[1, :2] = mask[1, 6] = 0
    together = outputs(model, input_ids=ids, attention_mask=mask)
    for i, kept in enumerate(mask.bool()):
        numbers = torch.arange(12)[kept]
        positions = (numbers - numbers[0])[None]
        visible = packed_mask([len(numbers)])
        if name == "mistral":
            visible = visible & ((numbers[:, None] - numbers) < WINDOW)
        if name == "qwen":
            positions = positions.expand(3, -1, -1)
        alone = outputs(model, input_ids=ids[i : i + 1, kept], attention_mask=visible, position_ids=positions)
        assert_close(together[i, kept], alone[0])


@torch.no_grad()
def test_tokens_see_behind_themselves():
    """The first token of a text that sees all of itself is its first token."""
    model = make()
    (ids,) = make_ids(8)
    visible = torch.ones(8, 8, dtype=torch.bool).tril()
    visible[:4, :4] = True
    expected = outputs(model, input_ids=ids, attention_mask=visible[None, None])
    padded = torch.nn.functional.pad(visible, (3, 0, 3, 0))[None, None]
    assert_close(
        outputs(model, input_ids=torch.nn.functional.pad(ids, (3, 0)), attention_mask=padded)[:, 3:], expected
    )


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_adapter_for_each_sample(name):
    model = make(name)
    model.add_adapter("other", M2PTConfig(num_visual_tokens=0, num_textual_tokens=5))
    randomise(model, seed=6)
    model.eval()
    samples, names = make_ids(9, 5, 7), ["other", "__base__", "default"]
    ids, mask = pad(samples, "left")
    together = outputs(model, input_ids=ids, attention_mask=mask, adapter_names=names)
    for i, (sample, adapter) in enumerate(zip(samples, names)):
        alone = outputs(model, input_ids=sample, adapter_names=[adapter])
        assert_close(together[i, mask[i].bool()], alone[0])
    if name == "llama":
        row = torch.cat(samples, dim=1)
        visible = packed_mask([9, 5, 7])
        both = outputs(
            model, input_ids=row.repeat(3, 1), attention_mask=visible.repeat(3, 1, 1, 1), adapter_names=names
        )
        for output, adapter in zip(both, names):
            alone = [outputs(model, input_ids=sample, adapter_names=[adapter])[0] for sample in samples]
            assert_close(output, torch.cat(alone))


class TestRefusals:
    def refuse(self, visible, match):
        model = make()
        with pytest.raises(UnsupportedModelError, match="model.layers.0.self_attn.*" + match):
            model(
                input_ids=make_ids(visible.shape[-1])[0].expand(len(visible), -1),
                attention_mask=visible,
                use_cache=False,
            )

    def test_nothing_is_seen(self):
        visible = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
        visible[1] = False
        self.refuse(visible, r"a mask of shape \(2, 1, 5, 5\) in which sample 1 sees no token")

    def test_nobody_is_first(self):
        visible = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
        visible[..., :2, :2] = torch.tensor([[False, True], [True, False]])
        self.refuse(visible, "in which no token comes first")

    def test_a_hole_as_long_as_the_window(self):
        model, mask = make("mistral"), torch.tensor([[1] * 5 + [0] * WINDOW + [1] * 3])
        with pytest.raises(UnsupportedModelError, match="a hole as long as the sliding window \\(4 tokens\\)"):
            model(input_ids=make_ids(12)[0], attention_mask=mask, use_cache=False)


class TestTraining:
    def loss(self, call, ids, mask):
        return outputs(call, input_ids=ids, attention_mask=mask, use_cache=False)[mask.bool()].pow(2).mean()

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("part", PARTS)
    def test_checkpointing_and_two_passes(self, part, use_reentrant):
        """Two forward passes before one backward pass, of batches that are padded in other ways."""
        gradients = []
        for is_checkpointed in (False, True):
            model = make("qwen").train()
            if is_checkpointed:
                model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            call = PARTS[part](model)
            batches = [pad(make_ids(9, 5), "left"), pad(make_ids(4, 8, seed=5), "both")]
            sum(self.loss(call, *batch) for batch in batches).backward()
            gradients.append({name: weight.grad for name, weight in trained_by(model).items()})
            if not is_checkpointed:
                model.zero_grad()
                for batch in batches:
                    samples = [row[kept.bool()][None] for row, kept in zip(*batch)]
                    states = [outputs(call, input_ids=sample, use_cache=False)[0] for sample in samples]
                    torch.cat(states).pow(2).mean().backward()
                gradients.append({name: weight.grad for name, weight in trained_by(model).items()})
        for name, gradient in gradients[0].items():
            for other in gradients[1:]:
                torch.testing.assert_close(other[name], gradient, atol=1e-5, rtol=1e-3)

    @torch.no_grad()
    def test_threads(self):
        model = make()
        batches = [pad(make_ids(9, n, seed=n), "left") for n in range(2, 8)]
        expected = [outputs(model, input_ids=ids, attention_mask=mask) for ids, mask in batches]
        found = {}

        def call(i):
            with torch.no_grad():
                for _ in range(5):
                    found[i] = outputs(model, input_ids=batches[i][0], attention_mask=batches[i][1])

        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, output in enumerate(expected):
            assert torch.equal(found[i], output)


class TestCosts:
    def count(self, monkeypatch):
        import peft_m2pt.attention.find_first_tokens
        import peft_m2pt.layers.attention

        shapes, finds = [], []
        record, find = peft_m2pt.layers.attention.record_prompt_kv, peft_m2pt.attention.find_first_tokens._find
        monkeypatch.setattr(
            peft_m2pt.layers.attention, "record_prompt_kv", lambda *args: shapes.append(args[3]) or record(*args)
        )
        monkeypatch.setattr(
            peft_m2pt.attention.find_first_tokens, "_find", lambda call: finds.append(call) or find(call)
        )
        return shapes, finds

    @torch.no_grad()
    def test_rows_for_each_start(self, monkeypatch):
        shapes, finds = self.count(monkeypatch)
        model = make()
        ids, mask = pad(make_ids(9, 5, 5, 9), "left")
        model(input_ids=ids, attention_mask=mask)
        assert shapes == [(2, 3)] * 2 and len(finds) == 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for inputs in ({}, {"attention_mask": mask.flip(1)}, {"attention_mask": mask, "position_ids": positions}):
            shapes.clear(), finds.clear()
            model(input_ids=ids, **inputs)
            assert shapes == [(1, 3)] * 2 and len(finds) == 1

    @torch.no_grad()
    def test_nothing_is_left(self):
        from peft_m2pt.attention.find_first_tokens import _found

        model = make()
        model(input_ids=make_ids(4)[0], use_cache=False)
        gc.collect()
        assert len(_found) == 0
