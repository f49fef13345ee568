"""Nothing outside of the attention modules sees prompts: outputs and caches keep the lengths of the base model."""

import pytest
import torch
from helpers.models import (
    IMAGE_TOKEN,
    adapt,
    cache_of,
    image_features_of,
    make_inputs,
    make_llava,
    on_top_of,
    without_labels,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


NUM_TEXTUAL, NUM_VISUAL = 3 + 2, 4


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_outputs_have_the_shapes_of_the_base_model(attn):
    inputs = make_inputs("left")
    arguments = {"output_hidden_states": True, "output_attentions": attn == "eager"}
    base = make_llava(attn=attn)(**inputs, **arguments)
    ours = adapt(make_llava(attn=attn))(**inputs, **arguments)
    assert ours.logits.shape == base.logits.shape
    assert image_features_of(ours).shape == image_features_of(base).shape
    assert [state.shape for state in ours.hidden_states] == [state.shape for state in base.hidden_states]
    assert cache_of(ours).get_seq_length() == cache_of(base).get_seq_length()
    if attn == "eager":
        assert len(ours.attentions) == len(base.attentions) == 3
        for with_prompts, without in zip(ours.attentions, base.attentions):
            assert with_prompts.shape == without.shape
            # What is missing to 1 is what each token gives to the prompts.
            assert (with_prompts.sum(-1) < without.sum(-1)).all()


def test_attentions_of_the_vision_encoder():
    model = make_llava(attn="eager")
    pixel_values = make_inputs()["pixel_values"]
    adapt(model)
    attentions = model.model.vision_tower(pixel_values, output_attentions=True).attentions
    assert [attention.shape[-1] for attention in attentions] == [5] * 4


def test_no_entry_twice_when_hooks_were_there_before():
    model = make_llava(attn="eager")
    inputs = make_inputs()
    model(**inputs, output_attentions=True)
    assert len(adapt(model)(**inputs, output_attentions=True).attentions) == 3


GENERATION = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "beam search": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "repetition penalty": {"repetition_penalty": 1.3},
}


def generate(peft_model, inputs, **kwargs):
    torch.manual_seed(3)
    inputs = without_labels(inputs)
    # A generated image token would ask for an image.
    kwargs = {
        "do_sample": False,
        "eos_token_id": None,
        "max_new_tokens": 6,
        "suppress_tokens": [IMAGE_TOKEN],
        **kwargs,
    }
    return peft_model.generate(**inputs, **kwargs)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_generation_with_a_cache_equals_generation_without(options, attn):
    peft_model = adapt(make_llava(text="mistral", attn=attn))
    inputs = make_inputs("left")
    without = generate(peft_model, inputs, use_cache=False, **{**options, "cache_implementation": None})
    assert torch.equal(generate(peft_model, inputs, **options), without)


def test_prefill_in_chunks():
    peft_model = adapt(make_llava())
    inputs = make_inputs(images=False)
    assert torch.equal(generate(peft_model, inputs, prefill_chunk_size=5), generate(peft_model, inputs))


def test_assisted_generation():
    # The candidates are checked several at a time, on top of a cache that is cut back where they are wrong.
    peft_model = adapt(make_llava())
    inputs = {name: value[:1] for name, value in make_inputs().items()}
    options = {"max_new_tokens": 12, "eos_token_id": 2}
    expected = generate(peft_model, inputs, **options)
    assert torch.equal(generate(peft_model, inputs, **options, prompt_lookup_num_tokens=3), expected)


def test_greedy_generation_equals_teacher_forcing():
    peft_model = adapt(make_llava())
    inputs = make_inputs("left")
    sequences = generate(peft_model, inputs)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 6, dtype=torch.long)], dim=1)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    logits = peft_model(
        input_ids=sequences, attention_mask=mask, position_ids=position_ids, pixel_values=inputs["pixel_values"]
    ).logits
    logits[..., IMAGE_TOKEN] = -float("inf")
    assert torch.equal(logits[:, 13:-1].argmax(-1), sequences[:, 14:])


def test_generation_from_embeddings():
    peft_model = adapt(make_llava())
    inputs = without_labels(make_inputs(images=False))
    tokens = generate(peft_model, inputs)[:, 14:]
    embeddings = peft_model.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(peft_model(inputs_embeds=embeddings).logits, peft_model(inputs["input_ids"]).logits)
    generated = generate(peft_model, {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]})
    assert torch.equal(generated, tokens)


def test_a_padded_sample_equals_the_sample_alone():
    peft_model = adapt(make_llava())
    inputs = make_inputs("left")
    together = generate(peft_model, inputs)[1, 14:]
    alone = {
        "input_ids": inputs["input_ids"][1:, 4:],
        "attention_mask": inputs["attention_mask"][1:, 4:],
        "pixel_values": inputs["pixel_values"][1:],
    }
    assert torch.equal(generate(peft_model, alone)[0, 10:], together)


def test_a_prompt_in_several_turns():
    # Prefill on top of a cache: more keys than queries, and more than one query.
    peft_model = adapt(make_llava())
    input_ids = make_inputs(images=False)["input_ids"]
    with torch.no_grad():
        whole = peft_model(input_ids=input_ids).logits
        first = peft_model(input_ids=input_ids[:, :9], use_cache=True)
        rest = peft_model(input_ids=input_ids[:, 9:], **on_top_of(cache_of(first)))
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole, atol=1e-5, rtol=1e-5)


def my_attention(module, query, key, value, attention_mask, **kwargs):
    return query, None


class MyAttention(torch.nn.Module):
    def forward(self, query):
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("eager", my_attention)
        return attend(self, query, query, query, None)


def test_eager_functions_of_other_names_are_not_touched():
    adapt(make_llava(attn="eager"))(**make_inputs())
    query = torch.ones(1, 1, 2, 2)
    assert MyAttention()(query)[0] is query


def test_other_models_are_not_touched():
    inputs = make_inputs("left")
    expected = {attn: make_llava(attn=attn)(**inputs).logits for attn in ("eager", "sdpa")}
    for attn, logits in expected.items():
        adapt(make_llava(attn=attn))(**inputs)
        assert torch.equal(make_llava(attn=attn)(**inputs).logits, logits)


@pytest.mark.parametrize("exclude", [[], ["model.language_model.layers.0.self_attn"]])
@torch.no_grad()
def test_padding_on_the_left_is_nothing(exclude):
    """Also if nobody says where the tokens stand, whichever layers have prompts."""
    peft_model = adapt(make_llava(), exclude_modules=exclude)
    inputs = without_labels(make_inputs("left"))
    together = peft_model(**inputs).logits
    by_position = peft_model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], None).logits
    assert torch.equal(together, by_position)
    start = int((inputs["attention_mask"][1] == 0).sum())
    alone = peft_model(input_ids=inputs["input_ids"][1:, start:], pixel_values=inputs["pixel_values"][1:]).logits
    torch.testing.assert_close(together[1, start:], alone[0], atol=2e-5, rtol=1e-4)
