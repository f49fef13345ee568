"""PEFT's tests of adapters that are deleted, chosen, switched off and trained."""

import pytest
import torch
from helpers.models import adapt, make_config, make_inputs, make_llava, randomise, trained_by, without_labels
from helpers.peft_suites import HEAD, KINDS, adapters_with_gradients, text_layers, tuner_layers
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict, set_peft_model_state_dict

from peft_m2pt.adapted import layer_of


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
