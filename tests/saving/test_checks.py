"""Saving and loading, and adapters that do not fit."""

import json
import re

import pytest
import torch
from helpers.models import adapt, make_config, make_inputs, make_llava, randomise, trained_by
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from peft_m2pt import M2PTConfig


WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    peft_model = adapt(make_llava())
    peft_model.save_pretrained(tmp_path)
    return peft_model, tmp_path


def test_layout_is_that_of_peft(saved):
    peft_model, folder = saved
    names = {name.replace(".default.", ".") for name in trained_by(peft_model)}
    assert load_file(folder / WEIGHTS).keys() == names
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "M2PT"
    assert config["task_type"] is None
    assert config["auto_mapping"]["base_model_class"] == "LlavaForConditionalGeneration"
    assert "target_modules" not in config


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_round_trip(saved, is_trainable, low_cpu_mem_usage):
    peft_model, folder = saved
    inputs = make_inputs("left")
    loaded = PeftModel.from_pretrained(
        make_llava(), folder, is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
    )
    for name, prompt in trained_by(loaded).items():
        assert torch.equal(prompt, trained_by(peft_model)[name])
        assert prompt.requires_grad == is_trainable
    assert torch.equal(loaded(**inputs).logits, peft_model(**inputs).logits)
    if is_trainable:
        loaded(**inputs).loss.backward()
        assert all(prompt.grad.abs().max() > 0 for prompt in trained_by(loaded).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_round_trip_on_a_half_precision_base(tmp_path, dtype):
    peft_model = adapt(make_llava().to(dtype))
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llava().to(dtype), tmp_path)
    inputs = make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    assert torch.equal(loaded(**inputs).logits, peft_model(**inputs).logits)
    assert {prompt.dtype for prompt in trained_by(loaded).values()} == {torch.float32}


def test_modules_to_save_are_saved(tmp_path):
    peft_model = adapt(make_llava(), modules_to_save=["lm_head", "multi_modal_projector"], tune_connector=False)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    peft_model.save_pretrained(tmp_path)
    inputs = make_inputs()
    loaded = PeftModel.from_pretrained(make_llava(), tmp_path)
    assert torch.equal(loaded(**inputs).logits, peft_model(**inputs).logits)
    with loaded.disable_adapter():
        assert torch.equal(loaded(**inputs).logits, make_llava()(**inputs).logits)


def test_another_name_and_a_second_adapter(saved):
    peft_model, folder = saved
    inputs = make_inputs()
    loaded = PeftModel.from_pretrained(make_llava(), folder, adapter_name="first")
    loaded.load_adapter(folder, adapter_name="second")
    expected = peft_model(**inputs).logits
    assert torch.equal(loaded(**inputs).logits, expected)
    loaded.set_adapter("second")
    assert torch.equal(loaded(**inputs).logits, expected)
    loaded.delete_adapter("first")
    assert torch.equal(loaded(**inputs).logits, expected)


def test_loading_over_an_adapter(saved):
    peft_model, _ = saved
    other = get_peft_model(make_llava(), make_config())
    set_peft_model_state_dict(other, get_peft_model_state_dict(peft_model))
    inputs = make_inputs()
    assert torch.equal(other(**inputs).logits, peft_model(**inputs).logits)


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder, *parts, model=None):
    with pytest.raises(ValueError) as error:
        PeftModel.from_pretrained(model or make_llava(), folder)
    for part in parts:
        assert part in str(error.value)


def test_other_numbers_of_prompts_are_refused(saved):
    _, folder = saved
    change_config(folder, num_visual_tokens=7, num_textual_tokens=2)
    refused(
        folder,
        "The weights of adapter 'default' do not fit the model",
        "visual prompt of layer 0 ('model.vision_tower.encoder.layers.0.self_attn'): "
        "expected shape [7, 32], found shape [4, 32]",
        "textual prompt of layer 2 ('model.language_model.layers.2.self_attn'): "
        "expected shape [2, 48], found shape [3, 48]",
    )


def test_missing_prompts_are_refused(saved):
    _, folder = saved
    weights = load_file(folder / WEIGHTS)
    missing = next(name for name in weights if "language_model.layers.1.self_attn.m2pt_prompt" in name)
    save_file({name: weight for name, weight in weights.items() if name != missing}, folder / WEIGHTS)
    refused(folder, "textual prompt of layer 1", "expected shape [3, 48], found nothing")


def test_another_connector_is_refused(saved):
    _, folder = saved
    change_config(folder, connector_rank=2, num_interaction_tokens=5)
    refused(
        folder,
        "connector weight 'linear_1_lora_A.weight' ('model.multi_modal_projector'): "
        "expected shape [2, 32], found nothing",
        "interaction prompt of layer 0 ('model.language_model.layers.0.self_attn'): "
        "expected shape [5, 32], found shape [2, 32]",
    )


