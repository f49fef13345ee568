"""Parameter groups: what is in them, and training with them."""

import pytest
import torch
from helpers.adapter_methods import needs_adapter_methods
from helpers.models import adapt, make_config, make_inputs, make_llava, trained_by
from helpers.trainers import make_trainer
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim import SGD, AdamW

from peft_m2pt import get_parameter_groups


RATES = {"visual_lr": 0.04, "textual_lr": 0.03, "interaction_lr": 0.02, "connector_lr": 0.01}


def names_of(model, groups):
    """The names of the parameters of each group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: [names[id(parameter)] for parameter in group["params"]] for group in groups}


def check_complete(model, groups):
    """Every trainable parameter is in one group, once."""
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def test_groups():
    peft_model = adapt(make_llava())
    groups = get_parameter_groups(peft_model, 0.1, **RATES)
    check_complete(peft_model, groups)
    names = names_of(peft_model, groups)
    assert list(names) == ["visual", "textual", "interaction", "connector"]
    assert all("vision_tower" in name and ".m2pt_prompt." in name for name in names["visual"])
    assert all("language_model" in name and ".m2pt_prompt." in name for name in names["textual"])
    assert all("language_model" in name and ".m2pt_interaction." in name for name in names["interaction"])
    assert all("multi_modal_projector.m2pt_connector" in name for name in names["connector"])
    assert [len(group) for group in names.values()] == [3, 3, 3, 4]
    assert [group["lr"] for group in groups] == list(RATES.values())
    assert {group["weight_decay"] for group in groups} == {0.0}


def test_one_rate_for_all_but_one():
    groups = get_parameter_groups(adapt(make_llava()), 0.1, connector_lr=0)
    assert {group["name"]: group["lr"] for group in groups} == {
        "visual": 0.1,
        "textual": 0.1,
        "interaction": 0.1,
        "connector": 0,
    }


def test_prompts_in_front_of_the_image_are_interaction_prompts():
    peft_model = adapt(make_llava(), interaction_placement="image")
    groups = get_parameter_groups(peft_model, 0.1)
    check_complete(peft_model, groups)
    assert names_of(peft_model, groups)["interaction"] == [
        "base_model.model.model.multi_modal_projector.m2pt_interaction.default.weight"
    ]


def test_weight_decay():
    """Neither prompts nor biases have any, whatever the optimizer takes where a group says nothing."""
    peft_model = adapt(make_llava(), modules_to_save=["lm_head", "language_model.norm"])
    groups = get_parameter_groups(peft_model, 0.1, connector_lr=0.2, weight_decay=0.3)
    check_complete(peft_model, groups)
    decay = {group["name"]: (group["lr"], group["weight_decay"]) for group in AdamW(groups).param_groups}
    assert decay == {
        "visual": (0.1, 0),
        "textual": (0.1, 0),
        "interaction": (0.1, 0),
        "connector": (0.2, 0.3),
        "connector_no_decay": (0.2, 0),
        "other": (0.1, 0.3),
        "other_no_decay": (0.1, 0),
    }
    names = names_of(peft_model, groups)
    assert all(name.endswith("bias") for name in names["connector_no_decay"])
    assert len(names["connector"]) == len(names["connector_no_decay"]) == 2
    assert names["other"] == ["base_model.model.lm_head.modules_to_save.default.weight"]
    assert names["other_no_decay"] == ["base_model.model.model.language_model.norm.modules_to_save.default.weight"]


def test_lora_beside_m2pt():
    lora = get_peft_model(make_llava(), LoraConfig(target_modules=["q_proj"]), adapter_name="lora")
    peft_model = get_peft_model(lora, make_config(), adapter_name="m2pt")
    groups = get_parameter_groups(peft_model, 0.1)
    check_complete(peft_model, groups)
    other = names_of(peft_model, groups)["other"]
    assert len(other) == 2 * (4 + 3)
    assert all(".lora_" in name for name in other)


def test_only_the_active_adapter():
    peft_model = adapt(make_llava())
    peft_model.add_adapter("other", make_config(num_visual_tokens=0, num_interaction_tokens=0))
    peft_model.set_adapter("other")
    groups = get_parameter_groups(peft_model, 0.1)
    check_complete(peft_model, groups)
    names = names_of(peft_model, groups)
    assert list(names) == ["textual", "connector"]
    assert all(".other." in name for group in names.values() for name in group)


@needs_adapter_methods
def test_adapter_of_transformers():
    model = make_llava()
    model.add_adapter(make_config())
    groups = get_parameter_groups(model, 0.1)
    check_complete(model, groups)
    assert len(groups) == 4


@pytest.mark.parametrize("number", [-1e-3, float("nan"), float("inf"), "1e-3", True], ids=repr)
@pytest.mark.parametrize("name", ["lr", "visual_lr", "textual_lr", "interaction_lr", "connector_lr", "weight_decay"])
def test_bad_numbers(name, number):
    with pytest.raises(ValueError, match=rf"^{name}={number!r} is not a finite number of at least 0"):
        get_parameter_groups(make_llava(), **{"lr": 0.1, name: number})


@pytest.mark.parametrize(
    "name, kwargs",
    {
        "visual_lr": {"num_visual_tokens": 0, "num_interaction_tokens": 0},
        "textual_lr": {"num_textual_tokens": 0, "num_interaction_tokens": 0},
        "interaction_lr": {"num_interaction_tokens": 0},
        "connector_lr": {"tune_connector": False},
    }.items(),
)
def test_rate_for_what_is_not_there(name, kwargs):
    kind = name.removesuffix("_lr")
    with pytest.raises(
        ValueError, match=rf"{name}=0.01.*the active adapters only train \['.*'\].*Leave {name} out"
    ) as info:
        get_parameter_groups(adapt(make_llava(), **kwargs), 0.1, **{name: 0.01})
    assert f"'{kind}'" not in str(info.value)


def test_nothing_to_train(tmp_path):
    message = "has no trainable weights of M2PT.*get_peft_model.*is_trainable=True"
    with pytest.raises(ValueError, match=f"LlavaForConditionalGeneration {message}"):
        get_parameter_groups(make_llava(), 0.1)
    adapt(make_llava()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"PeftModel {message}"):
        get_parameter_groups(PeftModel.from_pretrained(make_llava(), tmp_path), 0.1)
    assert get_parameter_groups(PeftModel.from_pretrained(make_llava(), tmp_path, is_trainable=True), 0.1)


def test_one_step():
    """Each group moves by its own rate."""
    peft_model = adapt(make_llava())
    before = {name: parameter.detach().clone() for name, parameter in peft_model.named_parameters()}
    groups = get_parameter_groups(peft_model, 0.1, **RATES)
    peft_model(**make_inputs()).loss.backward()
    SGD(groups).step()
    rates = {name: group["lr"] for group in groups for name in names_of(peft_model, [group])[group["name"]]}
    for name, parameter in peft_model.named_parameters():
        step = rates[name] * parameter.grad if name in rates else 0
        torch.testing.assert_close(parameter.detach(), before[name] - step, msg=name)
        assert torch.equal(parameter, before[name]) == (name not in rates), name


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_trainer(way, tmp_path):
    peft_model = adapt(make_llava(), modules_to_save=["lm_head"])
    groups = get_parameter_groups(peft_model, 0.05, connector_lr=0.01, weight_decay=0.1)
    values = {
        "optimizers": (AdamW(groups), None),
        "optimizer_cls_and_kwargs": (AdamW, {"params": groups}),
    }
    trainer = make_trainer(peft_model, tmp_path, weight_decay=0.5, **{way: values[way]})
    trainer.train()
    final = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert final["visual"]["initial_lr"] == 0.05 and final["connector"]["initial_lr"] == 0.01
    assert final["visual"]["weight_decay"] == 0 and final["connector"]["weight_decay"] == 0.1
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    assert len(trainer.optimizer.state) == len(trained) == len(trained_by(peft_model)) + 1
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
