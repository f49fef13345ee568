"""PEFT's tests of names, of files, and of the model card."""

import copy
import json
import warnings

import pytest
import torch
from helpers.models import adapt, make_config, make_inputs, make_llava, randomise, trained_by
from helpers.peft_suites import HEAD, KINDS, have_the_same_weights
from huggingface_hub import ModelCard
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration


class TestAdapterNames:
    @pytest.mark.parametrize("name", ["test-adapter", "self_attn", "weight", "base_layer", "linear_1"])
    def test_make_no_difference(self, name, tmp_path):
        """
        testing_common._test_adapter_name, test_custom_models.test_adapter_name_makes_no_difference,
        test_low_level_api.test_get_and_set_peft_model_state_dict_adapter_name_same_as_module_name
        """
        inputs = make_inputs()
        default = adapt(make_llava())
        expected = default(**inputs).logits
        peft_model = adapt(make_llava(), adapter_name=name)
        assert torch.equal(peft_model(**inputs).logits, expected)
        state_dict = get_peft_model_state_dict(peft_model, adapter_name=name)
        assert have_the_same_weights(state_dict, get_peft_model_state_dict(default))
        peft_model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_llava(), tmp_path / name, adapter_name=name)
        assert torch.equal(loaded(**inputs).logits, expected)

    def test_that_are_there_are_refused(self):
        """test_custom_models.test_add_adapter_rejects_duplicate_name_without_mutation"""
        peft_model = adapt(make_llava(), adapter_name="existing")
        config = peft_model.peft_config["existing"]
        state_dict = copy.deepcopy(peft_model.state_dict())
        with pytest.raises(ValueError, match="'existing' already exists"):
            peft_model.add_adapter("existing", make_config(num_textual_tokens=7))
        assert peft_model.peft_config["existing"] is config
        assert have_the_same_weights(peft_model.state_dict(), state_dict)

    def test_that_are_parts_of_others(self, tmp_path):
        """testing_common._test_save_pretrained_adapter_name_substring"""
        peft_model = adapt(make_llava(), **HEAD)
        expected = get_peft_model_state_dict(peft_model)
        for name in ("default2", "other_default", "foodefault_bar", "efaul"):
            peft_model.add_adapter(name, make_config(**HEAD))
        peft_model.save_pretrained(tmp_path, selected_adapters=["default"])
        assert have_the_same_weights(load_file(tmp_path / "adapter_model.safetensors"), expected)


