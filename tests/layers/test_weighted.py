"""`add_weighted_adapter`: new adapters out of others."""

import pytest
import torch
from helpers.models import adapt, make_config, make_inputs, make_llava, randomise, without_labels
from peft import PeftModel


PROMPTS_ALONE = {"tune_connector": False}


def check_saved(peft_model, name, folder):
    """An adapter gives the same logits when it is loaded."""
    peft_model.set_adapter(name)
    inputs = without_labels(make_inputs())
    expected = peft_model(**inputs).logits
    peft_model.save_pretrained(folder, selected_adapters=[name])
    loaded = PeftModel.from_pretrained(make_llava(), folder / name)
    assert torch.equal(loaded(**inputs).logits, expected)


def make_two(first=None, second=None):
    peft_model = adapt(make_llava(), **(first or {}))
    peft_model.add_adapter("second", make_config(**((first or {}) if second is None else second)))
    randomise(peft_model, seed=3)
    return peft_model.eval()


def weights_of(peft_model, adapter):
    mark = f".{adapter}."
    return {
        name.replace(mark, "."): parameter.detach()
        for name, parameter in peft_model.named_parameters()
        if "m2pt_" in name and mark in name
    }


@torch.no_grad()
def test_cat_of_visual_prompts_equals_both_at_once():
    # Visual prompts have no position, so it makes no difference whose they are.
    only_visual = {"num_textual_tokens": 0, "num_interaction_tokens": 0, **PROMPTS_ALONE}
    peft_model = make_two(only_visual, {**only_visual, "num_visual_tokens": 6})
    peft_model.add_weighted_adapter(["default", "second"], adapter_name="both", combination_type="cat")
    inputs = without_labels(make_inputs("left"))
    peft_model.set_adapter("both")
    logits = peft_model(**inputs).logits
    peft_model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits, peft_model(**inputs).logits)
    assert peft_model.peft_config["both"].num_visual_tokens == 10


def test_cat_puts_all_prompts_side_by_side(tmp_path):
    peft_model = make_two(PROMPTS_ALONE, {**PROMPTS_ALONE, "num_textual_tokens": 5})
    peft_model.add_weighted_adapter(["second", "default"], adapter_name="both", combination_type="cat")
    first, second, both = (weights_of(peft_model, name) for name in ("default", "second", "both"))
    assert first.keys() == second.keys() == both.keys()
    for name, weight in both.items():
        assert torch.equal(weight, torch.cat([second[name], first[name]]))
    assert peft_model.active_adapters == ["default"]

    check_saved(peft_model, "both", tmp_path)


def test_linear():
    peft_model = make_two()
    peft_model.add_weighted_adapter(["default", "second"], [0.25, 0.5], "mixed")
    base = dict(make_llava().model.multi_modal_projector.named_parameters())
    first, second, mixed = (weights_of(peft_model, name) for name in ("default", "second", "mixed"))
    assert any("m2pt_connector" in name for name in mixed)
    for name, weight in mixed.items():
        if "m2pt_connector" in name:
            frozen = base[name.rpartition("m2pt_connector_")[2]]
            expected = frozen + 0.25 * (first[name] - frozen) + 0.5 * (second[name] - frozen)
        else:
            expected = 0.25 * first[name] + 0.5 * second[name]
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"adapter_name": "second"}, "adapter_name='second': there is already an adapter of this name"),
        ({"adapters": ["default", "nobody"]}, r"\['nobody'\] is not the name of an adapter"),
        ({"adapters": []}, "nothing is not the name of an adapter"),
        ({"combination_type": "svd"}, r"combination_type='svd' is unknown. Choose one of \('cat', 'linear'\)"),
        ({"weights": [1.0]}, r"weights=\[1.0\] has 1 weights for 2 adapters"),
        ({"weights": [1.0, 2.0], "combination_type": "cat"}, "concatenates prompts, without weights"),
        ({"combination_type": "cat"}, "each tuned the connector.*tune_connector=False, or choose .*'linear'"),
    ],
)
def test_wrong_arguments(kwargs, message):
    peft_model = make_two()
    before = set(peft_model.state_dict())
    arguments = {"adapters": ["default", "second"], "adapter_name": "new", "combination_type": "linear"}
    with pytest.raises(ValueError, match=message):
        peft_model.add_weighted_adapter(**{**arguments, **kwargs})
    assert set(peft_model.state_dict()) == before
    assert set(peft_model.peft_config) == {"default", "second"}


