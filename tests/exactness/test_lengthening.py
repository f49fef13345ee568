"""The package against M2PT computed the long way, in float32."""

import functools

import pytest
import torch
from helpers.lengthening import run_lengthened
from helpers.models import NUM_PATCHES, adapt, make_inputs, make_llava, trained_by


TOLERANCE = 1e-5


class Counterpart:
    """Copies of all that an adapter trains, as leaves of a graph of their own, arranged for the long way."""

    def __init__(self, peft_model):
        self.leaves = {
            name: parameter.detach().clone().requires_grad_() for name, parameter in trained_by(peft_model).items()
        }

    def find(self, *parts):
        return next((leaf for name, leaf in self.leaves.items() if all(part in name for part in parts)), None)

    def connector(self, projector, features):
        for linear, activate in (("linear_1", projector.act), ("linear_2", lambda x: x)):
            frozen = getattr(projector, linear)
            weight, bias = frozen.weight, frozen.bias
            if (copied := self.find(f"m2pt_connector_{linear}.", "weight")) is not None:
                weight, bias = copied, self.find(f"m2pt_connector_{linear}.", "bias")
            elif (down := self.find(f"m2pt_connector_{linear}_lora_A")) is not None:
                weight = weight + self.find(f"m2pt_connector_{linear}_lora_B") @ down
            features = activate(features @ weight.T + bias)
        return features

    def run(self, model, **inputs):
        connector = functools.partial(self.connector, model.model.multi_modal_projector)
        visual, textual = {}, {}
        for layer in range(4):
            if (prompt := self.find(f"vision_tower.encoder.layers.{layer}.")) is not None:
                visual[layer] = prompt
            rows = []
            if (prompt := self.find(f"language_model.layers.{layer}.", "m2pt_prompt")) is not None:
                rows.append(prompt)
            if (prompt := self.find(f"language_model.layers.{layer}.", "m2pt_interaction")) is not None:
                rows.append(connector(prompt))
            if rows:
                textual[layer] = torch.cat(rows)
        image_prompts = self.find("multi_modal_projector.m2pt_interaction")
        return run_lengthened(model, visual, textual, **inputs, image_prompts=image_prompts, connector=connector)


def compare(inputs, vision, text, attn, **kwargs):
    peft_model = adapt(make_llava(vision, text, attn), **kwargs)
    counterpart = Counterpart(peft_model)
    expected = counterpart.run(make_llava(vision, text, "eager"), **inputs)
    output = peft_model(**inputs)

    # Rows of padding are nobody's business: with left padding they see no token at all.
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    torch.testing.assert_close(output.logits[real], expected.logits[real], atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(output.loss, expected.loss, atol=TOLERANCE, rtol=TOLERANCE)

    output.loss.backward()
    expected.loss.backward()
    for name, parameter in trained_by(peft_model).items():
        reference = counterpart.leaves[name].grad
        if "vision_tower" in name and "pixel_values" not in inputs:
            assert parameter.grad is None and reference is None
            continue
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(
            parameter.grad, reference, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )
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
        {"num_interaction_tokens": 0},
        {"num_interaction_tokens": 0, "tune_connector": False},
        {"tune_connector": False},
        {"connector_rank": 2},
        {"num_visual_tokens": 1, "num_textual_tokens": 1},
        {"visual_layers": [0, -1], "textual_layers": [1]},
        {"visual_layers": "odd", "textual_layers": "top_half"},
        {"exclude_modules": r".*vision_tower.*layers\.1\.self_attn"},
    ],
    ids=str,
)
def test_equals_lengthening_with_prompts_in_some_places(config):
    compare(make_inputs("right"), "clip", "llama", "sdpa", **config)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["left", "right", "no mask"])
@pytest.mark.parametrize(
    "config", [{}, {"tune_connector": False}, {"connector_rank": 3}, {"num_textual_tokens": 0}], ids=str
)
def test_equals_lengthening_with_interaction_prompts_as_image_tokens(config, padding, attn):
    inputs = make_inputs(padding, num_image_tokens=NUM_PATCHES + 2)
    compare(inputs, "clip", "llama", attn, interaction_placement="image", **config)


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
    output = peft_model(**inputs)
    # The long way has n more positions, but the frequencies must be those of the tokens' positions alone.
    rotary = make().model.language_model.rotary_emb
    rotary(torch.zeros(1), torch.arange(inputs["input_ids"].shape[1])[None])
    fixed = make_llava(attn="eager")
    assert not torch.allclose(fixed.model.language_model.rotary_emb.inv_freq, rotary.inv_freq)
    fixed.model.language_model.rotary_emb.inv_freq.copy_(rotary.inv_freq)
    expected = Counterpart(peft_model).run(fixed, **inputs)
    torch.testing.assert_close(output.logits, expected.logits, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("part", ["vision_tower", "m2pt_prompt", "m2pt_interaction", "m2pt_connector"])
def test_each_part_changes_the_output(part):
    # The other tests would mean little if the prompts did not matter.
    inputs = make_inputs()
    peft_model = adapt(make_llava())
    before = peft_model(**inputs).logits
    with torch.no_grad():
        for name, parameter in trained_by(peft_model).items():
            if part in name:
                parameter.mul_(-1)
    assert (peft_model(**inputs).logits - before).abs().max() > 1e-2
