"""Switching adapters on, off and over, taking them away, and using one model from several threads."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.models import adapt, make_config, make_inputs, make_llava, randomise, trained_by, without_labels


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_disabled_adapter_gives_the_base_model(attn):
    inputs = make_inputs("left")
    expected = make_llava(attn=attn)(**inputs).logits
    peft_model = adapt(make_llava(attn=attn))
    tuned = peft_model(**inputs).logits
    with peft_model.disable_adapter():
        assert torch.equal(peft_model(**inputs).logits, expected)
    assert torch.equal(peft_model(**inputs).logits, tuned)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_unload_gives_the_base_model_back(attn):
    inputs = make_inputs("left")
    model = make_llava(attn=attn)
    expected = model(**inputs).logits
    modules = dict(model.named_modules())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    peft_model = adapt(model)
    peft_model(**inputs)
    unloaded = peft_model.unload()
    assert unloaded is model
    assert dict(unloaded.named_modules()).keys() == modules.keys()
    assert all(module is modules[name] for name, module in unloaded.named_modules())
    assert unloaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in unloaded.state_dict().items())
    assert torch.equal(unloaded(**inputs).logits, expected)
    # Nothing is left that would hinder another adapter.
    assert torch.equal(adapt(unloaded)(**inputs).logits, adapt(make_llava(attn=attn))(**inputs).logits)


@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_with_the_reason(call):
    inputs = make_inputs()
    peft_model = adapt(make_llava())
    expected = peft_model(**inputs).logits
    with pytest.raises(NotImplementedError, match=r"cannot be merged into the base weights: .* `unload\(\)`"):
        getattr(peft_model, call)()
    assert torch.equal(peft_model(**inputs).logits, expected)


def test_second_adapter_with_other_counts_and_layers():
    inputs = make_inputs()
    other = {"num_visual_tokens": 2, "num_textual_tokens": 5, "visual_layers": "odd", "textual_layers": [0]}
    first = adapt(make_llava())(**inputs).logits
    second = adapt(make_llava(), **other)(**inputs).logits

    peft_model = adapt(make_llava())
    peft_model.add_adapter("other", make_config(**other))
    prompts = {name.replace(".default.", ".other."): p for name, p in trained_by(adapt(make_llava(), **other)).items()}
    with torch.no_grad():
        for name, prompt in prompts.items():
            trained_by(peft_model)[name].copy_(prompt)
    assert torch.equal(peft_model(**inputs).logits, first)
    peft_model.set_adapter("other")
    torch.testing.assert_close(peft_model(**inputs).logits, second)
    assert {name for name, p in peft_model.named_parameters() if p.requires_grad} == prompts.keys()
    peft_model.delete_adapter("other")
    peft_model.set_adapter("default")
    assert torch.equal(peft_model(**inputs).logits, first)


def test_threads_do_not_see_each_other():
    peft_model = adapt(make_llava())
    batches = [without_labels(make_inputs(seed=seed)) for seed in range(8)]

    def run(inputs):
        with torch.no_grad():
            return peft_model(**inputs).logits

    with torch.no_grad():
        expected = [run(inputs) for inputs in batches]
    with ThreadPoolExecutor(max_workers=4) as pool:
        for _ in range(5):
            randomise(peft_model, seed=2)  # makes every thread compute the rows of the prompts anew
            for output, logits in zip(pool.map(run, batches), expected):
                assert torch.equal(output, logits)


def test_threads_train_at_once():
    models = [adapt(make_llava()) for _ in range(4)]

    def step(peft_model):
        peft_model(**make_inputs()).loss.backward()
        return {name: prompt.grad for name, prompt in trained_by(peft_model).items()}

    expected = step(adapt(make_llava()))
    with ThreadPoolExecutor(max_workers=4) as pool:
        for gradients in pool.map(step, models):
            assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(duplicate):
    inputs = make_inputs()
    peft_model = adapt(make_llava())
    twin = duplicate(peft_model)
    expected = peft_model(**inputs).logits
    assert torch.equal(twin(**inputs).logits, expected)
    randomise(twin, seed=5)
    for parameter in twin.get_base_model().parameters():
        parameter.data.mul_(1.1)
    assert torch.equal(peft_model(**inputs).logits, expected)
