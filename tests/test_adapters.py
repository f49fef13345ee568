"""Switching adapters on, off and over, taking them away, and using one model from several threads."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import (
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
from transformers import Cache

import peft_m2pt.layer
from peft_m2pt import M2PTAttention
from peft_m2pt.adapted import layer_of
from peft_m2pt.prompt import M2PTPrompt


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


def count_records(monkeypatch):
    calls = []
    record_rows = peft_m2pt.layer.record_rows

    def counting(module, path, *args):
        calls.append(path)
        return record_rows(module, path, *args)

    monkeypatch.setattr(peft_m2pt.layer, "record_rows", counting)
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


def test_kept_rows_are_not_copied():
    peft_model = adapt(make_llava())
    attention = peft_model.get_base_model().model.language_model.layers[0].self_attn
    layer = layer_of(attention)
    past = {}

    def remember(module, args, kwargs):
        # Rows are kept for as long as their cache.
        past["cache"] = next(value for value in kwargs.values() if isinstance(value, Cache))

    layer.register_forward_pre_hook(remember, with_kwargs=True)
    peft_model.generate(**without_labels(make_inputs()), max_new_tokens=2)
    assert layer._kept.cache() is past["cache"]
    assert layer_of(copy.deepcopy(attention))._kept is None and layer.__getstate__()["_kept"] is None


@pytest.mark.parametrize("part", ["m2pt_prompt", "m2pt_interaction", "m2pt_connector", "k_proj", "norm"])
def test_weights_that_change_between_two_tokens(part):
    input_ids = make_inputs(images=False)["input_ids"]

    def run(change_after):
        peft_model = adapt(make_llava())
        with torch.no_grad():
            cache = cache_of(peft_model(input_ids, use_cache=True))
            for step in range(3):
                if step == change_after:
                    scale(peft_model, part)
                if step == 2:
                    # The same step from the same cache, but with nothing kept.
                    fresh = copy.deepcopy(peft_model)
                    for module in fresh.modules():
                        if isinstance(module, M2PTAttention):
                            module._kept = None
                    expected = fresh(input_ids[:, :1], **on_top_of(copy.deepcopy(cache))).logits
                logits = peft_model(input_ids[:, :1], **on_top_of(cache)).logits
        assert torch.equal(logits, expected)
        return logits

    assert not torch.equal(run(change_after=2), run(change_after=None))


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
        lambda model: model.load_state_dict(scaled_state(model), assign=True),
        lambda model: [setattr(p, "data", 1.2 * p.data) for p in trained_by(model).values()],
        add_again,
    ],
    ids=["weights", "state dict", "data", "adapter"],
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
