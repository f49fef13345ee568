"""
What PEFT's own tests ask of every method, asked of this one.

Each test names the upstream tests whose behaviour it checks. What is checked elsewhere is not repeated here:

- of tests/test_config.py all, in `test_config.py` and `test_registration.py`;
- of tests/testing_common.py `_test_training` and `_test_training_gradient_checkpointing` (`test_training.py`);
  `_test_unload_adapter` and the tests of merging, which is refused (`test_adapters.py`); `_test_save_pretrained`,
  `_test_inference_safetensors` and `_test_load_multiple_adapters` (`test_saving.py`); `_test_generate` and
  `_test_passing_input_embeds_works` (`test_invisible.py`);
- of tests/test_custom_models.py `test_forward_float16` and its like, and `test_only_params_are_updated`
  (`test_training.py`); `test_save_load_roundtrip` and `test_parameters_after_loading_model` (`test_saving.py`);
  `test_disable_adapters` (`test_adapters.py`);
- of the tests of batches with several adapters all, in `test_samples.py`;
- of tests/test_tuners_utils.py `TestExcludedModuleNames` (`test_refusals.py`).

One upstream test cannot pass: `test_in_features_out_features_exposed` is about linear layers.
"""

import copy
import json
import warnings

import pytest
import torch
import torch.distributed as dist
from huggingface_hub import ModelCard
from models import adapt, make_config, make_inputs, make_llava, randomise, trained_by, without_labels
from peft import (
    AutoPeftModel,
    PeftConfig,
    PeftModel,
    convert_to_lora,
    get_base_model_state_dict,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from peft_m2pt import M2PTConfig, UnsupportedModelError
from peft_m2pt.adapted import layer_of


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
KINDS = {
    "layers": {},
    "low rank": {"connector_rank": 2},
    "frozen connector": {"tune_connector": False},
    "lm_head": {"modules_to_save": ["lm_head"]},
}
HEAD = {"modules_to_save": ["lm_head"]}


def make_llama(model_class=LlamaForCausalLM, **kwargs):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2, **SMALL, **kwargs
    )
    return model_class(config).eval()


def make_vit():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, initializer_range=0.2, **SMALL)).eval()


def tuner_layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapters_with_gradients(model):
    return {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}


def text_layers(peft_model):
    return peft_model.get_base_model().model.language_model.layers


