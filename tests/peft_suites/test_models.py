"""PEFT's tests of kinds of models, of base models, and of functions below `PeftModel`."""

import warnings

import pytest
import torch
import torch.distributed as dist
from helpers.models import adapt, make_config, make_inputs, make_llava, randomise, trained_by, without_labels
from helpers.peft_suites import HEAD, KINDS, have_the_same_weights, make_llama, make_vit, tuner_layers
from peft import (
    PeftModel,
    convert_to_lora,
    get_base_model_state_dict,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
    set_base_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import LlamaForSequenceClassification

from peft_m2pt import M2PTConfig, UnsupportedModelError


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
        with pytest.raises(
            ValueError,
            match="weights for 'model.vision_tower.encoder.layers.0.self_attn', which the config of adapter "
            "'default' does not adapt",
        ):
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

    def test_before_adapting(self):
        """test_low_level_api.test_inject_from_state_dict_compiled_model"""
        model = torch.compile(make_llava(), backend="eager")
        with pytest.raises(UnsupportedModelError, match="Adapt the model first, and compile what get_peft_model"):
            get_peft_model(model, make_config())


class TestWhatDoesNotExist:
    """What M2PT cannot do says so. Merging: see `test_model.py`."""

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