class TestSaving:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
    def test_selected_adapters(self, kind, safe, tmp_path):
        """testing_common._test_save_pretrained_selected_adapters, _test_save_pretrained (safe_serialization=False)"""
        peft_model = adapt(make_llava(), **KINDS[kind])
        peft_model.add_adapter("other", make_config(**KINDS[kind]))
        randomise(peft_model, seed=3)
        peft_model.save_pretrained(tmp_path, safe_serialization=safe)
        files = {"adapter_config.json", "adapter_model.safetensors" if safe else "adapter_model.bin"}
        assert {path.name for path in tmp_path.iterdir()} == files | {"README.md", "other"}
        assert {path.name for path in (tmp_path / "other").iterdir()} == files

        loaded = PeftModel.from_pretrained(make_llava(), tmp_path)
        result = loaded.load_adapter(tmp_path / "other", "other")
        assert not result.missing_keys and not result.unexpected_keys
        assert have_the_same_weights(loaded.state_dict(), peft_model.state_dict())

        peft_model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
        assert {path.name for path in (tmp_path / "one").iterdir()} == {"README.md", "other"}

    def test_passed_config(self, tmp_path):
        """testing_common._test_from_pretrained_config_construction, as far as it can hold"""
        adapt(make_llava()).save_pretrained(tmp_path)
        config = make_config(init_prompts="normal")
        loaded = PeftModel.from_pretrained(make_llava(), tmp_path, config=config)
        assert loaded.peft_config["default"] is config
        assert loaded.peft_config["default"].inference_mode and loaded.peft_config["default"].init_prompts == "normal"

    def test_device_map(self, tmp_path):
        """testing_common._test_peft_model_device_map"""
        peft_model = adapt(make_llava())
        peft_model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_llava(), tmp_path, device_map={"": "cpu"})
        inputs = make_inputs()
        assert torch.equal(loaded(**inputs).logits, peft_model(**inputs).logits)

    @pytest.mark.parametrize("kind", KINDS)
    def test_low_cpu_mem_usage(self, kind, tmp_path):
        """testing_common._test_load_model_low_cpu_mem_usage"""
        adapt(make_llava(), **KINDS[kind]).save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_llava(), tmp_path, low_cpu_mem_usage=True)
        loaded.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=True)
        assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
        injected = inject_adapter_in_model(make_config(**KINDS[kind]), make_llava(), low_cpu_mem_usage=True)
        assert {parameter.device.type for parameter in trained_by(injected).values()} == {"meta"}

    @pytest.mark.parametrize("autocast", [True, False])
    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_dtype(self, dtype, low_cpu_mem_usage, autocast, tmp_path):
        """test_custom_models.test_adapter_dtype_autocast"""
        expected = {torch.float32 if autocast else dtype}
        peft_model = get_peft_model(make_llava().to(dtype), make_config(), autocast_adapter_dtype=autocast)
        peft_model.add_adapter("other", make_config(), autocast_adapter_dtype=autocast)
        assert {parameter.dtype for parameter in trained_by(peft_model).values()} == expected
        peft_model.save_pretrained(tmp_path)
        arguments = {"autocast_adapter_dtype": autocast, "low_cpu_mem_usage": low_cpu_mem_usage}
        loaded = PeftModel.from_pretrained(make_llava().to(dtype), tmp_path, **arguments)
        loaded.load_adapter(tmp_path / "other", "other", **arguments)
        assert {parameter.dtype for parameter in trained_by(loaded).values()} == expected

    def test_auto_classes(self, tmp_path):
        """test_auto.test_peft_model"""
        make_llava().save_pretrained(tmp_path / "base")
        peft_model = adapt(LlavaForConditionalGeneration.from_pretrained(tmp_path / "base"))
        peft_model.save_pretrained(tmp_path / "adapter")
        inputs = make_inputs()
        expected = peft_model(**inputs).logits
        for auto_class in (AutoPeftModel, AutoModelForImageTextToText):
            assert torch.equal(auto_class.from_pretrained(tmp_path / "adapter")(**inputs).logits, expected)


class TestModelCard:
    def test_is_written(self, tmp_path):
        """test_hub_features.test_model_card_has_expected_tags, test_custom_models.test_non_existing_model_card"""
        model = make_llava()
        model.add_model_tags(["multimodal"])
        model.save_pretrained(tmp_path / "base")
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
        model.add_model_tags(["multimodal"])
        adapt(model).save_pretrained(tmp_path / "adapter")
        card = ModelCard.load(tmp_path / "adapter" / "README.md")
        # The Hub refuses cards whose base model is a folder, so it is in the text alone.
        assert card.data.library_name == "peft" and str(tmp_path / "base") in card.text
        assert {"transformers", "multimodal"} <= set(card.data.tags)
        assert len(card.text) > 1000

    def test_is_kept(self, tmp_path):
        """test_custom_models.test_existing_model_card"""
        (tmp_path / "README.md").write_text("---\nmeta: hello\n---\nThis is a model card\n")
        adapt(make_llava()).save_pretrained(tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert all(part in text for part in ("library_name: peft", "meta: hello", "This is a model card"))

    def test_local_base_model(self, tmp_path):
        """test_hub_features.test_local_model_saving_no_warning"""
        make_llava().save_pretrained(tmp_path)
        peft_model = adapt(LlavaForConditionalGeneration.from_pretrained(tmp_path))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            peft_model.save_pretrained(tmp_path)
        assert not [warning for warning in caught if "Could not find a config file" in str(warning.message)]

    def test_method_as_a_string(self, tmp_path):
        """test_hub_features.test_custom_peft_type_does_not_raise"""
        config = make_config()
        config.peft_type = "M2PT"
        get_peft_model(make_llava(), config).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "M2PT"

    def test_revision(self, tmp_path):
        """test_hub_features.TestBaseModelRevision"""
        get_peft_model(make_llava(), make_config(), revision="v2").save_pretrained(tmp_path)
        assert PeftConfig.from_pretrained(tmp_path).revision == "v2"
