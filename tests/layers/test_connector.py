"""Interaction prompts and the tuned connector: what they give, and what they ask of inputs and config."""

import pytest
import torch
from helpers.models import (
    IMAGE_TOKEN,
    NUM_PATCHES,
    adapt,
    connector_of,
    make_config,
    make_inputs,
    make_llava,
    randomise,
    trained_by,
    without_labels,
)
from peft import PeftModel

from peft_m2pt import M2PTConfig


IMAGE = {"interaction_placement": "image"}
NUM_INTERACTION = 2


def image_inputs(padding="none", **kwargs):
    return make_inputs(padding, num_image_tokens=NUM_PATCHES + NUM_INTERACTION, **kwargs)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_interaction_tokens": -1}, "num_interaction_tokens=-1 is negative"),
        ({"num_interaction_tokens": "3"}, "num_interaction_tokens='3' is not an integer"),
        ({"interaction_placement": "tokens"}, "interaction_placement='tokens' is unknown"),
        ({"tune_connector": 1}, "tune_connector=1 is neither True nor False"),
        ({"connector_rank": 0}, "connector_rank=0 is not an integer above 0"),
        ({"connector_rank": 2, "tune_connector": False}, "connector_rank=2 says how to tune the connector"),
        ({"exclude_modules": "("}, "exclude_modules='(' is not a valid regular expression"),
    ],
    ids=str,
)
def test_bad_values(values, message):
    with pytest.raises(ValueError) as error:
        M2PTConfig(**values)
    assert message in str(error.value)


KINDS = {"layers": {}, "image": IMAGE, "low rank": {"connector_rank": 2}, "frozen": {"tune_connector": False}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
class TestBehaviour:
    """What holds for prompts holds for the connector, in all its forms."""

    def make(self, kind, dtype):
        inputs = image_inputs("left") if kind == "image" else make_inputs("left")
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        return adapt(make_llava().to(dtype), **KINDS[kind]), inputs

    def test_gradients(self, kind, dtype):
        peft_model, inputs = self.make(kind, dtype)
        for checkpointing in (None, {"use_reentrant": True}, {"use_reentrant": False}):
            peft_model.zero_grad()
            if checkpointing is not None:
                peft_model.get_base_model().gradient_checkpointing_enable(checkpointing)
            peft_model.train()
            loss = peft_model(**inputs).loss
            loss.backward()
            gradients = {name: parameter.grad for name, parameter in trained_by(peft_model).items()}
            assert all(gradient.abs().max() > 0 for gradient in gradients.values())
            assert all(parameter.dtype == torch.float32 for parameter in trained_by(peft_model).values())
            if checkpointing is None:
                expected_loss, expected = loss, gradients
            assert loss == expected_loss
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")

    def test_disable_and_unload(self, kind, dtype):
        peft_model, inputs = self.make(kind, dtype)
        model = peft_model.get_base_model()
        base_inputs = make_inputs("left")
        base_inputs["pixel_values"] = base_inputs["pixel_values"].to(dtype)
        expected = make_llava().to(dtype)(**base_inputs).logits
        peft_model(**inputs)
        with peft_model.disable_adapter():
            assert torch.equal(peft_model(**base_inputs).logits, expected)
        assert torch.equal(peft_model.unload()(**base_inputs).logits, expected)
        assert model.state_dict().keys() == make_llava().state_dict().keys()
        assert not model._forward_pre_hooks and not model._forward_hooks

    def test_saving(self, kind, dtype, tmp_path):
        peft_model, inputs = self.make(kind, dtype)
        peft_model.save_pretrained(tmp_path)
        expected = peft_model(**inputs).logits
        for name in ("default", "other"):
            for low_cpu_mem_usage in (False, True):
                loaded = PeftModel.from_pretrained(
                    make_llava().to(dtype), tmp_path, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage
                )
                for weight_name, weight in trained_by(peft_model).items():
                    assert torch.equal(trained_by(loaded)[weight_name.replace(".default.", f".{name}.")], weight)
                # A product with a thin matrix depends on where in memory that lies, and files are mapped into it.
                tolerance = (
                    (1e-4 if dtype == torch.float32 else 0.1) if kind == "low rank" and low_cpu_mem_usage else 0
                )
                torch.testing.assert_close(loaded(**inputs).logits, expected, atol=tolerance, rtol=0)

    def test_generation(self, kind, dtype):
        peft_model, inputs = self.make(kind, dtype)
        arguments = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "suppress_tokens": [IMAGE_TOKEN]}
        cached = peft_model.generate(**without_labels(inputs), **arguments)
        if dtype == torch.float32:
            uncached = peft_model.generate(**without_labels(inputs), **arguments, use_cache=False)
            assert torch.equal(cached, uncached)


