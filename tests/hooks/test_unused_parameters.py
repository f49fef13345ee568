"""Training steps without images, in one process and in two."""

from contextlib import contextmanager

import pytest
import torch
from helpers.models import adapt, make_config, make_inputs, make_llava, randomise, trained_by
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Trainer, TrainingArguments


CHECKPOINTING = {"off": None, "reentrant": {"use_reentrant": True}, "not reentrant": {"use_reentrant": False}}
IMAGES = make_inputs("right")
TEXT = make_inputs("right", images=False)


@contextmanager
def two_processes():
    """The other one is not there: nothing is exchanged."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


def gradients(peft_model, *batches):
    peft_model.train()
    peft_model.zero_grad()
    sum(peft_model(**batch).loss for batch in batches).backward()
    return {name: parameter.grad for name, parameter in peft_model.named_parameters() if parameter.grad is not None}


def check_gradients(found, expected):
    """Those of one process, and zeros for all that is in front of the language model."""
    for name, gradient in found.items():
        if name in expected:
            torch.testing.assert_close(gradient, expected[name], msg=name)
        else:
            assert "vision_tower" in name or "multi_modal_projector" in name
            assert not gradient.any(), name


class TestWithoutImages:
    @pytest.mark.parametrize("checkpointing", CHECKPOINTING)
    @pytest.mark.parametrize(
        "config, num_unused",
        [
            ({}, 3),  # text layers use the connector, for interaction prompts
            ({"num_visual_tokens": 0, "num_interaction_tokens": 0}, 4),
            ({"tune_connector": False, "num_interaction_tokens": 0}, 3),
            ({"interaction_placement": "image"}, 3 + 1 + 4),
            ({"connector_rank": 2, "num_interaction_tokens": 0}, 3 + 4),
        ],
        ids=str,
    )
    def test_gradients(self, config, num_unused, checkpointing):
        expected = gradients(adapt(make_llava(), **config), TEXT)
        peft_model = adapt(make_llava(), **config)
        if checkpointing != "off":
            peft_model.gradient_checkpointing_enable(CHECKPOINTING[checkpointing])
        with two_processes():
            found = gradients(peft_model, TEXT)
        assert found.keys() == trained_by(peft_model).keys()
        assert len(found.keys() - expected.keys()) == num_unused
        check_gradients(found, expected)

    def test_visual_prompts_alone(self):
        """Nothing in the language model asks for gradients then."""
        peft_model = adapt(make_llava(), num_textual_tokens=0, num_interaction_tokens=0)
        with two_processes():
            found = gradients(peft_model, TEXT)
        assert found.keys() == trained_by(peft_model).keys()
        check_gradients(found, {})

    @pytest.mark.parametrize("checkpointing", CHECKPOINTING)
    def test_several_calls_before_one_backward_pass(self, checkpointing):
        peft_model = adapt(make_llava())
        expected = gradients(peft_model, TEXT, IMAGES, TEXT)
        if checkpointing != "off":
            peft_model.gradient_checkpointing_enable(CHECKPOINTING[checkpointing])
        with two_processes():
            found = gradients(peft_model, TEXT, IMAGES, TEXT)
        assert found.keys() == expected.keys() == trained_by(peft_model).keys()
        check_gradients(found, expected)

    def test_only_what_trains(self):
        peft_model = adapt(make_llava())
        peft_model.add_adapter("other", make_config())
        randomise(peft_model, seed=3)
        with two_processes():
            assert gradients(peft_model, TEXT).keys() == {
                name for name in trained_by(peft_model) if ".default" in name
            }
            with peft_model.disable_adapter():
                assert not peft_model(**TEXT).logits.requires_grad

    @torch.no_grad()
    def test_numbers_stay(self):
        peft_model = adapt(make_llava())
        expected = peft_model(**TEXT).logits
        with two_processes():
            with torch.enable_grad():
                assert torch.equal(peft_model(**TEXT).logits, expected)
            # What is not finite does not spread from where it is.
            for name, weight in trained_by(peft_model).items():
                if "vision_tower" in name:
                    weight.fill_(torch.inf)
            with torch.enable_grad():
                assert torch.equal(peft_model(**TEXT).logits, expected)

    @pytest.mark.parametrize("return_dict", [True, False])
    def test_decoder_that_embeds_its_tokens(self, return_dict):
        peft_model = adapt(make_llava())
        decoder = peft_model.get_base_model().get_decoder()
        with two_processes():
            decoder(TEXT["input_ids"], return_dict=return_dict)[0].sum().backward()
        assert all(parameter.grad is not None for parameter in trained_by(peft_model).values())

    def test_in_one_process_nothing_is_added(self):
        peft_model = adapt(make_llava())
        assert not any("vision_tower" in name for name in gradients(peft_model, TEXT))

    @pytest.mark.parametrize("checkpointing", CHECKPOINTING)
    @pytest.mark.parametrize(
        "config",
        [
            {},
            {"tune_connector": False},
            {"connector_rank": 2},
            {"interaction_placement": "image", "num_interaction_tokens": 2},
        ],
        ids=str,
    )
    def test_nothing_of_the_language_model_in_one_process(self, config, checkpointing):
        """There is a gradient of zero then, since the loss must lead back to something."""
        config = {"num_textual_tokens": 0, "num_interaction_tokens": 0, **config}
        with_image = {} if config["num_interaction_tokens"] == 0 else {"num_image_tokens": 6}
        peft_model = adapt(make_llava(), **config)
        if checkpointing != "off":
            peft_model.gradient_checkpointing_enable(CHECKPOINTING[checkpointing])
        found = gradients(peft_model, TEXT)
        assert found.keys() == trained_by(peft_model).keys()
        assert not any(gradient.any() for gradient in found.values())
        of_images = gradients(peft_model, make_inputs("right", **with_image))
        both = gradients(peft_model, TEXT, make_inputs("right", **with_image))
        assert all(gradient.any() for gradient in of_images.values())
        for name, gradient in of_images.items():
            torch.testing.assert_close(both[name], gradient, msg=name)

    def test_numbers_stay_in_one_process(self):
        peft_model = adapt(make_llava(), num_textual_tokens=0, num_interaction_tokens=0)
        with torch.no_grad():
            expected = peft_model(**TEXT).logits
            assert not expected.requires_grad
            for weight in trained_by(peft_model).values():
                weight.fill_(torch.inf)
        logits = peft_model(**TEXT).logits
        assert torch.equal(logits, expected) and logits.requires_grad
        with peft_model.disable_adapter():
            assert not peft_model(**TEXT).logits.requires_grad

    @pytest.mark.parametrize("config", [{}, {"tune_connector": False}], ids=str)
    def test_trainer(self, config, tmp_path):
        peft_model = adapt(make_llava(), num_textual_tokens=0, num_interaction_tokens=0, **config)
        before = {name: weight.detach().clone() for name, weight in trained_by(peft_model).items()}
        samples = [{name: value[i] for name, value in batch.items()} for batch in (TEXT, IMAGES) for i in (0, 1)]
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=1, num_train_epochs=1, report_to=[], use_cpu=True, disable_tqdm=True
        )
        Trainer(peft_model, arguments, train_dataset=samples).train()
        assert all(not torch.equal(weight, before[name]) for name, weight in trained_by(peft_model).items())

    def test_unloading_takes_the_hooks_away(self):
        model = make_llava()
        adapt(model).unload()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
