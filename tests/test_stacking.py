"""M2PT beside adapters of other methods, and several PEFT models around one base."""

import copy
import pickle

import pytest
import torch
from helpers import adapter_methods
from helpers.lora import add_lora, randomise_lora
from helpers.models import (
    VOCAB_SIZE,
    adapt,
    make_config,
    make_inputs,
    make_llava,
    randomise,
    trained_by,
    without_labels,
)
from helpers.processors import make_processor
from peft import LoraConfig, PeftMixedModel, PeftModel, get_layer_status, get_model_status, get_peft_model
from peft.tuners.lora import LoraLayer
from PIL import Image
from torch import nn
from transformers import pipeline


TARGETS = {
    "attention": ["q_proj", "v_proj"],
    "all": "all-linear",
    "connector": ["linear_1", "linear_2"],
}
ADAPTERS = {
    "frozen connector": {"tune_connector": False},
    "low rank": {"connector_rank": 4},
    "image": {"connector_rank": 4, "interaction_placement": "image"},
}
every_target = pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)


def merged(targets):
    """What a model with LoRA computes, in a model without it."""
    return add_lora(make_llava(), targets).merge_and_unload()


def inputs_for(kwargs):
    return make_inputs(num_image_tokens=6 if kwargs.get("interaction_placement") == "image" else 4)


def both_in_peft_models(targets, kwargs):
    return adapt(add_lora(make_llava(), targets), "m2pt", **kwargs)


def both_in_one_peft_model(targets, kwargs):
    return adapt(add_lora(make_llava(), targets).get_base_model(), "m2pt", **kwargs)


def both_by_transformers(targets, kwargs):
    model = make_llava()
    model.add_adapter(LoraConfig(r=4, target_modules=targets), "lora")
    model.add_adapter(make_config(**kwargs), "m2pt")
    model.set_adapter(["lora", "m2pt"])
    randomise_lora(model)
    randomise(model, seed=2)
    return model


WAYS = [both_in_peft_models, both_in_one_peft_model, both_by_transformers]
every_way = pytest.mark.parametrize("stack", WAYS, ids=lambda way: way.__name__)


@every_way
@pytest.mark.parametrize("kwargs", ADAPTERS.values(), ids=ADAPTERS)
@every_target
def test_m2pt_on_lora(targets, kwargs, stack):
    if stack is both_by_transformers and not adapter_methods.WORK:
        adapter_methods.check_refused_like_lora()
        return
    inputs = inputs_for(kwargs)
    expected = adapt(merged(targets), "m2pt", **kwargs)
    model = stack(targets, kwargs)
    outputs, expected_outputs = model(**inputs), expected(**inputs)
    torch.testing.assert_close(outputs.logits, expected_outputs.logits, atol=1e-4, rtol=1e-4)
    outputs.loss.backward()
    expected_outputs.loss.backward()
    gradients = {name.removeprefix("base_model.model."): p.grad for name, p in trained_by(expected).items()}
    assert gradients
    for name, parameter in trained_by(model).items():
        expected_gradient = gradients[name.replace("base_model.model.", "")]
        torch.testing.assert_close(parameter.grad, expected_gradient, atol=1e-4, rtol=1e-3)
    arguments = {**without_labels(inputs), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**arguments), expected.generate(**arguments))


@every_target
def test_the_copy_of_a_connector_with_lora(targets):
    # The copy is one of the connector itself. LoRA stays on top of it, so that at first nothing changes.
    config = make_config(num_interaction_tokens=0)
    inputs = make_inputs()
    expected = get_peft_model(merged(targets), config, "m2pt")
    peft_model = get_peft_model(add_lora(make_llava(), targets), config, "m2pt")
    for name, parameter in trained_by(expected).items():
        if "m2pt_prompt" in name:
            trained_by(peft_model)[name].data.copy_(parameter)
    copied = {name for name in trained_by(peft_model) if "m2pt_connector" in name}
    assert len(copied) == 4 and not [name for name in copied if "lora" in name]
    torch.testing.assert_close(peft_model(**inputs).logits, expected(**inputs).logits, atol=1e-4, rtol=1e-4)
    peft_model(**inputs).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in trained_by(peft_model).values())


