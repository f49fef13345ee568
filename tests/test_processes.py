"""Training in several processes gives what one process gives on the same batches, some of them without images."""

import pytest
import torch
from models import adapt, make_inputs, make_llava, trained_by, without_labels
from processes.launch import check, train_alone
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore


CHECKPOINTING = {"off": None, "reentrant": {"use_reentrant": True}, "not reentrant": {"use_reentrant": False}}
TEXT = make_inputs("right", images=False)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return train_alone(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes(engine, expected, tmp_path):
    check(engine, expected, tmp_path)


@pytest.fixture
def two_processes():
    """The other one is not there: nothing is exchanged."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    distributed.destroy_process_group()


def gradients(peft_model, *batches):
    peft_model.train()
    sum(peft_model(**batch).loss for batch in batches).backward()
    return {name: parameter.grad for name, parameter in peft_model.named_parameters() if parameter.grad is not None}


def is_in_front(name):
    """Whether a weight is used for images only."""
    return "vision_tower" in name or "multi_modal_projector" in name


class TestWithoutImages:
    """What is trained for images gets a gradient of zero, and the rest those of a single process."""

    @pytest.mark.parametrize("checkpointing", CHECKPOINTING)
    @pytest.mark.parametrize(
        "config",
        [
            {},
            {"num_visual_tokens": 0, "num_interaction_tokens": 0},
            {"num_textual_tokens": 0, "num_interaction_tokens": 0},
            {"tune_connector": False, "num_interaction_tokens": 0},
            {"interaction_placement": "image"},
            {"connector_rank": 2},
        ],
        ids=str,
    )
    def test_gradients(self, two_processes, config, checkpointing):
        model = make_llava()
        if checkpointing != "off":
            model.gradient_checkpointing_enable(CHECKPOINTING[checkpointing])
        peft_model = adapt(model, **config)
        found = gradients(peft_model, TEXT)
        distributed.destroy_process_group()
        distributed.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
        alone = adapt(make_llava(), **config)
        if config.get("num_textual_tokens") != 0:
            expected = gradients(alone, TEXT)
        else:
            expected = {}
        assert found.keys() == trained_by(peft_model).keys()
        assert any(is_in_front(name) for name in found.keys() - expected.keys())
        for name, gradient in found.items():
            if name in expected:
                torch.testing.assert_close(gradient, expected[name], msg=name)
            else:
                assert is_in_front(name) and not gradient.any(), name