def have_the_same_weights(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


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


class TestDeleting:
    @pytest.mark.parametrize("active", [True, False])
    @pytest.mark.parametrize("kind", KINDS)
    def test_leaves_nothing(self, kind, active):
        """
        testing_common._test_delete_adapter, _test_delete_inactive_adapter,
        test_custom_models.test_delete_adapter_properly_cleans_up_after_itself
        """
        inputs = make_inputs()
        peft_model = adapt(make_llava(), **KINDS[kind])
        expected = peft_model(**inputs).logits
        before = peft_model.state_dict().keys()
        peft_model.add_adapter("other", make_config(**KINDS[kind]))
        if active:
            peft_model.set_adapter("other")
        peft_model.delete_adapter("other")
        assert list(peft_model.peft_config) == ["default"] and peft_model.active_adapters == ["default"]
        assert peft_model.state_dict().keys() == before
        assert torch.equal(peft_model(**inputs).logits, expected)

        peft_model.delete_adapter("default")
        assert not peft_model.peft_config and peft_model.active_adapters == []
        assert not trained_by(peft_model)
        for module in peft_model.modules():
            if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
                assert module._get_available_adapters() == set() and module.active_adapters == []
        assert torch.equal(peft_model.base_model(**inputs).logits, make_llava()(**inputs).logits)

    @pytest.mark.parametrize("kind", ["layers", "low rank", "frozen connector"])
    def test_all_and_adding_one(self, kind):
        """testing_common._test_delete_adapter: a model without adapters is no dead end"""
        inputs = make_inputs()
        peft_model = adapt(make_llava(), **KINDS[kind])
        expected = peft_model(**inputs).logits
        peft_model.delete_adapter("default")
        peft_model.add_adapter("again", make_config(**KINDS[kind]))
        peft_model.set_adapter("again")
        randomise(peft_model, seed=2)
        assert torch.equal(peft_model(**inputs).logits, expected)

    def test_unknown_adapters_are_refused(self):
        """testing_common._test_delete_unknown_adapter_raises"""
        with pytest.raises(ValueError, match="Adapter unknown-adapter does not exist"):
            adapt(make_llava()).delete_adapter("unknown-adapter")

    def test_the_next_adapter_becomes_active(self):
        """test_custom_models.test_delete_adapter_with_multiple_adapters_works, ..._with_modules_to_save"""
        inputs = make_inputs()
        peft_model = adapt(make_llava(), adapter_name="a", **HEAD)
        peft_model.add_adapter("b", make_config())
        peft_model.add_adapter("c", make_config(**HEAD))
        head = peft_model.get_base_model().lm_head
        for name, active, heads in (("a", ["b"], {"c"}), ("b", ["c"], {"c"}), ("c", [], set())):
            peft_model(**inputs)
            peft_model.delete_adapter(name)
            assert peft_model.active_adapters == active and set(head.modules_to_save) == heads

    def test_adding_it_again(self):
        """test_initialization.test_second_adapter_overlapping_target_modules_after_delete_and_readd"""
        config = {"num_textual_tokens": 5, "textual_layers": [1, 2]}
        inputs = make_inputs()
        peft_model = adapt(make_llava())
        for _ in range(2):
            peft_model.add_adapter("other", make_config(**config))
            peft_model.set_adapter("other")
            randomise(peft_model, seed=6)
            alone = get_peft_model(make_llava(), make_config(**config), adapter_name="other")
            weights = get_peft_model_state_dict(peft_model, adapter_name="other")
            assert not set_peft_model_state_dict(alone, weights, adapter_name="other").unexpected_keys
            assert torch.equal(peft_model(**inputs).logits, alone(**inputs).logits)
            peft_model.delete_adapter("other")


class TestActiveAdapters:
    def test_are_those_that_were_set(self):
        """test_custom_models.test_active_adapter"""
        peft_model = adapt(make_llava())
        peft_model.add_adapter("other", make_config())
        assert peft_model.active_adapters == ["default"]
        peft_model.set_adapter("other")
        assert peft_model.active_adapters == ["other"] and peft_model.active_adapter == "other"
        peft_model.base_model.set_adapter(["default", "other"])
        assert peft_model.active_adapters == peft_model.base_model.active_adapter == ["default", "other"]

    def test_in_other_layers(self):
        """test_custom_models.test_set_adapter_non_overlapping_modules"""
        peft_model = adapt(make_llava(), textual_layers=[0, 1])
        peft_model.add_adapter("other", make_config(textual_layers=[1, 2], num_textual_tokens=5))
        for set_adapter in (peft_model.set_adapter, lambda name: peft_model.base_model.set_adapter([name])):
            for name, lengths in (("default", [3, 3]), ("other", [5, 5])):
                set_adapter(name)
                layers = [layer_of(layer.self_attn) for layer in text_layers(peft_model)]
                assert all(layer.active_adapters == [name] for layer in layers)
                prompts = [layer.m2pt_prompt[name] for layer in layers if name in layer.m2pt_prompt]
                assert [len(prompt) for prompt in prompts] == lengths

    def test_of_modules_to_save(self):
        """
        test_custom_models.test_set_adapter_non_overlapping_modules_to_save,
        test_multiple_adapters_mixed_modules_to_save
        """
        inputs = make_inputs()
        peft_model = adapt(make_llava())
        peft_model.add_adapter("other", make_config(**HEAD))
        head = peft_model.get_base_model().lm_head
        for set_adapter in (peft_model.set_adapter, lambda name: peft_model.base_model.set_adapter([name])):
            for name, active in (("default", []), ("other", ["other"]), ("default", [])):
                set_adapter(name)
                assert head.active_adapters == active and set(head.modules_to_save) == {"other"}
                assert head.modules_to_save["other"].weight.requires_grad == bool(active)
                assert peft_model(**inputs).logits.isfinite().all()

    def test_modules_to_save_are_only_copied_where_needed(self):
        """test_custom_models.test_multiple_adapters_no_needless_copy_modules_to_save"""
        peft_model = adapt(make_llava(), modules_to_save=["embed_tokens"])
        peft_model.add_adapter("other", make_config(**HEAD))
        model = peft_model.get_base_model()
        assert list(model.lm_head.modules_to_save) == ["other"]
        assert list(model.model.language_model.embed_tokens.modules_to_save) == ["default"]

    @pytest.mark.parametrize("other", ["lm_head", "embed_tokens"])
    def test_two_at_once_with_modules_to_save(self, other):
        """test_custom_models.test_multiple_active_adapters_with_{same,different}_modules_to_save_*"""
        peft_model = adapt(make_llava(), tune_connector=False, **HEAD)
        peft_model.add_adapter("other", make_config(tune_connector=False, modules_to_save=[other]))
        if other == "lm_head":
            with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
                peft_model.base_model.set_adapter(["default", "other"])
        else:
            peft_model.base_model.set_adapter(["default", "other"])
            peft_model(**make_inputs()).loss.backward()
            assert all(parameter.grad is not None for parameter in peft_model.parameters() if parameter.requires_grad)

    def test_two_at_once(self):
        """test_custom_models.test_multiple_active_adapters_forward: tokens see the prompts of both"""
        inputs = make_inputs()
        visual = {"num_textual_tokens": 0, "num_interaction_tokens": 0, "tune_connector": False}
        peft_model = adapt(make_llava(), **visual)
        peft_model.add_adapter("other", make_config(**{**visual, "num_visual_tokens": 2}))
        randomise(peft_model, seed=2)
        one = peft_model(**inputs).logits
        peft_model.set_adapter("other")
        other = peft_model(**inputs).logits
        peft_model.base_model.set_adapter(["default", "other"])
        together = peft_model(**inputs).logits

        expected = adapt(make_llava(), **{**visual, "num_visual_tokens": 6})
        prompts = trained_by(peft_model)
        with torch.no_grad():
            for name, prompt in trained_by(expected).items():
                prompt.copy_(torch.cat([prompts[name], prompts[name.replace(".default.", ".other.")]]))
        torch.testing.assert_close(together, expected(**inputs).logits)
        for alone in (one, other):
            assert not torch.allclose(together, alone, atol=1e-3)

    @pytest.mark.parametrize("first", ["default", "other"])
    def test_with_modules_to_save_of_one(self, first):
        """test_custom_models.test_multiple_adapters_mixed_modules_to_save, ..._order_switched"""
        configs = {"default": make_config(**HEAD), "other": make_config()}
        peft_model = get_peft_model(make_llava(), configs.pop(first), adapter_name=first)
        (second,) = configs
        peft_model.add_adapter(second, configs[second])
        with torch.no_grad():
            peft_model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
        outputs = {}
        for name in ("default", "other", "default"):
            peft_model.set_adapter(name)
            outputs[name] = peft_model(output_hidden_states=True, **make_inputs())
            weight = make_llava().lm_head.weight * (2 if name == "default" else 1)
            expected = outputs[name].hidden_states[-1] @ weight.T
            torch.testing.assert_close(outputs[name].logits, expected, atol=1e-4, rtol=1e-4)

    def test_of_loaded_modules_to_save(self, tmp_path):
        """test_other.test_load_multiple_adapters_different_modules_to_save"""
        names = {"first": ["0.mlp.up_proj"], "second": ["0.mlp.up_proj"], "third": ["1.mlp.up_proj"]}
        outputs = {}
        for seed, name in enumerate(names):
            peft_model = adapt(make_llava(), modules_to_save=names[name])
            randomise(peft_model, seed=seed)
            with torch.no_grad():
                for parameter_name, parameter in peft_model.named_parameters():
                    if "modules_to_save" in parameter_name:
                        parameter.mul_(2 + seed)
            outputs[name] = peft_model(**make_inputs()).logits
            peft_model.save_pretrained(tmp_path / name)
        loaded = PeftModel.from_pretrained(make_llava(), tmp_path / "first", adapter_name="first")
        for name in ("second", "third"):
            loaded.load_adapter(tmp_path / name, name)
        for name in (*names, *reversed(names)):
            loaded.set_adapter(name)
            assert torch.equal(loaded(**make_inputs()).logits, outputs[name]), name


class TestDisabling:
    def test_leaves_what_was_disabled(self):
        """test_custom_models.test_disable_adapters_exiting_context_restores_previous_state"""
        peft_model = adapt(make_llava())
        for disable in (False, True):
            if disable:
                peft_model.disable_adapter_layers()
            with peft_model.disable_adapter():
                assert all(layer.disable_adapters for layer in tuner_layers(peft_model))
            assert all(layer.disable_adapters == disable for layer in tuner_layers(peft_model))

    def test_some_layers(self):
        """test_custom_models.test_disable_adapters_exiting_context_irregular_state, TestModelAndLayerStatus"""
        peft_model = adapt(make_llava())
        tuner_layers(peft_model)[0].enable_adapters(False)
        assert peft_model.get_model_status().enabled == "irregular"
        with pytest.warns(UserWarning, match="some adapter layers that are enabled and others that are disabled"):
            with peft_model.disable_adapter():
                pass
        assert peft_model.get_model_status().enabled is True

    @pytest.mark.parametrize("kind", KINDS)
    def test_takes_gradients_away(self, kind):
        """test_custom_models.test_requires_grad_modules_to_save_disabling"""
        peft_model = adapt(make_llava(), **KINDS[kind])
        trainable = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
        with peft_model.disable_adapter():
            assert adapters_with_gradients(peft_model) == set()
        assert trainable == {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}

    def test_generation(self):
        """testing_common._test_disable_adapter, which compares scores of `generate`"""
        inputs = without_labels(make_inputs())
        # Where weights want gradients, torch multiplies in another order.
        model = make_llava().requires_grad_(False)

        def scores(model):
            outputs = model.generate(
                **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_scores=True
            )
            return outputs.scores[0]

        expected = scores(model)
        peft_model = adapt(model)
        tuned = scores(peft_model)
        assert not torch.allclose(tuned, expected)
        with peft_model.disable_adapter():
            assert torch.equal(scores(peft_model), expected)
        assert torch.equal(scores(peft_model), tuned)


class TestGradients:
    @pytest.mark.parametrize("kind", KINDS)
    def test_follow_the_active_adapter(self, kind):
        """test_custom_models.test_requires_grad_*, test_requires_grad_follows_inference_mode_modules_to_save"""
        peft_model = adapt(make_llava(), **KINDS[kind])
        peft_model.add_adapter("other", make_config(textual_layers=[1], **KINDS[kind]))
        assert adapters_with_gradients(peft_model) == {"default"}
        for name in ("default", "other"):
            peft_model.set_adapter(name)
            assert adapters_with_gradients(peft_model) == {name}
            peft_model.set_adapter(name, inference_mode=True)
            assert adapters_with_gradients(peft_model) == set()

    def test_can_be_set(self):
        """test_custom_models.test_set_requires_grad"""
        peft_model = adapt(make_llava())
        peft_model.add_adapter("other", make_config(**HEAD))
        peft_model.set_requires_grad("other")
        assert adapters_with_gradients(peft_model) == {"default", "other"}
        peft_model.set_requires_grad(["default", "other"], requires_grad=False)
        assert adapters_with_gradients(peft_model) == set()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("is_trainable", [False, True])
    def test_of_loaded_adapters(self, is_trainable, kind, tmp_path):
        """test_custom_models.test_loading_model_(with_modules_to_save_)requires_grad_set_correctly"""
        adapt(make_llava(), **KINDS[kind]).save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_llava(), tmp_path, is_trainable=is_trainable)
        for name, parameter in loaded.named_parameters():
            assert parameter.requires_grad == (is_trainable and ".default" in name), name
        # A second adapter stays frozen, and leaves the first as it is.
        loaded.load_adapter(tmp_path, adapter_name="other")
        for name, parameter in loaded.named_parameters():
            assert parameter.requires_grad == (is_trainable and ".default" in name), name

    @pytest.mark.parametrize("layers", [{"textual_layers": [0]}, {"visual_layers": [0]}], ids=str)
    def test_of_chosen_layers(self, layers, tmp_path):
        """testing_common._test_training_layer_indexing: these are called `visual_layers` and `textual_layers` here"""
        inputs = make_inputs()
        peft_model = adapt(make_llava(), **layers)
        assert len(trained_by(peft_model)) < len(trained_by(adapt(make_llava())))
        peft_model(**inputs).loss.backward()
        for name, parameter in peft_model.named_parameters():
            assert (parameter.grad is not None) == ("m2pt_" in name), name
        peft_model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_llava(), tmp_path)
        assert torch.equal(loaded(**inputs).logits, peft_model(**inputs).logits)

    def test_after_preparing_the_base_model(self):
        """testing_common._test_prepare_for_training"""
        input_ids = make_inputs()["input_ids"]
        peft_model = adapt(make_llava())
        assert not peft_model.get_input_embeddings()(input_ids).requires_grad
        model = prepare_model_for_kbit_training(make_llava())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        peft_model = adapt(model).train()
        peft_model.enable_input_require_grads()
        assert peft_model.get_input_embeddings()(input_ids).requires_grad
        peft_model(**make_inputs()).loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in trained_by(peft_model).values())

    def test_of_adapters_that_are_added_to_loaded_ones(self, tmp_path):
        """test_custom_models.test_loading_model_requires_grad_load_adapter_then_add_adapter"""
        adapt(make_llava()).save_pretrained(tmp_path)
        for is_trainable in (False, True):
            peft_model = PeftModel.from_pretrained(make_llava(), tmp_path, is_trainable=is_trainable)
            peft_model.add_adapter("other", make_config())
            assert adapters_with_gradients(peft_model) == ({"default"} if is_trainable else set())
            peft_model.set_adapter("other")
            assert adapters_with_gradients(peft_model) == {"other"}


