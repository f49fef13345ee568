"""The package against numbers of the official implementation."""

import pytest
import torch
from peft import get_peft_model
from reference import GRADIENTS, LOGITS, LOSS, STATES, load_case, make_model

from peft_m2pt import M2PTAttention, M2PTConfig


def set_prompts(peft_model, case):
    """Puts the prompts of a case into a model that has none behind its last live layer."""
    layers = {"visual": case.visual_prompts(), "textual": case.textual_prompts()}
    with torch.no_grad():
        for module in peft_model.modules():
            if isinstance(module, M2PTAttention):
                module.m2pt_prompt["default"].weight.copy_(layers[module.site.kind][module.site.layer])


def adapted(case, attn="sdpa"):
    config = M2PTConfig(
        num_visual_tokens=case.facts["n_visual_prompts"], num_textual_tokens=case.facts["n_text_prompts"]
    )
    peft_model = get_peft_model(make_model(case, attn), config)
    set_prompts(peft_model, case)
    return peft_model


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_textual_prompts(attn):
    case = load_case("v0_t10")
    peft_model = adapted(case, attn)
    inputs = case.inputs
    output = peft_model(**inputs)
    real = inputs["attention_mask"].bool()
    expected = case["logits"][:, case.facts["n_text_prompts"] :]
    torch.testing.assert_close(output.logits[real], expected[real], atol=LOGITS, rtol=0)
    torch.testing.assert_close(output.loss[None], case["loss"], atol=LOSS, rtol=0)

    output.loss.backward()
    gradients = case.textual_prompts("grads")
    for module in peft_model.modules():
        if isinstance(module, M2PTAttention):
            expected = gradients[module.site.layer]
            gradient = module.m2pt_prompt["default"].weight.grad
            torch.testing.assert_close(gradient, expected, atol=GRADIENTS * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_greedy_decoding(attn):
    case = load_case("v0_t10")
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


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["v10_t10", "v4_t3"])
def test_visual_prompts(name, attn):
    case = load_case(name)
    tower = adapted(case, attn).get_base_model().model.vision_tower
    states = tower(case["inputs.pixel_values"], output_hidden_states=True).hidden_states
    # The last layer is behind the feature layer: it has no prompts here, and its output is read by nobody.
    for i, state in enumerate(states[:-1]):
        expected = case[f"vision.hidden_states.{i}"][:, case.facts["n_visual_prompts"] :]
        torch.testing.assert_close(state, expected, atol=STATES, rtol=0)
    assert len(states) == case.facts["clip_vision"]["num_hidden_layers"] + 1
