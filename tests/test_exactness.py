"""The package against M2PT computed the long way, in float32."""

import pytest
import torch
from lengthening import run_lengthened
from models import adapt, make_inputs, make_llava, prompts_of

from peft_m2pt import M2PTAttention


TOLERANCE = 1e-5


def prompts_by_layer(peft_model, kind):
    """Copies of the prompts, as leaves of a graph of their own."""
    return {
        module.site.layer: module.m2pt_prompt["default"].weight.detach().clone().requires_grad_()
        for module in peft_model.modules()
        if isinstance(module, M2PTAttention) and module.site.kind == kind
    }


def compare(inputs, vision, text, attn, **kwargs):
    peft_model = adapt(make_llava(vision, text, attn), **kwargs)
    visual, textual = (prompts_by_layer(peft_model, kind) for kind in ("visual", "textual"))
    expected = run_lengthened(make_llava(vision, text, "eager"), visual, textual, **inputs)
    output = peft_model(**inputs)

    # Rows of padding are nobody's business: with left padding they see no token at all.
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    torch.testing.assert_close(output.logits[real], expected.logits[real], atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(output.loss, expected.loss, atol=TOLERANCE, rtol=TOLERANCE)

    output.loss.backward()
    expected.loss.backward()
    images = "pixel_values" in inputs
    for module in peft_model.modules():
        if not isinstance(module, M2PTAttention):
            continue
        gradient = module.m2pt_prompt["default"].weight.grad
        reference = (visual if module.site.kind == "visual" else textual)[module.site.layer].grad
        if module.site.kind == "visual" and not images:
            assert gradient is None and reference is None
            continue
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, reference, atol=TOLERANCE, rtol=TOLERANCE)
    return peft_model


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("images", [True, False], ids=["images", "no images"])
@pytest.mark.parametrize("padding", ["none", "left", "right", "no mask"])
def test_equals_lengthening(padding, images, attn):
    compare(make_inputs(padding, images), "clip", "llama", attn)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_equals_lengthening_in_other_families(vision, text, attn):
    for padding in ("left", "no mask"):
        compare(make_inputs(padding), vision, text, attn)


@pytest.mark.parametrize(
    "config",
    [
        {"num_visual_tokens": 0},
        {"num_textual_tokens": 0},
        {"num_visual_tokens": 1, "num_textual_tokens": 1},
        {"visual_layers": [0, -1], "textual_layers": [1]},
        {"visual_layers": "odd", "textual_layers": "top_half"},
        {"exclude_modules": r".*vision_tower.*layers\.1\.self_attn"},
    ],
    ids=str,
)
def test_equals_lengthening_with_prompts_in_some_places(config):
    compare(make_inputs("right"), "clip", "llama", "sdpa", **config)


def test_positions_are_those_of_the_model():
    # Position ids with an offset, as `generate` computes them for left padding: prompts stay in front of position 0.
    peft_model = adapt(make_llava())
    inputs = make_inputs("left")
    del inputs["labels"]
    position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    batch = peft_model(**inputs, position_ids=position_ids).logits[1, 4:]
    alone = peft_model(input_ids=inputs["input_ids"][1:, 4:], pixel_values=inputs["pixel_values"][1:]).logits[0]
    torch.testing.assert_close(batch, alone, atol=TOLERANCE, rtol=TOLERANCE)


def test_frequencies_of_dynamic_rotaries_are_those_of_the_tokens():
    # "dynamic" scales the frequencies once a sequence is longer than `original_max_position_embeddings`: the prompts
    # must not set them back.
    def make():
        model = make_llava(attn="eager")
        config = model.config.text_config
        config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
        config.max_position_embeddings = 8
        model.model.language_model.rotary_emb = type(model.model.language_model.rotary_emb)(config)
        return model

    inputs = make_inputs("none")
    peft_model = adapt(make())
    base = make()
    textual = prompts_by_layer(peft_model, "textual")
    inputs.pop("labels")
    rotary = base.model.language_model.rotary_emb
    # The long way has n more positions; the frequencies must be those of the tokens' positions alone.
    rotary(torch.zeros(1), torch.arange(inputs["input_ids"].shape[1])[None])
    frequencies = rotary.inv_freq.clone()
    fixed = make_llava(attn="eager")
    fixed.model.language_model.rotary_emb.inv_freq.copy_(frequencies)
    expected = run_lengthened(fixed, prompts_by_layer(peft_model, "visual"), textual, **inputs)
    torch.testing.assert_close(peft_model(**inputs).logits, expected.logits, atol=TOLERANCE, rtol=TOLERANCE)


def test_prompts_change_the_output():
    # The other tests would mean little if the prompts did not matter.
    inputs = make_inputs()
    base = make_llava()(**inputs).logits
    for config in ({"num_visual_tokens": 0}, {"num_textual_tokens": 0}):
        assert (adapt(make_llava(), **config)(**inputs).logits - base).abs().max() > 1e-2
    assert len(prompts_of(adapt(make_llava()))) == 3 + 3
