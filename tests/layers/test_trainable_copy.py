"""The parts of a tuned connector, as users know them: they load weights into them, and register hooks on them."""

import copy

import pytest
import torch
from helpers.models import adapt, make_config, make_inputs, make_llava, trained_by
from peft import get_peft_model, set_peft_model_state_dict
from torch import nn

from peft_m2pt import M2PTConfig


KINDS = {"copy": {}, "image": {"interaction_placement": "image"}, "low rank": {"connector_rank": 2}}
IN_COPY = [kwargs for name, kwargs in KINDS.items() if name != "low rank"]


def inputs_for(kwargs):
    return make_inputs(num_image_tokens=6 if kwargs.get("interaction_placement") == "image" else 4)


def new_weights(module, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(w.shape, generator=generator) for name, w in module.state_dict().items()}


def parts_of(projector):
    return [projector.linear_1, projector.linear_2]


def seeded(model, **kwargs):
    """An adapter whose prompts are large, and whose connector is that of the model."""
    torch.manual_seed(0)
    peft_model = get_peft_model(model, make_config(**kwargs))
    with torch.no_grad():
        for name, weight in trained_by(peft_model).items():
            if "m2pt_prompt" in name or "m2pt_interaction" in name:
                weight.mul_(5)
    return peft_model


@pytest.mark.parametrize("reached", ["by the path", "before"])
@pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS)
def test_weights_that_are_loaded_into_parts(kwargs, reached):
    model = make_llava()
    parts = parts_of(model.model.multi_modal_projector)
    peft_model = seeded(model, **kwargs)
    if reached == "by the path":
        parts = parts_of(peft_model.get_base_model().model.multi_modal_projector)
    expected = make_llava()
    for part, other in zip(parts, parts_of(expected.model.multi_modal_projector)):
        part.load_state_dict(new_weights(part))
        other.load_state_dict(new_weights(other))
    expected = seeded(expected, **kwargs)
    inputs = inputs_for(kwargs)
    torch.testing.assert_close(peft_model(**inputs).logits, expected(**inputs).logits)
    with peft_model.disable_adapter():
        assert torch.equal(peft_model(**make_inputs()).logits, expected.unload()(**make_inputs()).logits)


def test_a_copy_that_has_learned_something():
    """It is not lost to weights of the base model, which may be loaded for other reasons."""
    peft_model = adapt(make_llava())
    before = {name: weight.clone() for name, weight in trained_by(peft_model).items()}
    part = peft_model.get_base_model().model.multi_modal_projector.linear_1
    message = r"\['weight', 'bias'\] are loaded into .* 'model.multi_modal_projector', of which adapter .default. has"
    with pytest.warns(UserWarning, match=message):
        part.load_state_dict(new_weights(part))
    assert all(torch.equal(weight, before[name]) for name, weight in trained_by(peft_model).items())
    with peft_model.disable_adapter():
        assert torch.equal(part.weight, new_weights(part)["weight"])


def test_the_copy_of_the_active_adapter_alone():
    peft_model = adapt(make_llava())
    peft_model.add_adapter("other", make_config())
    before = {name: weight.clone() for name, weight in trained_by(peft_model).items()}
    peft_model.set_adapter("other")
    part = peft_model.get_base_model().model.multi_modal_projector.linear_1
    loaded = new_weights(part)
    part.load_state_dict(loaded)
    for name, weight in trained_by(peft_model).items():
        is_loaded = "m2pt_connector_linear_1.other" in name
        assert torch.equal(weight, loaded[name.rpartition(".")[2]] if is_loaded else before[name]), name


def test_a_whole_state_dict():
    source = make_llava()
    source.model.multi_modal_projector.load_state_dict(new_weights(source.model.multi_modal_projector))
    source = adapt(source)
    peft_model = get_peft_model(make_llava(), make_config())
    peft_model.load_state_dict(source.state_dict())
    assert torch.equal(peft_model(**make_inputs()).logits, source(**make_inputs()).logits)


def test_the_weights_of_the_base_model_again():
    """They change nothing, so nothing that was trained is lost."""
    peft_model = adapt(make_llava())
    expected = peft_model(**make_inputs()).logits
    projector = peft_model.get_base_model().model.multi_modal_projector
    for part, base in zip(parts_of(projector), parts_of(make_llava().model.multi_modal_projector)):
        part.load_state_dict(base.state_dict())
        part.to(torch.float32).load_state_dict({name: w.double() for name, w in base.state_dict().items()})
    peft_model.load_state_dict(peft_model.state_dict())
    assert torch.equal(peft_model(**make_inputs()).logits, expected)