class TestOneTower:
    """The matrices of tests/test_decoder_models.py and test_vision_models.py, with models of a single tower"""

    def test_language_model(self, tmp_path):
        """testing_common._test_generate_pos_args, test_decoder_models with task_type="CAUSAL_LM" """
        inputs = without_labels(make_inputs("left", images=False))
        config = M2PTConfig(num_visual_tokens=0, task_type="CAUSAL_LM")
        peft_model = get_peft_model(make_llama(), config)
        randomise(peft_model, seed=2)
        peft_model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_llama(), tmp_path)
        assert type(loaded) is type(peft_model) and type(loaded).__name__ == "PeftModelForCausalLM"
        assert torch.equal(loaded(**inputs).logits, peft_model(**inputs).logits)
        assert not torch.allclose(make_llama()(**inputs).logits, peft_model(**inputs).logits)
        assert peft_model.generate(inputs["input_ids"], max_new_tokens=3, min_new_tokens=3).shape[1] == 17

    def test_half_precision(self):
        """testing_common._test_generate_half_prec"""
        peft_model = get_peft_model(make_llama().bfloat16(), M2PTConfig(num_visual_tokens=0))
        tokens = peft_model.generate(
            input_ids=torch.tensor([[3, 3, 3], [4, 3, 4]]),
            attention_mask=torch.tensor([[1, 1, 1], [1, 0, 1]]),
            max_new_tokens=3,
            min_new_tokens=3,
        )
        assert tokens.shape == (2, 6)

    def test_sequence_classification(self, tmp_path):
        """test_seq_classifier, test_custom_models.test_multiple_adapters_automatic_modules_to_save"""
        config = M2PTConfig(num_visual_tokens=0, task_type="SEQ_CLS")
        inputs = without_labels(make_inputs(images=False))
        peft_model = get_peft_model(make_llama(LlamaForSequenceClassification, num_labels=3), config)
        peft_model.add_adapter("other", config)
        score = peft_model.get_base_model().score
        assert set(score.modules_to_save) == {"default", "other"}
        with torch.no_grad():
            score.modules_to_save["default"].weight.add_(0.5)
        peft_model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_llama(LlamaForSequenceClassification, num_labels=3), tmp_path)
        assert torch.equal(loaded(**inputs).logits, peft_model(**inputs).logits)

    def test_vision_encoder(self, tmp_path):
        """test_vision_models"""
        inputs = {"pixel_values": make_inputs()["pixel_values"]}
        peft_model = get_peft_model(make_vit(), M2PTConfig(num_textual_tokens=0, modules_to_save=["classifier"]))
        peft_model(**inputs).logits.sum().backward()
        for name, parameter in peft_model.named_parameters():
            assert (parameter.grad is not None) == ("m2pt_" in name or "modules_to_save" in name), name
        peft_model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_vit(), tmp_path)
        assert torch.equal(loaded(**inputs).logits, peft_model(**inputs).logits)


