"""Rows that a cache keeps while decoding: computed once for it, of the weights of that time."""

import copy

import pytest
import torch
from helpers.models import (
    adapt,
    cache_of,
    make_config,
    make_inputs,
    make_llava,
    on_top_of,
    randomise,
    trained_by,
    without_labels,
)

import peft_m2pt.layers.attention
from peft_m2pt.layers.prompt import M2PTPrompt


def count_records(monkeypatch):
    calls = []
    record_prompt_kv = peft_m2pt.layers.attention.record_prompt_kv

    def counting(module, path, *args):
        calls.append(path)
        return record_prompt_kv(module, path, *args)

    monkeypatch.setattr(peft_m2pt.layers.attention, "record_prompt_kv", counting)
    return calls


def test_rows_are_computed_once_while_decoding(monkeypatch):
    calls = count_records(monkeypatch)
    peft_model = adapt(make_llava())
    peft_model.generate(**without_labels(make_inputs()), max_new_tokens=5, do_sample=False)
    assert len(calls) == len(set(calls)) == 3 + 3  # vision layers, layers of the language model


def train_a_step(peft_model):
    peft_model(**make_inputs()).loss.backward()
    torch.optim.SGD(trained_by(peft_model).values(), lr=1.0).step()


def scale(peft_model, part):
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if part in name:
                parameter.mul_(1.2)


def scaled_state(peft_model):
    return {name: 0.9 * value for name, value in peft_model.state_dict().items()}


CHANGES = {
    "optimiser step": train_a_step,
    "prompts in place": lambda model: scale(model, "m2pt_prompt"),
    "projections in place": lambda model: scale(model, "k_proj"),
    "connector in place": lambda model: scale(model, "m2pt_connector"),
    "norms in place": lambda model: scale(model, "norm"),
    "dtype": lambda model: model.double(),
    "dtype and back": lambda model: model.bfloat16().float(),
    "state dict": lambda model: model.load_state_dict(scaled_state(model)),
    "state dict assigned": lambda model: model.load_state_dict(scaled_state(model), assign=True),
    "data in place": lambda model: [p.data.mul_(1.2) for p in trained_by(model).values()],
    "data swapped": lambda model: [setattr(p, "data", 1.2 * p.data) for p in trained_by(model).values()],
    "train and eval": lambda model: [model.train(), scale(model, "m2pt_prompt"), model.eval()],
    "another adapter": lambda model: [
        model.add_adapter("other", make_config(num_textual_tokens=2)),
        randomise(model, seed=8),
        model.set_adapter("other"),
    ],
}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_kept_rows_are_never_out_of_date(change, context):
    inputs = without_labels(make_inputs())

    def evaluate(model):
        with context():
            prefill = model(**{**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}, use_cache=True)
            step = model(inputs["input_ids"][:, -1:], **on_top_of(cache_of(prefill)))
        return torch.cat([prefill.logits, step.logits], dim=1)

    used = adapt(make_llava())
    before = evaluate(used)
    change(used)
    unused = adapt(make_llava())
    change(unused)
    assert torch.equal(evaluate(used), evaluate(unused))
    assert not torch.equal(evaluate(used), before)


def test_rows_belong_to_a_cache():
    # A change that torch does not count, between two prompts of a single token.
    peft_model = adapt(make_llava())
    input_ids = make_inputs(images=False)["input_ids"][:, :1]
    with torch.no_grad():
        peft_model(input_ids, use_cache=True)
        for parameter in trained_by(peft_model).values():
            parameter.data.mul_(-1)
        cached = peft_model(input_ids, use_cache=True).logits
        assert torch.equal(cached, peft_model(input_ids, use_cache=False).logits)


@pytest.mark.parametrize("part", ["m2pt_prompt", "m2pt_interaction", "m2pt_connector", "k_proj", "norm"])
@torch.no_grad()
def test_weights_that_change_between_two_tokens(part):
    """The keys of tokens in a cache are of the weights from before, and so are its rows. A new cache sees new ones."""
    input_ids = make_inputs(images=False)["input_ids"]
    peft_model = adapt(make_llava())

    def fill():
        return cache_of(peft_model(input_ids, use_cache=True))

    cache = fill()
    kept = dict(cache.m2pt_cached_prompts)
    scale(peft_model, part)
    for _ in range(3):
        peft_model(input_ids[:, :1], **on_top_of(cache))
    assert all(cache.m2pt_cached_prompts[path] is prompts for path, prompts in kept.items())
    fresh = copy.deepcopy(peft_model)
    expected = fresh(input_ids[:, :1], **on_top_of(cache_of(fresh(input_ids, use_cache=True)))).logits
    assert torch.equal(peft_model(input_ids[:, :1], **on_top_of(fill())).logits, expected)


def replace_weights(peft_model):
    for module in peft_model.modules():
        if isinstance(module, M2PTPrompt):
            module.weight = torch.nn.Parameter(1.2 * module.weight.detach())


def add_again(peft_model):
    peft_model.add_adapter("other", make_config(num_textual_tokens=2))
    peft_model.set_adapter("other")
    peft_model.delete_adapter("default")
    peft_model.add_adapter("default", make_config())
    randomise(peft_model, seed=11)
    peft_model.set_adapter("default")


@pytest.mark.parametrize(
    "change",
    [
        replace_weights,
        lambda model: model.load_state_dict(scaled_state(model)),
        lambda model: model.load_state_dict(scaled_state(model), assign=True),
        add_again,
    ],
    ids=["weights", "state dict", "state dict assigned", "adapter"],
)
@torch.no_grad()
def test_weights_that_are_replaced_between_two_tokens(change):
    input_ids = make_inputs(images=False)["input_ids"]
    peft_model = adapt(make_llava())
    cache = cache_of(peft_model(input_ids, use_cache=True))
    peft_model(input_ids[:, :1], **on_top_of(cache))
    unchanged = copy.deepcopy(cache)
    before = copy.deepcopy(peft_model)(input_ids[:, :1], **on_top_of(copy.deepcopy(cache))).logits
    change(peft_model)
    logits = peft_model.eval()(input_ids[:, :1], **on_top_of(cache)).logits
    expected = copy.deepcopy(peft_model)(input_ids[:, :1], **on_top_of(unchanged)).logits
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, before)
