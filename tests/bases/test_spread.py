"""Models whose parts are on several devices: what is handed from one to another travels."""

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers.devices import several_devices
from helpers.models import adapt, make_config, make_inputs, make_llava, randomise, trained_by, without_labels
from peft import LoraConfig, PeftModel, get_peft_model

from peft_m2pt import M2PTConfig


FIRST, SECOND, THIRD = "lazy:1", "lazy:2", "lazy:3"
PLACES = {
    "model.vision_tower": FIRST,
    "model.multi_modal_projector": FIRST,
    "model.language_model.embed_tokens": FIRST,
    "model.language_model.rotary_emb": FIRST,
    "model.language_model.layers.0": FIRST,
    "model.language_model.layers.1": SECOND,
    "model.language_model.layers.2": THIRD,
    "model.language_model.norm": THIRD,
    "lm_head": THIRD,
}
SPLIT_CONNECTOR = {
    **{path: device for path, device in PLACES.items() if path != "model.multi_modal_projector"},
    "model.multi_modal_projector.linear_1": FIRST,
    "model.multi_modal_projector.act": SECOND,
    "model.multi_modal_projector.linear_2": THIRD,
}


def with_hooks_on_blocks(model):
    """As a device map of somebody's own: the inputs of each block are brought to it, and to nothing inside of it."""
    for path, device in PLACES.items():
        part = model.get_submodule(path).to(device)
        add_hook_to_module(part, AlignDevicesHook(torch.device(device), skip_keys="past_key_values"))
    return add_hook_to_module(model, AlignDevicesHook(io_same_device=True))


SPREAD = {
    "hooks everywhere": lambda model: dispatch_model(model, PLACES),
    "hooks on blocks": with_hooks_on_blocks,
    "connector in between": lambda model: dispatch_model(model, {**PLACES, "model.multi_modal_projector": SECOND}),
    "connector split": lambda model: dispatch_model(model, SPLIT_CONNECTOR),
    "connector fetched": lambda model: dispatch_model(
        model, {**PLACES, "model.multi_modal_projector": "cpu"}, main_device=FIRST
    ),
}
ADAPTERS = {
    "copy": {},
    "low rank": {"connector_rank": 4},
    "frozen connector": {"tune_connector": False},
    "image": {"interaction_placement": "image"},
}


@pytest.fixture(autouse=True)
def devices():
    with several_devices():
        yield


def spread(how="hooks everywhere"):
    return SPREAD[how](make_llava())


def inputs_for(kwargs):
    return make_inputs("left", num_image_tokens=6 if kwargs.get("interaction_placement") == "image" else 4)


def assert_close(actual, expected):
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-4, rtol=1e-4)


def assert_same(model, expected, inputs):
    """The same logits and gradients."""
    outputs, expected_outputs = model(**inputs), expected(**inputs)
    assert_close(outputs.logits, expected_outputs.logits)
    outputs.loss.backward()
    expected_outputs.loss.backward()
    for (name, weight), other in zip(trained_by(model).items(), trained_by(expected).values()):
        if other.requires_grad:
            torch.testing.assert_close(weight.grad.cpu(), other.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "how, kwargs",
    [
        pytest.param(how, kwargs, id=f"{how}, {name}")
        for how in SPREAD
        for name, kwargs in ADAPTERS.items()
        if how == "hooks on blocks" or name in ("copy", "low rank")
    ],
)
def test_a_model_that_is_spread(how, kwargs):
    inputs = inputs_for(kwargs)
    expected, model = adapt(make_llava(), **kwargs), adapt(spread(how), **kwargs)
    assert_same(model, expected, inputs)
    arguments = {**without_labels(inputs), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**arguments), expected.generate(**arguments))
    with model.disable_adapter():
        assert_close(model(**make_inputs()).logits, make_llava()(**make_inputs()).logits)
    assert_close(model.unload()(**make_inputs()).logits, make_llava()(**make_inputs()).logits)


def test_where_prompts_are():
    """Those of a layer are beside it, and those that go through the connector first are beside that."""
    model = adapt(spread("connector in between"))
    for name, weight in trained_by(model).items():
        _, _, path = name.partition("base_model.model.")
        device = next((device for part, device in PLACES.items() if path.startswith(f"{part}.")), None)
        through_connector = "m2pt_interaction" in name or "m2pt_connector" in name
        assert str(weight.device) == (SECOND if through_connector else device), name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    model = adapt(spread()).train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(model, adapt(make_llava()), make_inputs("left"))


def test_several_adapters():
    models = [adapt(make_llava()), adapt(spread())]
    for model in models:
        model.add_adapter("other", make_config(connector_rank=2))
        randomise(model, seed=3)
        model.eval()
    expected, model = models
    inputs = make_inputs("left")
    for names in (["default", "other"], ["other", "__base__"]):
        mixed, expected_mixed = (
            one(**without_labels(inputs), adapter_names=names).logits for one in (model, expected)
        )
        assert_close(mixed, expected_mixed)
    expected.set_adapter("other")
    model.set_adapter("other")
    assert_same(model, expected, inputs)


def test_the_table_of_gradients():
    expected, model = adapt(make_llava()), adapt(spread())
    for one in (expected, model):
        one(**make_inputs()).loss.backward()
    assert model.base_model.describe() == expected.base_model.describe()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading(tmp_path, low_cpu_mem_usage):
    expected = adapt(make_llava())
    expected.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(spread(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {weight.device.type for weight in trained_by(model).values()} == {"lazy"}
    assert_close(model(**make_inputs()).logits, expected(**make_inputs()).logits)


@pytest.mark.parametrize("kwargs", ADAPTERS.values(), ids=ADAPTERS)
def test_spreading_a_model_that_is_adapted(kwargs):
    expected, model = adapt(make_llava(), **kwargs), adapt(make_llava(), **kwargs)
    dispatch_model(model, {f"base_model.model.{path}": device for path, device in PLACES.items()})
    assert_same(model, expected, inputs_for(kwargs))


@pytest.mark.parametrize("init_prompts", ["states", "vocabulary"])
def test_starts(init_prompts):
    options = {"init_token_ids": [1, 5, 9]} if init_prompts == "states" else {}
    models = []
    for model in (make_llava(), spread()):
        torch.manual_seed(0)
        models.append(get_peft_model(model, make_config(init_prompts=init_prompts, **options)))
    for expected, weight in zip(*(trained_by(model).values() for model in models)):
        assert_close(weight, expected)


def test_lora_first():
    models = []
    for model in (make_llava(), spread()):
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["q_proj", "v_proj", "linear_2"], init_lora_weights=False)
        models.append(adapt(get_peft_model(model, config, adapter_name="lora"), adapter_name="m2pt"))
    assert_same(models[1], models[0], make_inputs())


def test_steps_without_images():
    model = adapt(spread(), num_textual_tokens=0, num_interaction_tokens=0)
    model(**make_inputs(images=False)).loss.backward()
    assert all(not weight.grad.any() for weight in trained_by(model).values())


@pytest.mark.parametrize("kwargs", ADAPTERS.values(), ids=ADAPTERS)
def test_parts_without_data(kwargs):
    """The meta device is one to which things can go, and from which none comes back."""
    model = make_llava()
    for path, device in PLACES.items():
        device = torch.device("cpu" if device == FIRST else "meta")
        add_hook_to_module(model.get_submodule(path).to(device), AlignDevicesHook(device))
    model = get_peft_model(model, M2PTConfig(num_visual_tokens=2, **kwargs))
    logits = model(**without_labels(inputs_for(kwargs))).logits
    assert logits.is_meta