class TestBaseModel:
    # A copy of the connector that was trained is not lost, which a warning says.
    @pytest.mark.filterwarnings("ignore:Weights .* are loaded into a part of the connector")
    @pytest.mark.parametrize("kind", KINDS)
    def test_state_dict(self, kind):
        """testing_common._test_get_base_model_state_dict, test_low_level_api.TestGetBaseModelStateDict"""
        expected = make_llava().state_dict()
        peft_model = adapt(make_llava(), **KINDS[kind])
        peft_model.add_adapter("other", make_config())
        assert have_the_same_weights(get_base_model_state_dict(peft_model), expected)
        trained = {name: parameter.clone() for name, parameter in trained_by(peft_model).items()}
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if name not in trained:
                    parameter.mul_(1.5)
        result = set_base_model_state_dict(peft_model, expected)
        assert not result.missing_keys and not result.unexpected_keys
        assert have_the_same_weights(get_base_model_state_dict(peft_model), expected)
        assert have_the_same_weights(trained_by(peft_model), trained)

    def test_modules_that_are_named_like_the_prefix(self):
        """test_low_level_api.test_base_model_module_named_like_peft_prefix, TestAdapterTargeting"""
        model = make_llava()
        model.m2pt_foobar = nn.Linear(5, 5)
        peft_model = get_peft_model(model, make_config())
        assert not any(parameter.requires_grad for parameter in peft_model.m2pt_foobar.parameters())
        assert not [name for name in get_peft_model_state_dict(peft_model) if "m2pt_foobar" in name]

    def test_trained_modules_that_are_named_like_the_prefix(self):
        """test_low_level_api.test_trained_modules_to_save_module_named_like_peft_prefix_round_trip"""

        def make():
            model = make_llava()
            model.m2pt_head = nn.Linear(5, 5)
            return get_peft_model(model, make_config(modules_to_save=["m2pt_head"]))

        source, target = make(), make()
        with torch.no_grad():
            source.get_base_model().m2pt_head.modules_to_save["default"].weight.fill_(123.0)
        result = set_peft_model_state_dict(target, get_peft_model_state_dict(source))
        assert not result.unexpected_keys
        assert (target.get_base_model().m2pt_head.modules_to_save["default"].weight == 123).all()

    def test_modules_whose_paths_only_end_like_those_of_layers(self):
        """test_tuners_utils.test_get_peft_modules_module_name_is_suffix_of_another_module"""
        model = make_llama().model
        model.extra = make_llama().model
        peft_model = get_peft_model(model, M2PTConfig(num_visual_tokens=0))
        assert peft_model.base_model.targeted_module_names == [f"layers.{i}.self_attn" for i in range(3)]
        assert not tuner_layers(model.extra)

    @pytest.mark.parametrize(
        "names", [["patch_embedding", "m2pt_prompt.default"], ["patch_embedding", "layers"]], ids=str
    )
    @pytest.mark.parametrize("first", [True, False], ids=["first adapter", "second adapter"])
    def test_modules_to_save_that_are_refused(self, first, names):
        """
        test_other.test_modules_to_save_targets_module_dict_raises, test_modules_to_save_targets_tuner_layer_raises,
        testing_common._test_adding_multiple_adapters_with_bias_raises: the model is then as it was
        """
        model = make_llava()
        peft_model = None if first else adapt(model, **HEAD)
        modules = dict(model.named_modules())
        trainable = [parameter.requires_grad for parameter in model.parameters()]
        config = make_config(modules_to_save=names)
        with pytest.raises((TypeError, ValueError), match="modules_to_save|ModulesToSaveWrapper"):
            get_peft_model(model, config) if first else peft_model.add_adapter("other", config)
        after = dict(model.named_modules())
        assert after.keys() == modules.keys() and all(after[name] is modules[name] for name in modules)
        assert trainable == [parameter.requires_grad for parameter in model.parameters()]

    def test_state_dict_that_does_not_fit(self):
        """test_low_level_api.test_strict_missing_keys, test_strict_unexpected_keys"""
        peft_model = adapt(make_llava())
        state_dict = get_base_model_state_dict(peft_model)
        missing = next(name for name in state_dict if "self_attn" in name)
        state_dict["unexpected.weight"] = state_dict.pop(missing)
        with pytest.raises(RuntimeError, match=r"(?s)Missing key.*Unexpected key"):
            set_base_model_state_dict(peft_model, state_dict)
        result = set_base_model_state_dict(peft_model, state_dict, strict=False)
        assert result.missing_keys == [missing] and result.unexpected_keys == ["unexpected.weight"]

    def test_targets_are_named_once(self):
        """test_tuners_utils.test_targeted_module_names_unique_across_adapters"""
        peft_model = adapt(make_llava())
        expected = list(peft_model.targeted_module_names)
        peft_model.add_adapter("other", make_config())
        assert peft_model.targeted_module_names == expected and len(expected) == len(set(expected)) == 3 + 3 + 1

    def test_adapting_again(self):
        """test_mapping.TestGetPeftModel"""
        model = make_llava()
        peft_model = get_peft_model(model, make_config())
        with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
            get_peft_model(model, make_config(), adapter_name="second")
        peft_model.unload()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            get_peft_model(model, make_config())

    def test_unloading_an_adapter_without_modules_to_save(self):
        """test_other.test_unload_with_inactive_modules_to_save"""
        peft_model = adapt(make_llava(), **HEAD)
        peft_model.add_adapter("other", make_config())
        peft_model.set_adapter("other")
        with torch.no_grad():
            peft_model.get_base_model().lm_head.modules_to_save["default"].weight.fill_(42.0)
        unloaded = peft_model.unload()
        assert isinstance(unloaded.lm_head, nn.Linear)
        assert have_the_same_weights(unloaded.state_dict(), make_llava().state_dict())

    def test_names_that_are_part_of_the_prefix(self, tmp_path):
        """test_initialization.TestNamingConflictWarning: warned of, and loaded all the same"""
        with pytest.warns(UserWarning, match="Adapter name 'm2pt' should not be contained in the prefix 'm2pt_'"):
            peft_model = adapt(make_llava(), "m2pt")
        peft_model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_llava(), tmp_path / "m2pt", adapter_name="m2pt")
        assert torch.equal(loaded(**make_inputs()).logits, peft_model(**make_inputs()).logits)

    def test_a_vocabulary_that_has_grown(self, tmp_path):
        """test_custom_models.test_save_pretrained_targeting_lora_to_embedding_layer, test_load_resized_embedding_*"""

        def make_grown():
            torch.manual_seed(4)
            model = make_llava()
            model.resize_token_embeddings(101, mean_resizing=False)
            return model

        peft_model = adapt(make_grown())
        with torch.no_grad():
            peft_model.get_input_embeddings().weight[97:].fill_(0.5)
        inputs = make_inputs()
        inputs["input_ids"][:, -1] = 99
        peft_model.save_pretrained(tmp_path, save_embedding_layers=True)
        assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")
        loaded = PeftModel.from_pretrained(make_grown(), tmp_path)
        assert torch.equal(loaded(**inputs).logits, peft_model(**inputs).logits)