@pytest.mark.parametrize(
    "first, second, message",
    [
        (PROMPTS_ALONE, {**PROMPTS_ALONE, "num_visual_tokens": 6}, r"equal shape, .*\[\[4, 32\]\].*\[\[6, 32\]\]"),
        (PROMPTS_ALONE, {**PROMPTS_ALONE, "textual_layers": [0]}, r"layers.1.self_attn': the adapters \['second'\]"),
        (PROMPTS_ALONE, {}, r"differ in tune_connector: \[False, True\]"),
        ({"connector_rank": 8}, {}, r"connector_rank=\[8, None\], and a full copy \(None\) cannot be combined"),
    ],
)
def test_adapters_that_do_not_fit_together(first, second, message):
    peft_model = make_two(first, second)
    with pytest.raises(ValueError, match=message):
        peft_model.add_weighted_adapter(["default", "second"], adapter_name="new")


@torch.no_grad()
def test_low_rank_updates_of_connectors_add_up(tmp_path):
    peft_model = make_two({"connector_rank": 2}, {"connector_rank": 3})
    peft_model.add_weighted_adapter(["default", "second"], [0.7, -0.2], "mixed")
    assert peft_model.peft_config["mixed"].connector_rank == 5

    def updates(adapter):
        parts = weights_of(peft_model, adapter)
        downs = {name: weight for name, weight in parts.items() if "lora_A" in name}
        return {name: parts[name.replace("lora_A", "lora_B")] @ down for name, down in downs.items()}

    first, second, mixed = (updates(name) for name in ("default", "second", "mixed"))
    assert len(mixed) == 2
    for name, update in mixed.items():
        torch.testing.assert_close(update, 0.7 * first[name] - 0.2 * second[name])
    check_saved(peft_model, "mixed", tmp_path)


@pytest.mark.parametrize("owner", ["default", "second"])
def test_modules_to_save_of_one_adapter(owner):
    """What only one of them has trained goes along, as a copy."""
    peft_model = adapt(
        make_llava(), **PROMPTS_ALONE, **({"modules_to_save": ["lm_head"]} if owner == "default" else {})
    )
    saved = {} if owner == "default" else {"modules_to_save": ["lm_head"]}
    peft_model.add_adapter("second", make_config(**PROMPTS_ALONE, **saved))
    randomise(peft_model, seed=3)
    head = peft_model.get_base_model().lm_head
    with torch.no_grad():
        head.modules_to_save[owner].weight.mul_(1.5)
    peft_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mixed")
    assert peft_model.peft_config["mixed"].modules_to_save == ["lm_head"]
    assert torch.equal(head.modules_to_save["mixed"].weight, head.modules_to_save[owner].weight)
    assert not head.modules_to_save["mixed"].weight.requires_grad
    peft_model.set_adapter("mixed")
    assert torch.equal(head(torch.eye(48)), head.modules_to_save[owner](torch.eye(48)))
    with torch.no_grad():
        head.modules_to_save["mixed"].weight.zero_()
    assert head.modules_to_save[owner].weight.any()


def test_modules_to_save_of_a_combined_adapter_are_saved(tmp_path):
    peft_model = adapt(make_llava(), **PROMPTS_ALONE, modules_to_save=["lm_head"])
    peft_model.add_adapter("second", make_config(**PROMPTS_ALONE))
    randomise(peft_model, seed=3)
    with torch.no_grad():
        peft_model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    peft_model.add_weighted_adapter(["second", "default"], adapter_name="mixed", combination_type="cat")
    peft_model.set_adapter("mixed")
    inputs = without_labels(make_inputs())
    expected = peft_model.eval()(**inputs).logits
    peft_model.save_pretrained(tmp_path, selected_adapters=["mixed"])
    loaded = PeftModel.from_pretrained(make_llava(), tmp_path / "mixed")
    torch.testing.assert_close(loaded(**inputs).logits, expected)


def test_modules_to_save_of_several_adapters():
    peft_model = adapt(make_llava(), **PROMPTS_ALONE, modules_to_save=["lm_head"])
    peft_model.add_adapter("second", make_config(**PROMPTS_ALONE, modules_to_save=["lm_head"]))
    message = r"\['default', 'second'\] have each trained 'lm_head' \(modules_to_save\)"
    with pytest.raises(ValueError, match=message):
        peft_model.add_weighted_adapter(["default", "second"], adapter_name="new")
    assert set(peft_model.peft_config) == {"default", "second"}
