"""Where prompts stand: a sample gives what it gives alone, whatever stands beside it, and whoever calls what."""

import copy
import gc
import threading

import pytest
import torch
from attention_kernels import stand_ins
from families import FAMILIES
from families.checks import Tuned
from models import PAD_TOKEN, cache_of, on_top_of, randomise, trained_by
from peft import get_peft_model
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DynamicCache,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    StaticCache,
    masking_utils,
)

from peft_m2pt import M2PTConfig, UnsupportedModelError
from peft_m2pt.sight import look


TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "pad_token_id": PAD_TOKEN,
    "initializer_range": 0.2,
}
WINDOW = 4


def llama():
    return LlamaForCausalLM(LlamaConfig(**TEXT))


def mistral():
    return MistralForCausalLM(MistralConfig(**TEXT, sliding_window=WINDOW))


def qwen():
    """Positions with three axes."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 48, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=vision,
        image_token_id=98,
        video_token_id=97,
        vision_start_token_id=95,
        vision_end_token_id=96,
    )
    return Qwen2VLForConditionalGeneration(config)


MODELS = {"llama": llama, "mistral": mistral, "qwen": qwen}


def make(name="llama", attn="sdpa", **kwargs):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_attn_implementation(attn)
    tuned = get_peft_model(model, M2PTConfig(num_visual_tokens=0, num_textual_tokens=3, **kwargs))
    randomise(tuned, seed=2)
    return tuned.eval()


def make_ids(*lengths, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (1, length), generator=generator) for length in lengths]


def pad(samples, sides):
    """Samples as a batch, with padding on the left, on the right, or half on each side."""
    length = max(sample.shape[1] for sample in samples)
    rows, masks = [], []
    for sample in samples:
        missing = length - sample.shape[1]
        left = {"left": missing, "right": 0, "both": missing // 2}[sides]
        widths = (left, missing - left)
        rows.append(torch.nn.functional.pad(sample, widths, value=PAD_TOKEN))
        masks.append(torch.nn.functional.pad(torch.ones_like(sample), widths))
    return torch.cat(rows), torch.cat(masks)


def causal(mask):
    """Which keys each token sees, of shape `(batch_size, 1, length, length)`."""
    length = mask.shape[1]
    return torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, None]


def blocks_of(visible):
    """The same in the form of flex attention."""
    batch_size, _, length, _ = visible.shape
    of_samples = visible[:, 0]

    def see(batch, head, query, key):
        return of_samples[batch, query, key]

    return create_block_mask(see, batch_size, None, length, length, device="cpu", BLOCK_SIZE=(8, 8))


FORMS = {
    "2-D": lambda mask: mask,
    "2-D of floats": lambda mask: mask.float(),
    "boolean": causal,
    "additive": lambda mask: torch.zeros(()).masked_fill(~causal(mask), torch.finfo(torch.float32).min),
    "a million": lambda mask: torch.zeros(()).masked_fill(~causal(mask), -1e6),
    "padding sees all": lambda mask: causal(mask) | ~mask.bool()[:, None, :, None],
    "blocks": lambda mask: blocks_of(causal(mask)),
}


def outputs(model, **inputs):
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-4)


def assert_as_alone(call, samples, together, mask):
    for sample, output, of_sample in zip(samples, together, mask):
        assert_close(output[of_sample.bool()], outputs(call, input_ids=sample, use_cache=False)[0])


PARTS = {
    "whole model": lambda model: model,
    "body": lambda model: model.get_base_model().base_model,
    "decoder": lambda model: model.get_base_model().get_decoder(),
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


def packed_mask(lengths, padding=0):
    """Several sequences in one row, the last of which stands behind padding."""
    of_tokens = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    of_tokens = torch.cat([of_tokens[: -lengths[-1]], torch.full((padding,), -1), of_tokens[-lengths[-1] :]])
    visible = (of_tokens[:, None] == of_tokens) & (of_tokens >= 0)
    return (visible & torch.ones_like(visible).tril())[None, None]


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


OTHER_TEXT = {
    # Complex rotations. Chunks of tokens that do not see each other, and layers without rotations.
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **{**TEXT, "num_hidden_layers": 4},
            head_dim=12,
            intermediate_size_mlp=64,
            num_local_experts=2,
            num_experts_per_tok=1,
            attention_chunk_size=4,
        )
    ),
    "deepseek_v2": lambda: DeepseekV2ForCausalLM(
        DeepseekV2Config(
            **{**TEXT, "num_key_value_heads": 4},
            first_k_dense_replace=2,
            kv_lora_rank=16,
            q_lora_rank=None,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
        )
    ),
    # What is no rotation: a factor of all frequencies, which depends on the longest position.
    "yarn": lambda: LlamaForCausalLM(
        LlamaConfig(
            **TEXT,
            max_position_embeddings=64,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        )
    ),
}


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
        sight = look(causal(mask) & of_chunks, 2, 21, 0, (None, self.CHUNK), False)
        first = sight.first
        for _ in range(21):
            first = first.gather(1, first)
        assert (first[sight.counts] == 3).all()

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
            r"chunk of 4 tokens does.*Give position_ids that start at 0"
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


IDEFICS = next(family for family in FAMILIES if family.name == "idefics")


@pytest.mark.skipif(not IDEFICS.is_known, reason="the rotations of Idefics start at position 0, and it is refused")
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
        monkeypatch.setattr("peft_m2pt.layer.record_rows", None)
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
        with pytest.raises(UnsupportedModelError, match="model.layers.0.self_attn.* a cache of whose first tokens"):
            outputs(model, input_ids=samples[0][:, 6 : 6 + length], **on_cache(model, unknown))


class CachesWithoutMasks:
    """Nothing but the positions tells where samples start, also of those behind a sliding window."""

    LENGTH = 14

    def inputs(self, name, *starts):
        ids = torch.cat(make_ids(*[self.LENGTH] * len(starts)))
        positions = torch.arange(self.LENGTH) + torch.tensor(starts)[:, None]
        return ids, positions.expand(3, -1, -1) if name == "qwen" else positions

    def feed(self, model, call, cache, inputs, *places):
        """The outputs for the tokens between each two of these places."""
        ids, positions = inputs
        parts = [
            outputs(call, input_ids=ids[:, a:b], position_ids=positions[..., a:b], **on_cache(model, cache))
            for a, b in zip(places, places[1:])
        ]
        return torch.cat(parts, dim=1)

    def start(self, name, is_static, *starts):
        model, inputs = make(name), self.inputs(name, *starts)
        cache = StaticCache(config=model.config, max_cache_len=20) if is_static else DynamicCache(config=model.config)
        self.feed(model, model, cache, inputs, 0, 6)
        return model, inputs, cache

    def check_emptied(self, name, is_static, compiled):
        """A single token that is fed next is the first one."""
        ids, positions = self.inputs(name, 9, 9)
        expected = outputs(make(name), input_ids=ids, position_ids=positions, use_cache=False)
        model, inputs, cache = self.start(name, is_static, 0, 0)
        call = compiled(model)
        self.feed(model, call, cache, inputs, 6, 7, 8)
        cache.reset() if is_static else cache.crop(-8)
        assert_close(self.feed(model, call, cache, (ids, positions), 0, 1, 2, 5, 6), expected[:, :6])


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
        with pytest.raises(UnsupportedModelError, match="a cache of whose first tokens it does not know"):
            self.feed(model, model, cache, (ids[[1, 0, 1]], positions[[1, 0, 1]]), 6, 7)


def on_cache(model, cache):
    return on_top_of(cache) if cache is None else {"use_cache": True, **on_top_of(cache)}


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
        self.refuse(visible, r"a mask of shape \(2, 1, 5, 5\) that shows no token to sample 1")

    def test_nobody_is_first(self):
        visible = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
        visible[..., :2, :2] = torch.tensor([[False, True], [True, False]])
        self.refuse(visible, "in which tokens see no first one")

    def test_a_hole_as_long_as_the_window(self):
        model, mask = make("mistral"), torch.tensor([[1] * 5 + [0] * WINDOW + [1] * 3])
        with pytest.raises(UnsupportedModelError, match="a hole as long as what a token sees \\(4 tokens\\)"):
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
        model, lengths = make(), TestPacking.LENGTHS
        samples, mask = make_ids(*lengths), packed_mask(lengths)
        inputs = {"input_ids": torch.cat(samples, dim=1), "attention_mask": mask, "use_cache": False}
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        alone = torch.cat([outputs(model, input_ids=sample) for sample in samples], dim=1)
        compiled = torch.compile(model, backend="eager")
        assert_close(outputs(compiled, **inputs, position_ids=positions), alone)
        with pytest.raises(RuntimeError, match="several sequences in one row, which start at different positions"):
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


@pytest.mark.usefixtures("dynamo")
class TestCompiledCaches(CachesWithoutMasks):
    @pytest.mark.parametrize("name", ["mistral", "qwen"])
    @torch.no_grad()
    def test_samples_change_places(self, name):
        model, (ids, positions), cache = self.start(name, True, 5, 40)
        compiled, order = torch.compile(model, backend="eager"), torch.tensor([1, 0])
        self.feed(model, compiled, cache, (ids, positions), 6, 7, 8)
        cache.reorder_cache(order)
        inputs = ids[order], positions[..., order, :]
        expected = outputs(model, input_ids=inputs[0], position_ids=inputs[1], use_cache=False)
        assert_close(self.feed(model, compiled, cache, inputs, 8, 9, 10), expected[:, 8:10])

    @pytest.mark.parametrize("name", ["mistral", "qwen"])
    @torch.no_grad()
    def test_emptied(self, name):
        self.check_emptied(name, True, lambda model: torch.compile(model, backend="eager"))


class TestCosts:
    def count(self, monkeypatch):
        import peft_m2pt.layer
        import peft_m2pt.starts

        shapes, finds = [], []
        record, find = peft_m2pt.layer.record_rows, peft_m2pt.starts._find
        monkeypatch.setattr(peft_m2pt.layer, "record_rows", lambda *args: shapes.append(args[3]) or record(*args))
        monkeypatch.setattr(peft_m2pt.starts, "_find", lambda call: finds.append(call) or find(call))
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
        from peft_m2pt.starts import _found

        model = make()
        model(input_ids=make_ids(4)[0], use_cache=False)
        gc.collect()
        assert len(_found) == 0


def brute_force(visible):
    """The first token of the sequence of each token that sees one, by following each one back."""
    starts = {}
    for token, row in enumerate(visible.tolist()):
        if any(row):
            start = token
            while visible[start].tolist().index(True) < start:
                start = visible[start].tolist().index(True)
            starts[token] = start
    return starts


@pytest.mark.parametrize("seed", range(20))
def test_what_is_read_from_a_mask(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (4,), generator=generator).tolist()
    visible = torch.stack([packed_mask(lengths, padding=2)[0, 0], packed_mask([sum(lengths)], padding=2)[0, 0]])
    window = int(torch.randint(2, 9, (), generator=generator))
    numbers = torch.arange(visible.shape[-1])
    seen = visible & (numbers[:, None] - numbers < window)
    length = visible.shape[-1]
    for mask in (seen[:, None], torch.zeros(()).masked_fill(~seen, -1e4)[:, None], blocks_of(seen[:, None])):
        for in_one_go in (False, True):
            sight = look(mask, 2, length, 0, (window, None), in_one_go)
            first = sight.first
            for _ in range(length):
                first = first.gather(1, first)
            for sample in range(2):
                expected = brute_force(seen[sample])
                assert {token: int(first[sample, token]) for token in expected} == expected
                assert sight.counts[sample].nonzero().flatten().tolist() == list(expected)