def test_both_train():
    peft_model = both_in_peft_models("all-linear", {"connector_rank": 4})
    lora = {name: p for name, p in peft_model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    trainable = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert trainable == lora.keys() | trained_by(peft_model).keys()
    peft_model(**make_inputs()).loss.backward()
    # Behind the feature layer, weights have no effect.
    without = {name for name in trainable if peft_model.get_parameter(name).grad is None}
    assert without and all(".layers.3." in name and name in lora for name in without)


def test_a_frozen_lora_stays_frozen(tmp_path):
    add_lora(make_llava(), "all-linear").save_pretrained(tmp_path)
    lora = PeftModel.from_pretrained(make_llava(), tmp_path / "lora", adapter_name="lora")
    peft_model = adapt(lora, "m2pt")
    assert {name for name, p in peft_model.named_parameters() if p.requires_grad} == trained_by(peft_model).keys()


@pytest.mark.parametrize("saved_from", WAYS[:2], ids=lambda way: way.__name__)
def test_saving_and_loading(tmp_path, saved_from):
    inputs = make_inputs()
    peft_model = saved_from("all-linear", {"connector_rank": 4})
    expected = peft_model(**inputs).logits
    peft_model.save_pretrained(tmp_path, selected_adapters=["m2pt"])
    folder = tmp_path / "m2pt"
    on_peft_model = PeftModel.from_pretrained(add_lora(make_llava(), "all-linear"), folder, adapter_name="m2pt")
    base = add_lora(make_llava(), "all-linear").get_base_model()
    on_base = PeftModel.from_pretrained(base, folder, adapter_name="m2pt")
    for loaded in (on_peft_model, on_base):
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    # The adapter does not depend on LoRA.
    alone = PeftModel.from_pretrained(make_llava(), folder)
    expected = adapt(make_llava(), connector_rank=4)(**inputs).logits
    torch.testing.assert_close(alone(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def test_unload_leaves_lora(tmp_path):
    inputs = make_inputs()
    lora = add_lora(make_llava(), "all-linear")
    names = [name for name, _ in lora.named_modules()]
    expected = lora(**inputs).logits
    peft_model = adapt(lora, "m2pt")
    assert not torch.equal(peft_model(**inputs).logits, expected)
    unloaded = peft_model.unload()
    assert unloaded is lora and list(lora.peft_config) == ["lora"]
    assert [name for name, _ in lora.named_modules()] == names
    assert torch.equal(lora(**inputs).logits, expected)
    lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llava(), tmp_path / "lora")
    assert torch.equal(loaded(**inputs).logits, expected)
    torch.testing.assert_close(lora.merge_and_unload()(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["unload", "merge_and_unload"])
@pytest.mark.parametrize("order", ["LoRA first", "M2PT first"])
def test_another_method_stays_while_there_are_prompts(method, order):
    """PEFT skips what is inside of adapted modules, so nothing is unloaded or merged at all."""
    inputs = make_inputs()
    if order == "LoRA first":
        lora = add_lora(make_llava(), "all-linear")
        peft_model = adapt(lora, "m2pt")
    else:
        peft_model = adapt(make_llava(), "m2pt")
        lora = add_lora(peft_model, ["gate_proj"])
    expected, names = lora(**inputs).logits, [name for name, _ in lora.named_modules()]
    weights = {name: weight.clone() for name, weight in lora.state_dict().items()}
    with pytest.raises(
        NotImplementedError, match=r"for example at 'model.*self_attn'.* Call unload\(\) on the model with M2PT first"
    ):
        getattr(lora, method)()
    assert [name for name, _ in lora.named_modules()] == names
    assert all(torch.equal(weight, weights[name]) for name, weight in lora.state_dict().items())
    assert torch.equal(lora(**inputs).logits, expected)
    if order == "LoRA first":
        peft_model.unload()
        assert not [module for module in getattr(lora, method)().modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("connector", [{}, {"connector_rank": 2}, {"tune_connector": False}], ids=str)
def test_merging_another_method_in_place(connector):
    """What LoRA adds is in the weights below, then, and nothing else has changed."""
    inputs = make_inputs()
    lora = add_lora(make_llava(), "all-linear")
    peft_model = adapt(lora, "m2pt", **connector)
    expected = peft_model(**inputs).logits
    lora.merge_adapter()
    torch.testing.assert_close(peft_model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    lora.unmerge_adapter()
    torch.testing.assert_close(peft_model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def test_disabling():
    inputs = make_inputs()
    peft_model = both_in_peft_models("all-linear", {})
    expected = peft_model(**inputs).logits
    with peft_model.disable_adapter():
        assert torch.equal(peft_model(**inputs).logits, make_llava()(**inputs).logits)
    assert torch.equal(peft_model(**inputs).logits, expected)


@pytest.mark.parametrize("targets", [TARGETS["attention"], TARGETS["all"], r".*layers.*\.v_proj"], ids=str)
@pytest.mark.parametrize("by_transformers", [False, True])
def test_lora_on_m2pt_is_refused_where_peft_passes_over_modules(targets, by_transformers):
    config = LoraConfig(target_modules=targets)
    if by_transformers and not adapter_methods.WORK:
        adapter_methods.check_refused_like_lora()
        return
    if by_transformers:
        model = make_llava()
        model.add_adapter(make_config(), "m2pt")
        model.add_adapter(config, "lora")
    else:
        model = get_peft_model(adapt(make_llava(), "m2pt"), config, adapter_name="lora")
    message = (
        r"'lora' \(LORA\) was added after M2PT, so PEFT has skipped '.*self_attn\.\w_proj'.* Add it .* before M2PT"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            model(**make_inputs())


def test_lora_on_other_modules_than_those_of_m2pt():
    inputs = make_inputs()
    targets = ["up_proj", "down_proj"]
    expected = adapt(merged(targets), "m2pt")(**inputs).logits
    peft_model = add_lora(adapt(make_llava(), "m2pt"), targets)
    torch.testing.assert_close(peft_model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def test_adapters_have_names_of_their_own():
    message = r"already has an adapter 'default' \({}\).*adapter_name='m2pt'.* unload\(\)"
    lora = get_peft_model(make_llava(), LoraConfig(target_modules=["q_proj"]))
    names = [name for name, _ in lora.named_modules()]
    with pytest.raises(ValueError, match=message.format("LORA")):
        get_peft_model(lora, make_config())
    assert [name for name, _ in lora.named_modules()] == names
    assert isinstance(lora.peft_config["default"], LoraConfig)
    model = make_llava()
    peft_model = adapt(model)
    expected = peft_model(**make_inputs()).logits
    for again in (model, peft_model):
        with pytest.raises(ValueError, match=message.format("M2PT")):
            get_peft_model(again, make_config())
    assert torch.equal(peft_model(**make_inputs()).logits, expected)
    later = get_peft_model(adapt(make_llava()), LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"'default' \(LORA\) has the same name as an M2PT adapter.*another name"):
        later(**make_inputs())


def test_a_second_m2pt_around_the_same_model():
    inputs = make_inputs()
    model = make_llava()
    first = adapt(model)
    expected = first(**inputs).logits
    second = get_peft_model(model, make_config(num_textual_tokens=5, tune_connector=False), adapter_name="second")
    assert second.active_adapters == ["second"]
    assert not torch.equal(second(**inputs).logits, expected)
    second.set_adapter("default")
    assert torch.equal(second(**inputs).logits, expected)
    assert torch.equal(second.unload()(**inputs).logits, make_llava()(**inputs).logits)
    assert torch.equal(adapt(model)(**inputs).logits, expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_stack(duplicate):
    inputs = make_inputs()
    peft_model = both_in_peft_models("all-linear", {"connector_rank": 4})
    twin = duplicate(peft_model)
    expected = peft_model(**inputs).logits
    assert torch.equal(twin(**inputs).logits, expected)
    randomise(twin, seed=5)
    assert torch.equal(peft_model(**inputs).logits, expected)
    assert not torch.equal(twin(**inputs).logits, expected)


@pytest.mark.parametrize("make", [PeftMixedModel, lambda *args: get_peft_model(*args, mixed=True)])
def test_mixed_models_are_refused(make):
    with pytest.raises(ValueError, match="'M2PT' is not compatible with the `PeftMixedModel`"):
        make(make_llava(), make_config())


def test_status():
    peft_model = both_in_peft_models(["up_proj"], {})
    status = get_model_status(peft_model)
    assert status.adapter_model_type == "M2PTModel" and status.enabled is True
    assert status.peft_types == {"lora": "LORA", "m2pt": "M2PT"}
    assert status.requires_grad == {"lora": True, "m2pt": True}
    assert status.merged_adapters == [] and status.devices == {"lora": ["cpu"], "m2pt": ["cpu"]}
    layers = [layer for layer in get_layer_status(peft_model) if layer.available_adapters == ["m2pt"]]
    types = [layer.module_type for layer in layers]
    assert types.count("m2pt.M2PTAttention") == 6 and types.count("m2pt.M2PTConnector") == 1
    assert all(layer.enabled and layer.active_adapters == ["m2pt"] for layer in layers)
    with peft_model.disable_adapter():
        assert get_model_status(peft_model).enabled is False
    assert "m2pt*" in peft_model.base_model.describe()


class Head(nn.Module):
    """A head of the base model whose parts are called like ours."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.m2pt_prompt = nn.Linear(48, 8, bias=False)
        self.base_layer = nn.Linear(8, VOCAB_SIZE)

    def forward(self, x):
        return self.base_layer(self.m2pt_prompt(x))


def test_modules_of_the_base_that_are_called_like_ours(tmp_path):
    def make_base():
        model = make_llava()
        model.lm_head = Head()
        return model

    inputs = make_inputs()
    expected = make_base()(**inputs).logits
    peft_model = get_peft_model(make_base(), make_config())
    assert not any(parameter.requires_grad for parameter in peft_model.get_base_model().lm_head.parameters())
    tuned = peft_model(**inputs).logits
    with peft_model.disable_adapter():
        assert torch.equal(peft_model(**inputs).logits, expected)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path)
    assert torch.equal(loaded(**inputs).logits, tuned)
    unloaded = loaded.unload()
    assert isinstance(unloaded.lm_head, Head)
    assert torch.equal(unloaded(**inputs).logits, expected)


def test_pipeline():
    peft_model = adapt(make_llava())
    processor = make_processor()
    image = Image.new("RGB", (16, 16), "red")
    answer = pipeline("image-text-to-text", model=peft_model, processor=processor, tokenizer=processor.tokenizer)
    arguments = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    (result,) = answer(images=image, text="what <image>", generate_kwargs=arguments, return_tensors=True)
    inputs = processor(images=[image], text=["what <image>"], return_tensors="pt")
    expected = peft_model.generate(**inputs, **arguments)
    assert torch.equal(torch.as_tensor(result["generated_token_ids"]).flatten(), expected.flatten())