def test_surplus_prompts_are_refused(saved):
    _, folder = saved
    change_config(folder, visual_layers=[0, 1])
    refused(
        folder, "vision_tower.encoder.layers.2.self_attn.m2pt_prompt.weight': expected nothing, found shape [4, 32]"
    )


def test_the_adapter_of_another_model_is_refused(saved):
    _, folder = saved
    other = make_llava(vision_feature_layer=-1)
    refused(folder, "visual prompt of layer 3", "expected shape [4, 32], found nothing", model=other)


@pytest.mark.parametrize(
    "name", ["model.language_model.layers.0.mlp.up_proj.weight", "model.language_model.norm.weight"]
)
def test_weights_of_the_base_model_are_refused(saved, name):
    _, folder = saved
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, f"base_model.model.{name}": torch.zeros(2)}, folder / WEIGHTS)
    refused(folder, f"'{name}': expected nothing, found shape [2]")


def test_weights_that_are_no_numbers_are_refused(saved):
    _, folder = saved
    weights = load_file(folder / WEIGHTS)
    name = next(name for name in weights if "vision_tower.encoder.layers.0" in name)
    save_file({**weights, name: weights[name].to(torch.int32)}, folder / WEIGHTS)
    refused(folder, "visual prompt of layer 0", "expected shape [4, 32], found shape [4, 32], torch.int32")


def test_embeddings_that_were_saved_with_the_adapter(tmp_path):
    peft_model = adapt(make_llava())
    peft_model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(make_llava(), tmp_path)
    inputs = make_inputs()
    assert torch.equal(loaded(**inputs).logits, peft_model(**inputs).logits)


def test_long_lists_of_problems_are_cut(saved):
    _, folder = saved
    save_file({f"base_model.model.unknown.{i}": torch.zeros(1) for i in range(20)}, folder / WEIGHTS)
    with pytest.raises(ValueError) as error:
        PeftModel.from_pretrained(make_llava(), folder)
    assert re.search(r"\n- and \d\d more\n", str(error.value))


def test_a_loaded_config_serves_for_new_adapters(saved):
    """PEFT changes the config of an adapter when it saves it, and trainers add adapters with the config of another."""
    peft_model, folder = saved
    loaded = PeftModel.from_pretrained(make_llava(), folder)
    loaded.save_pretrained(folder / "again")
    (folder / "again" / WEIGHTS).unlink()
    torch.manual_seed(3)
    loaded.add_adapter("new", loaded.peft_config["default"])
    expected = {
        name.replace(".default.", "."): weight.shape
        for name, weight in trained_by(loaded).items()
        if ".default." in name
    }
    prompts = {
        name: weight for name, weight in trained_by(loaded).items() if ".new." in name and "connector" not in name
    }
    assert {name.replace(".new.", ".") for name in trained_by(loaded) if ".new." in name} == set(expected)
    for weight in prompts.values():
        bound = (6 / (weight.shape[0] + 1) / weight.shape[1]) ** 0.5
        assert 0.5 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("persistent", [False, True])
def test_buffers_of_the_connector(tmp_path, persistent):
    class Scaled(torch.nn.Linear):
        def __init__(self):
            super().__init__(32, 48)
            self.register_buffer("scale", torch.full((48,), 3.0), persistent=persistent)
            self.register_buffer("count", torch.tensor(7), persistent=persistent)

        def forward(self, features):
            return super().forward(features) * self.scale

    def make():
        model = make_llava()
        torch.manual_seed(1)
        model.model.multi_modal_projector.linear_1 = Scaled()
        return model

    peft_model = adapt(make())
    inputs = make_inputs()
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, peft_model(**inputs).logits)


class Wrapper(nn.Module):
    """No model of transformers, but one is in it."""

    def __init__(self):
        super().__init__()
        self.inner = make_llava().model.language_model

    def forward(self, input_ids):
        return self.inner(input_ids=input_ids).last_hidden_state


def test_a_plain_module(tmp_path):
    config = M2PTConfig(num_visual_tokens=0, num_textual_tokens=3, text_decoder="inner")
    model = get_peft_model(Wrapper(), config).eval()
    randomise(model, seed=2)
    input_ids = make_inputs()["input_ids"].clamp(max=90)
    expected = model(input_ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Wrapper(), tmp_path)
    assert torch.equal(loaded(input_ids), expected)
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert torch.equal(loaded(input_ids), expected)


@pytest.mark.parametrize("content", [{"foo": "bar", "baz": 123}, {"num_visual_tokens": 3}, {}])
def test_a_config_that_names_no_method(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    message = "The M2PTConfig config that is trying to be loaded is missing required keys: {'peft_type'}."
    with pytest.raises(TypeError, match=message) as error:
        M2PTConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