def test_adapters_that_are_loaded_afterwards():
    peft_model, other = get_peft_model(make_llava(), make_config()), adapt(make_llava())
    part = peft_model.get_base_model().model.multi_modal_projector.linear_1
    part.load_state_dict(new_weights(part))
    weights = {name.replace(".default.", "."): weight for name, weight in trained_by(other).items()}
    set_peft_model_state_dict(peft_model, weights)
    assert torch.equal(peft_model(**make_inputs()).logits, other(**make_inputs()).logits)


def test_nothing_is_left_behind():
    model = make_llava()
    adapt(model).unload()
    for module in model.model.multi_modal_projector.modules():
        assert not module._load_state_dict_pre_hooks and not module._forward_hooks and not module._forward_pre_hooks


class Collector:
    def __init__(self):
        self.inputs, self.outputs = [], []

    def before(self, module, args):
        self.inputs.append((module, args))

    def behind(self, module, args, output):
        self.outputs.append((module, output))


@pytest.mark.parametrize("part", ["", "linear_1", "act", "linear_2"])
@pytest.mark.parametrize("time", ["before", "after, kept", "after, by name"])
@pytest.mark.parametrize("kwargs", [*KINDS.values(), {"tune_connector": False}], ids=[*KINDS, "frozen"])
def test_hooks_are_called(kwargs, time, part):
    model, collector = make_llava(), Collector()
    path = f"model.multi_modal_projector.{part}".strip(".")
    module = model.get_submodule(path)
    if time == "before":
        handles = [module.register_forward_pre_hook(collector.before), module.register_forward_hook(collector.behind)]
    peft_model = adapt(model, **kwargs)
    if time == "after, by name" and part:
        module = peft_model.get_base_model().get_submodule(path)
    if time != "before":
        handles = [module.register_forward_pre_hook(collector.before), module.register_forward_hook(collector.behind)]
    inputs = inputs_for(kwargs)
    peft_model(**inputs)
    # The images, and where prompts go through the connector in each layer of the language model, three more.
    assert len(collector.inputs) == len(collector.outputs) == (1 if "interaction_placement" in kwargs else 4)
    assert all(called is module for called, _ in collector.inputs + collector.outputs)
    features = peft_model.get_base_model().model.get_image_features(inputs["pixel_values"]).pooler_output
    if part in ("", "linear_2"):
        torch.testing.assert_close(collector.outputs[-1][1], torch.stack(list(features)))
    for handle in handles:
        handle.remove()
    collector.outputs.clear()
    peft_model(**inputs)
    assert not collector.outputs


@pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS)
def test_hooks_change_what_goes_through(kwargs):
    """What goes in is scaled, by hooks of each kind, and what comes out."""
    model, inputs = adapt(make_llava(), **kwargs), inputs_for(kwargs)
    twin = copy.deepcopy(model)
    expected = model(**inputs).logits
    part = model.get_base_model().model.multi_modal_projector.linear_2
    part.register_forward_pre_hook(lambda module, args: args[0] * 4)
    part.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] / 2,), kwargs), with_kwargs=True)
    assert not torch.allclose(model(**inputs).logits, expected, atol=1e-3)
    part.register_forward_pre_hook(lambda module, args: (args[0] / 2,))
    torch.testing.assert_close(model(**inputs).logits, expected)
    part.register_forward_hook(lambda module, args, output: output * 2)
    part.register_forward_hook(lambda module, args, kwargs, output: output + 1, with_kwargs=True)
    last = twin.get_base_model().model.multi_modal_projector.linear_2
    last.register_forward_hook(lambda module, args, output: output * 2 + 1)
    torch.testing.assert_close(model(**inputs).logits, twin(**inputs).logits)
    assert not torch.allclose(model(**inputs).logits, expected, atol=1e-3)


@pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS)
def test_modes(kwargs):
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.dropout = nn.Linear(32, 48), nn.Dropout(1.0)

        def forward(self, image_features):
            dropped = self.dropout(self.linear(image_features))
            return nn.functional.dropout(dropped + 1, p=0.9999, training=self.training)

    model = make_llava()
    model.model.multi_modal_projector = Drops().eval()
    peft_model = get_peft_model(model, M2PTConfig(num_visual_tokens=2, **kwargs))
    connector = model.model.multi_modal_projector
    features = torch.randn(1, 4, 32)
    for training in (True, False, True):
        peft_model.train(training)
        output = connector(features)
        assert (output == 0).float().mean().gt(0.9) == training