class TestLowLevel:
    def test_injection(self):
        """test_low_level_api.TestLowLevelFunctional"""
        inputs = make_inputs()
        model = make_llava()
        assert inject_adapter_in_model(make_config(**HEAD), model) is model
        assert isinstance(model.lm_head, ModulesToSaveWrapper)
        randomise(model, seed=2)
        state_dict = get_peft_model_state_dict(model)
        assert "lm_head.weight" in state_dict
        assert all("m2pt_" in name for name in state_dict if name != "lm_head.weight")
        other = inject_adapter_in_model(make_config(**HEAD), make_llava())
        assert not set_peft_model_state_dict(other, state_dict).unexpected_keys
        assert torch.equal(other(**inputs).logits, model(**inputs).logits)
        status = get_model_status(model)
        assert status.enabled is True and status.active_adapters == ["default"] and status.num_adapter_layers == 8

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @pytest.mark.parametrize("kind", ["layers", "low rank", "frozen connector"])
    def test_injection_from_a_state_dict(self, kind, low_cpu_mem_usage):
        """test_low_level_api.test_inject_from_state_dict_and_from_config_target_same_layers, ..._low_cpu_mem_usage"""
        config = make_config(**KINDS[kind])
        expected = get_peft_model_state_dict(inject_adapter_in_model(config, make_llava()))
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            model = inject_adapter_in_model(
                config, make_llava(), state_dict=expected, low_cpu_mem_usage=low_cpu_mem_usage
            )
        found = get_peft_model_state_dict(model)
        assert {name: weight.shape for name, weight in found.items()} == {
            name: weight.shape for name, weight in expected.items()
        }
        devices = {weight.device.type for weight in found.values()}
        assert devices == ({"meta"} if low_cpu_mem_usage else {"cpu"})

    def test_injection_from_a_state_dict_with_fewer_layers(self):
        """test_low_level_api.test_inject_from_state_dict_missing_keys_warning"""
        path = "model.language_model.layers.1.self_attn"
        state_dict = get_peft_model_state_dict(inject_adapter_in_model(make_config(), make_llava()))
        state_dict = {name: weight for name, weight in state_dict.items() if not name.startswith(path)}
        with pytest.warns(RuntimeWarning, match=rf"config contained these additional target modules: \['{path}'\]"):
            model = inject_adapter_in_model(make_config(), make_llava(), state_dict=state_dict)
        assert get_peft_model_state_dict(model).keys() == state_dict.keys()
        assert model(**make_inputs()).logits.isfinite().all()

    def test_injection_from_a_state_dict_with_excluded_layers(self):
        """test_low_level_api.test_inject_from_state_dict_extra_keys_warning"""
        path = "model.language_model.layers.1.self_attn"
        state_dict = get_peft_model_state_dict(inject_adapter_in_model(make_config(), make_llava()))
        config = make_config(exclude_modules=[path])
        with pytest.warns(RuntimeWarning, match=rf"contained these additional target modules: \['{path}'\]"):
            model = inject_adapter_in_model(config, make_llava(), state_dict=state_dict)
        assert get_peft_model_state_dict(model).keys() == state_dict.keys()

    def test_injection_from_a_state_dict_of_another_config(self):
        """The same upstream test, with layers for which the config has no number of prompts."""
        state_dict = get_peft_model_state_dict(inject_adapter_in_model(make_config(), make_llava()))
        model = make_llava()
        modules = dict(model.named_modules())
        config = make_config(num_visual_tokens=0, num_interaction_tokens=0)
        with pytest.raises(ValueError, match="weights for 'model.vision_tower.encoder.layers.0.self_attn', to which"):
            inject_adapter_in_model(config, model, state_dict=state_dict)
        assert dict(model.named_modules()) == modules

    def test_many_layers(self, monkeypatch):
        """test_tuners_utils.test_get_peft_model_applies_find_target_modules: PEFT shortens their paths"""
        inputs = make_inputs()
        expected = adapt(make_llava())(**inputs).logits
        monkeypatch.setattr("peft.tuners.tuners_utils.MIN_TARGET_MODULES_FOR_OPTIMIZATION", 2)
        peft_model = adapt(make_llava())
        assert "multi_modal_projector" in peft_model.peft_config["default"].target_modules
        assert torch.equal(peft_model(**inputs).logits, expected)
        peft_model.add_adapter("other", make_config(visual_layers=[0], textual_layers=[1]))
        others = [name for name in trained_by(peft_model) if ".other." in name]
        assert len(others) == 1 + 2 + 4  # a visual prompt, a textual and an interaction prompt, the connector

    def test_status(self):
        """test_tuners_utils.TestModelAndLayerStatus"""
        peft_model = adapt(make_llava())
        peft_model.add_adapter("other", make_config(textual_layers=[0], tune_connector=False))
        layers = {layer.name: layer for layer in peft_model.get_layer_status()}
        assert len(layers) == 7 and get_layer_status(peft_model) == list(layers.values())
        connector = layers["model.model.multi_modal_projector"]
        assert connector.module_type == "m2pt.M2PTConnector" and connector.available_adapters == ["default"]
        attention = layers["model.model.language_model.layers.0.self_attn"]
        assert attention.module_type == "m2pt.M2PTAttention"
        assert attention.available_adapters == ["default", "other"] and attention.merged_adapters == []
        assert attention.requires_grad == {"default": True, "other": False}
        status = peft_model.get_model_status()
        assert status.adapter_model_type == "M2PTModel" and status.peft_types == {"default": "M2PT", "other": "M2PT"}
        assert status.trainable_params == sum(
            parameter.numel() for name, parameter in trained_by(peft_model).items() if ".default." in name
        )

    def test_sharded_models(self):
        """test_custom_models.test_save_load_roundtrip_fsdp_wrapped"""
        inputs = make_inputs()
        peft_model = adapt(make_llava())
        expected = peft_model(**inputs).logits
        dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            sharded = FullyShardedDataParallel(peft_model, use_orig_params=True, device_id=torch.device("cpu"))
            with torch.no_grad():
                assert torch.equal(sharded(**inputs).logits, expected)
            state_dict = get_peft_model_state_dict(sharded)
        finally:
            dist.destroy_process_group()
        loaded = get_peft_model(make_llava(), make_config())
        set_peft_model_state_dict(loaded, state_dict)
        assert torch.equal(loaded(**inputs).logits, expected)