def test_several_images_per_sample_and_none():
    peft_model = adapt(make_llava(), **IMAGE)
    inputs = without_labels(image_inputs())
    one = peft_model(**inputs).logits
    # Both images in one sample, one after the other.
    input_ids = inputs["input_ids"].reshape(1, -1)
    both = peft_model(input_ids=input_ids, pixel_values=inputs["pixel_values"]).logits
    length = inputs["input_ids"].shape[1]
    torch.testing.assert_close(both[0, :length], one[0], atol=1e-5, rtol=1e-5)
    assert peft_model(input_ids=make_inputs(images=False)["input_ids"]).logits.isfinite().all()


@pytest.mark.parametrize("num_image_tokens", [NUM_PATCHES, NUM_PATCHES + 5])
def test_wrong_numbers_of_placeholders_name_the_call(num_image_tokens):
    peft_model = adapt(make_llava(), **IMAGE)
    message = (
        rf"image tokens.* {2 * num_image_tokens}, features(.|\n)*Each image needs 2 more tokens than it "
        r"has features, for the interaction prompts .*peft_m2pt.adapt_processor\(processor, config\), where config is "
        "the M2PTConfig"
    )
    inputs = make_inputs(num_image_tokens=num_image_tokens)
    calls = [
        lambda: peft_model(**inputs),
        lambda: peft_model(inputs["input_ids"], inputs["pixel_values"]),
        lambda: peft_model.generate(**without_labels(inputs), max_new_tokens=2),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    # Nothing is left over from the errors, nor from one that has another reason.
    with pytest.raises(ValueError, match="Input image size"):
        peft_model(input_ids=inputs["input_ids"], pixel_values=torch.zeros(2, 3, 8, 8))
    features = peft_model.get_image_features(make_inputs()["pixel_values"]).pooler_output
    assert [len(feature) for feature in features] == [6, 6]
    assert peft_model(**image_inputs()).loss.isfinite()


def test_a_disabled_adapter_needs_the_processor_of_the_base_model():
    peft_model = adapt(make_llava(), **IMAGE)
    with peft_model.disable_adapter():
        message = "Each image needs 0 more tokens than it has features(.|\n)*config has interaction_placement='layers'"
        with pytest.raises(ValueError, match=message):
            peft_model(**image_inputs())
        with pytest.raises(ValueError, match=message):
            peft_model.generate(**without_labels(image_inputs()), max_new_tokens=2)


def test_adapters_with_connectors_of_their_own():
    inputs = make_inputs()
    expected = [adapt(make_llava())(**inputs).logits, None]
    peft_model = adapt(make_llava())
    peft_model.add_adapter("other", make_config(connector_rank=3, num_interaction_tokens=1))
    before = {name: p.clone() for name, p in trained_by(peft_model).items()}
    randomise(peft_model, seed=4)
    with torch.no_grad():
        for name, parameter in trained_by(peft_model).items():
            if ".default." in name:
                parameter.copy_(before[name])
    assert torch.equal(peft_model(**inputs).logits, expected[0])
    peft_model.set_adapter("other")
    expected[1] = peft_model(**inputs).logits
    assert not torch.equal(*expected)
    with pytest.raises(ValueError, match=r"\['default', 'other'\] have each tuned the connector"):
        peft_model.base_model.set_adapter(["default", "other"])
        peft_model(**inputs)
    peft_model.set_adapter("other")
    peft_model.delete_adapter("default")
    assert torch.equal(peft_model(**inputs).logits, expected[1])
    assert not [name for name in trained_by(peft_model) if ".default." in name]


def test_the_frozen_connector_is_not_changed():
    model = make_llava()
    frozen = {name: value.clone() for name, value in model.model.multi_modal_projector.state_dict().items()}
    peft_model = adapt(model)
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    before = {name: parameter.clone() for name, parameter in trained_by(peft_model).items()}
    peft_model(**make_inputs()).loss.backward()
    optimizer.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in trained_by(peft_model).items())
    after = connector_of(peft_model).state_dict()
    assert all(torch.equal(after[name], frozen[name]) for name in frozen)
