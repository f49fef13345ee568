"""The package against numbers of the official implementation."""

import pytest
import torch
from helpers.models import image_features_of
from helpers.reference import GRADIENTS, IMAGE_FEATURES, LOGITS, LOSS, STATES, load_case, make_model
from peft import get_peft_model

from peft_m2pt import M2PTAttention, M2PTConfig


CASES = ["v0_t10", "v10_t10", "v4_t3"]
IMPLEMENTATIONS = ["eager", "sdpa"]


def trained(peft_model, case, prefix):
    """Pairs each trained weight with the official tensor that it stands for."""
    pairs = {}
    layers = {"visual": case.visual_prompts(prefix), "textual": case.textual_prompts(prefix)}
    for module in peft_model.modules():
        if isinstance(module, M2PTAttention):
            official = layers[module.site.kind][module.site.layer]
            pairs[module.site.path] = module.m2pt_prompt["default"].weight, official
    connector = peft_model.get_base_model().model.multi_modal_projector
    if "default" in connector.m2pt_interaction:
        # The prompts of the last vision layer are image tokens, but for the first of them.
        pairs["interaction"] = connector.m2pt_interaction["default"].weight, layers["visual"][-1][1:]
    for name in ("weight", "bias"):
        weight = getattr(connector.m2pt_connector_linear_1["default"], name)
        pairs[f"connector {name}"] = weight, case[f"{prefix}.model.mm_projector.{name}"]
    return pairs


def adapted(case, attn="sdpa"):
    config = M2PTConfig.paper(case.facts["n_visual_prompts"], case.facts["n_text_prompts"])
    peft_model = get_peft_model(make_model(case, attn), config)
    with torch.no_grad():
        for weight, official in trained(peft_model, case, "weights").values():
            weight.copy_(official)
    return peft_model


@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name, attn):
    case = load_case(name)
    peft_model = adapted(case, attn)
    inputs = case.inputs
    output = peft_model(**inputs)
    features = image_features_of(output).reshape(case["image_features"].shape)
    torch.testing.assert_close(features, case["image_features"], atol=IMAGE_FEATURES, rtol=0)
    real = inputs["attention_mask"].bool()
    expected = case["logits"][:, case.facts["n_text_prompts"] :]
    torch.testing.assert_close(output.logits[real], expected[real], atol=LOGITS, rtol=0)
    torch.testing.assert_close(output.loss[None], case["loss"], atol=LOSS, rtol=0)

    output.loss.backward()
    for part, (weight, official) in trained(peft_model, case, "grads").items():
        bound = GRADIENTS * official.abs().max().item()
        torch.testing.assert_close(weight.grad, official, atol=bound, rtol=0, msg=lambda text, p=part: f"{p}: {text}")


@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_greedy_decoding(name, attn):
    case = load_case(name)
    inputs = case.greedy_inputs
    output = adapted(case, attn).generate(
        **inputs,
        do_sample=False,
        max_new_tokens=8,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert output.sequences[0, inputs["input_ids"].shape[1] :].tolist() == case["greedy.tokens"].tolist()
    torch.testing.assert_close(torch.cat(output.logits), case["greedy.logits"], atol=LOGITS, rtol=0)


@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["v10_t10", "v4_t3"])
def test_vision_states(name, attn):
    case = load_case(name)
    tower = adapted(case, attn).get_base_model().model.vision_tower
    states = tower(case["inputs.pixel_values"], output_hidden_states=True).hidden_states
    # The last layer is behind the feature layer: it has no prompts here, and its output is read by nobody.
    for i, state in enumerate(states[:-1]):
        expected = case[f"vision.hidden_states.{i}"][:, case.facts["n_visual_prompts"] :]
        torch.testing.assert_close(state, expected, atol=STATES, rtol=0)
    assert len(states) == case.facts["clip_vision"]["num_hidden_layers"] + 1


@pytest.mark.parametrize("num_visual, num_interaction", [(20, 19), (4, 3), (1, 0), (0, 0)])
def test_paper(num_visual, num_interaction):
    config = M2PTConfig.paper(num_visual)
    assert config.num_visual_tokens == num_visual
    assert config.num_textual_tokens == 10
    assert config.num_interaction_tokens == num_interaction
    assert config.interaction_placement == "image"
    assert config.tune_connector and config.connector_rank is None
    assert config.init_prompts == "xavier_uniform"
    assert M2PTConfig.paper(num_visual, 5, init_prompts="normal").init_prompts == "normal"


def test_paper_with_bad_values():
    with pytest.raises(ValueError, match="num_visual_tokens='3' is not an integer"):
        M2PTConfig.paper("3")