class TestCompiling:
    def test_training(self):
        """test_torch_compile.test_causal_lm_training_pytorch_compile"""
        inputs = make_inputs(images=False)
        peft_model = get_peft_model(make_llama(), M2PTConfig(num_visual_tokens=0)).train()
        peft_model(**inputs).loss.backward()
        expected = {name: parameter.grad for name, parameter in trained_by(peft_model).items()}
        peft_model.zero_grad()
        torch.compile(peft_model, backend="eager")(**inputs).loss.backward()
        for name, parameter in trained_by(peft_model).items():
            torch.testing.assert_close(parameter.grad, expected[name])

    def test_switching(self):
        """test_torch_compile.test_causal_lm_multiple_lora_adapter_compile, ..._disable_lora_adapter_compile"""
        inputs = make_inputs(images=False)
        peft_model = get_peft_model(make_llama(), M2PTConfig(num_visual_tokens=0))
        peft_model.add_adapter("other", M2PTConfig(num_visual_tokens=0, num_textual_tokens=3))
        randomise(peft_model, seed=2)

        def outputs(model):
            for name in ("default", "other", "default"):
                peft_model.set_adapter(name)
                yield model(**inputs).logits
                with peft_model.disable_adapter():
                    yield model(**inputs).logits

        for found, expected in zip(outputs(torch.compile(peft_model, backend="eager")), list(outputs(peft_model))):
            torch.testing.assert_close(found, expected)

    def test_before_adapting(self):
        """test_low_level_api.test_inject_from_state_dict_compiled_model"""
        model = torch.compile(make_llava(), backend="eager")
        with pytest.raises(UnsupportedModelError, match="Adapt the model first, and compile what get_peft_model"):
            get_peft_model(model, make_config())


class TestWhatDoesNotExist:
    """What M2PT cannot do says so. Merging: see `test_adapters.py`."""

    def test_lora(self):
        """testing_common._test_lora_conversion"""
        peft_model = adapt(make_llava())
        assert not peft_model.supports_lora_conversion()
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            convert_to_lora(peft_model, rank=2)

    def test_hotswapping(self, tmp_path):
        """test_initialization.TestHotSwapping"""
        peft_model = adapt(make_llava())
        peft_model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="only supports LORA but M2PT was passed"):
            hotswap_adapter(peft_model, tmp_path, adapter_name="default")

    def test_mixed_models(self):
        """test_mixed"""
        with pytest.raises(ValueError, match="'M2PT' is not compatible with the `PeftMixedModel`"):
            get_peft_model(make_llava(), make_config(), mixed=True)
