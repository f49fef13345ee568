"""How new prompts are initialised."""

import math

import pytest
import torch
from helpers.models import IMAGE_TOKEN, PAD_TOKEN, TEXT, make_config, make_llava, trained_by
from peft import get_peft_model
from transformers import LlamaConfig

from peft_m2pt import M2PTConfig


def prompts(**kwargs):
    kwargs = {"init_prompts": "xavier_uniform", **kwargs}
    config = M2PTConfig(num_visual_tokens=40, num_textual_tokens=50, num_interaction_tokens=30, **kwargs)
    peft_model = get_peft_model(make_llava(), config)
    groups = {"visual": [], "textual": [], "interaction": []}
    for name, prompt in trained_by(peft_model).items():
        if "m2pt_prompt" in name:
            groups["visual" if "vision_tower" in name else "textual"].append(prompt.detach())
        elif "m2pt_interaction" in name:
            groups["interaction"].append(prompt.detach())
    return peft_model, groups


def test_xavier_uniform_on_the_shape_of_the_paper():
    _, groups = prompts()
    for kind, n, width in (("visual", 40, 32), ("textual", 50, 48), ("interaction", 30, 32)):
        values = torch.stack(groups[kind])
        bound = math.sqrt(6 / ((n + 1) * width))
        assert 0.99 * bound < values.abs().max() <= bound
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_normal():
    _, groups = prompts(init_prompts="normal", init_std=0.3)
    for group in groups.values():
        assert torch.stack(group).std().item() == pytest.approx(0.3, rel=0.05)


def test_vocabulary(monkeypatch):
    # Two ends of sequence, as some models have them.
    monkeypatch.setitem(TEXT, "llama", lambda **kwargs: LlamaConfig(**{**kwargs, "eos_token_id": [2, 7]}))
    peft_model, groups = prompts(init_prompts="vocabulary")
    embeddings = peft_model.get_input_embeddings().weight
    for prompt in groups["textual"]:
        distance = torch.cdist(prompt, embeddings)
        tokens = distance.argmin(1)
        assert torch.equal(prompt, embeddings[tokens])
        assert not set(tokens.tolist()) & {PAD_TOKEN, 1, 2, 7, IMAGE_TOKEN}
        assert len(set(tokens.tolist())) > 20
    bound = math.sqrt(6 / (41 * 32))
    assert torch.stack(groups["visual"]).abs().max() <= bound


@pytest.mark.parametrize("init_prompts", ["states", "xavier_uniform", "normal", "vocabulary"])
def test_models_without_data(init_prompts):
    peft_model = get_peft_model(make_llava().to("meta"), make_config(init_prompts=init_prompts))
    assert all(parameter.is_meta for parameter in trained_by(peft_model).values())


@pytest.mark.parametrize("rank", [None, 2])
def test_a_new_connector_computes_what_the_old_one_does(rank):
    peft_model, _ = prompts(connector_rank=rank)
    connector = peft_model.get_base_model().model.multi_modal_projector
    features = torch.randn(2, 5, 32)
    torch.testing.assert_close(connector(features), make_llava().model.multi_modal_projector(features))


def test_layers_differ_and_seeds_repeat():
    torch.manual_seed(7)
    _, first = prompts()
    torch.manual_seed(7)
    _, second = prompts()
    for kind in ("visual", "textual", "interaction"):
        assert all(torch.equal(a, b) for a, b in zip(first[kind], second[kind]))
        assert not torch.equal(first[kind][0], first[kind][1])
