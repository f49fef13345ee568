"""Bundles answer as a `PeftModel`, and never as the base model alone."""

import copy
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from families import FAMILIES
from families.spec import make_inputs as make_family_inputs
from families.spec import make_model
from helpers.adapter_methods import WORK
from helpers.bundles import (
    SHARDED,
    WEIGHTS,
    check_rows,
    edit,
    expected,
    load,
    load_base,
    logits,
    save_adapter,
    save_base,
)
from helpers.models import make_inputs, make_llava, randomise
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    pipeline,
)

import peft_m2pt
import peft_m2pt.bundles.bundler
from peft_m2pt import BundleError, M2PTConfig
from peft_m2pt.bundles.loading import MODEL_TYPE
from peft_m2pt.upstream import AUTO_CLASSES


def config_for(family):
    has_interaction = isinstance(family.connector, int) and not family.refused
    return M2PTConfig(
        **{"num_visual_tokens": 2, "num_textual_tokens": 3, **{f"num_{kind}_tokens": 0 for kind in family.refused}},
        num_interaction_tokens=2 if has_interaction else 0,
        tune_connector=family.has_connector and not family.refused,
        init_prompts="xavier_uniform",
    )


def chooses(auto_class, model):
    found = auto_class._model_mapping[type(model.config)] if type(model.config) in auto_class._model_mapping else ()
    return type(model) in (found if isinstance(found, (list, tuple)) else (found,))


class TestAnswers:
    @pytest.mark.parametrize(
        "kwargs",
        [
            {},
            {"connector_rank": 4},
            {"tune_connector": False},
            {"num_visual_tokens": 0, "num_interaction_tokens": 0},
            {"num_textual_tokens": 0, "num_interaction_tokens": 0},
            {"init_prompts": "states", "textual_layers": [0, 2]},
            {"modules_to_save": ["lm_head", "input_layernorm"]},
            {"modules_to_save": ["embed_tokens"]},
            {"modules_to_save": ["multi_modal_projector"], "tune_connector": False, "num_interaction_tokens": 0},
        ],
        ids=str,
    )
    def test_every_kind_of_adapter(self, base, tmp_path, output, kwargs):
        adapter = save_adapter(base, tmp_path / "adapter", **kwargs)
        config = peft_m2pt.bundle(base, adapter, output)
        assert isinstance(config, M2PTConfig)
        model = load(output)
        assert torch.equal(logits(model), expected(base, adapter))
        assert not torch.equal(logits(model), logits(load_base(base)))

    @pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "smolvlm", "mllama", "florence2", "siglip"])
    def test_other_families(self, tmp_path, output, name):
        family = next(family for family in FAMILIES if family.name == name)
        make_model(family, "eager").save_pretrained(tmp_path / "base")
        base = type(make_model(family, "eager")).from_pretrained(tmp_path / "base", attn_implementation="eager")
        model = get_peft_model(base, config_for(family))
        randomise(model, seed=2)
        model.save_pretrained(tmp_path / "adapter")
        peft_m2pt.bundle(tmp_path / "base", tmp_path / "adapter", output)
        auto_class = next(auto_class for auto_class in AUTO_CLASSES if chooses(auto_class, base))
        loaded = auto_class.from_pretrained(output, attn_implementation="eager")
        assert type(loaded) is type(base)
        inputs = family.pack(make_family_inputs(family))
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs)[0], model.eval()(**inputs)[0], rtol=0, atol=1e-5)
        if model.peft_config["default"].num_textual_tokens:
            check_rows(output, loaded)

    @pytest.mark.parametrize("how", [{}, SHARDED], ids=["one file", "sharded"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_every_kind_of_base(self, tmp_path, output, how, dtype):
        base = save_base(tmp_path / "base", dtype=dtype, **how)
        adapter = save_adapter(base, tmp_path / "adapter")
        peft_m2pt.bundle(base, adapter, output)
        model = load(output)
        assert model.dtype == dtype
        assert torch.equal(logits(model), expected(base, adapter))

    def test_a_base_in_the_old_format(self, base, adapter, output):
        torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
        peft_m2pt.bundle(base, adapter, output)
        assert torch.equal(logits(load(output)), expected(base, adapter))

    def test_an_adapter_in_the_old_format(self, base, adapter, output):
        torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
        (adapter / WEIGHTS).unlink()
        peft_m2pt.bundle(base, adapter, output)
        assert torch.equal(logits(load(output)), expected(base, adapter))

    def test_generation(self, base, adapter, output):
        peft_m2pt.bundle(base, adapter, output)
        inputs = make_inputs(images=False)
        del inputs["labels"]
        reference = PeftModel.from_pretrained(load_base(base), adapter).generate(**inputs, max_new_tokens=5)
        assert torch.equal(load(output).generate(**inputs, max_new_tokens=5), reference)

    def test_the_model_is_one_of_transformers(self, base, adapter, output):
        peft_m2pt.bundle(base, adapter, output)
        model, reference = load(output), load_base(base)
        assert type(model) is LlavaForConditionalGeneration and type(model.config) is type(reference.config)
        ours, theirs = model.config.to_dict(), reference.config.to_dict()
        del ours["_name_or_path"], theirs["_name_or_path"]
        assert ours == theirs
        assert list(model.peft_config) == ["default"]
        assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "m2pt_" in name)
        if WORK:
            model.disable_adapters()
            assert torch.equal(logits(model), logits(reference))

    def test_arguments_of_from_pretrained(self, base, adapter, output):
        peft_m2pt.bundle(base, adapter, output)
        reference = expected(base, adapter)
        model, info = load(output, output_loading_info=True, adapter_name="served", attn_implementation="eager")
        assert list(model.peft_config) == ["served"] and not info["missing_keys"]
        assert model.config._attn_implementation == "eager"
        torch.testing.assert_close(logits(model), reference, rtol=0, atol=1e-4)
        assert load(output, dtype=torch.bfloat16).dtype == torch.bfloat16
        assert torch.equal(logits(load(output.parent, subfolder=output.name)), reference)
        assert torch.equal(logits(load(output, device_map="cpu")), reference)

    def test_offloaded(self, base, adapter, output, tmp_path):
        peft_m2pt.bundle(base, adapter, output)
        reference = expected(base, adapter)
        places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "disk"}
        places |= {"model.language_model": "disk", "lm_head": "cpu"}
        model = load(output, device_map=places, offload_folder=tmp_path / "offload")
        assert torch.equal(logits(model), reference)

    def test_several_auto_classes(self, base, adapter, output):
        peft_m2pt.bundle(base, adapter, output)
        assert torch.equal(logits(AutoModelForMultimodalLM.from_pretrained(output)), expected(base, adapter))
        # A part of the model has other module paths than those that the adapter was saved with.
        with pytest.raises(ValueError, match="do not fit the model"):
            AutoModel.from_pretrained(output)

    def test_pipeline(self, tmp_path, output):
        base = save_base(tmp_path / "base", processor=True)
        adapter = save_adapter(base, tmp_path / "adapter")
        peft_m2pt.bundle(base, adapter, output)
        model = pipeline("image-text-to-text", model=str(output)).model
        assert type(model) is LlavaForConditionalGeneration
        assert torch.equal(logits(model), expected(base, adapter))

    def test_a_language_model_alone(self, tmp_path, output):
        make_llava().model.language_model.config.save_pretrained(tmp_path / "config")
        torch.manual_seed(0)
        LlamaForCausalLM(AutoConfig.from_pretrained(tmp_path / "config")).save_pretrained(tmp_path / "base")
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        config = M2PTConfig(num_visual_tokens=0, num_interaction_tokens=0, tune_connector=False, num_textual_tokens=3)
        model = get_peft_model(base, config)
        randomise(model, seed=2)
        model.save_pretrained(tmp_path / "adapter")
        peft_m2pt.bundle(tmp_path / "base", tmp_path / "adapter", output)
        loaded = AutoModelForCausalLM.from_pretrained(output)
        input_ids = make_inputs(images=False)["input_ids"]
        with torch.no_grad():
            assert torch.equal(loaded(input_ids).logits, model.eval()(input_ids).logits)
        check_rows(output, loaded)

    def test_other_models_are_loaded_as_ever(self, base, adapter, output):
        peft_m2pt.bundle(base, adapter, output)
        load(output)
        model = load(base)
        assert type(AutoConfig.from_pretrained(base)) is type(model.config)
        assert torch.equal(logits(model), logits(load_base(base)))

    def test_as_an_adapter(self, base, adapter, output):
        peft_m2pt.bundle(base, adapter, output)
        assert torch.equal(expected(base, output), expected(base, adapter))


def test_the_config_is_that_of_the_base(base, adapter, output):
    peft_m2pt.bundle(base, adapter, output)
    config, reference = AutoConfig.from_pretrained(output), AutoConfig.from_pretrained(base)
    assert isinstance(config, type(reference))
    assert (config.model_type, config.architectures) == ("llava", ["LlavaForConditionalGeneration"])
    copies = [pickle.loads(pickle.dumps(config)), copy.deepcopy(config)]
    assert all(type(other) is type(config) and other.to_dict() == config.to_dict() for other in copies)
    assert torch.equal(logits(load(output, config=copies[0])), expected(base, adapter))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    made = {}
    for name, kwargs in (("one file", {}), ("sharded", SHARDED)):
        folder = tmp_path_factory.mktemp("made")
        base = save_base(folder / "base", processor=True, **kwargs)
        adapter = save_adapter(base, folder / "adapter", num_textual_tokens=0, num_interaction_tokens=0)
        peft_m2pt.bundle(base, adapter, folder / "bundle")
        made[name] = folder / "bundle"
    return made


class TestWithoutThePackage:
    """What other programs make of a bundle."""

    @pytest.fixture(params=["one file", "sharded"])
    def bundle(self, request, bundles, tmp_path):
        shutil.copytree(bundles[request.param].parent, tmp_path, dirs_exist_ok=True, symlinks=True)
        return tmp_path / "bundle"

    @pytest.mark.parametrize("has_peft", [True, False], ids=["with PEFT", "without PEFT"])
    def test_transformers_fails_and_names_the_package(self, bundles, has_peft):
        code = f"""if True:
            import sys
            if not {has_peft}:
                sys.modules["peft"] = None
            from transformers import AutoConfig, AutoModelForImageTextToText, LlavaForConditionalGeneration, pipeline
            for load in (
                AutoConfig.from_pretrained,
                AutoModelForImageTextToText.from_pretrained,
                LlavaForConditionalGeneration.from_pretrained,
                lambda path: pipeline("image-text-to-text", model=path),
            ):
                for bundle in sys.argv[1:]:
                    try:
                        load(bundle)
                    except Exception as error:
                        assert "peft_m2pt" in str(error), error
                        print("refused")
            assert "peft_m2pt" not in sys.modules
        """
        command = [sys.executable, "-c", code, *map(str, bundles.values())]
        result = subprocess.run(command, capture_output=True, text=True, cwd=bundles["sharded"])
        assert result.stdout.split() == ["refused"] * 8, result.stderr

    def test_classes_called_by_name_fail_with_the_package_too(self, bundle):
        for kwargs in ({}, {"config": AutoConfig.from_pretrained(bundle)}):
            with pytest.raises(ValueError, match="only the auto classes load, such as AutoModelForImageTextToText"):
                LlavaForConditionalGeneration.from_pretrained(bundle, **kwargs)

    def test_engines_find_weights_that_they_have_no_place_for(self, bundle):
        """They take all files of tensors, or those that the index names, and refuse names that they do not know."""
        files = sorted(bundle.glob("*.safetensors"))
        index = bundle / "model.safetensors.index.json"
        assert index.is_file() == any(bundle.glob("model-*"))
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            assert all(name in load_file(bundle / file) for name, file in weight_map.items())
            files = [file for file in files if file.name in weight_map.values()]
        names = {name for file in files for name in load_file(file)}
        of_base = set(load_base(bundle.parent / "base").state_dict())
        of_adapter = set(load_file(bundle / WEIGHTS))
        assert of_adapter <= names and not of_adapter & of_base
        assert json.loads((bundle / "config.json").read_text())["architectures"] == ["PeftM2PTBundle"]

    def test_a_config_that_only_claims_to_be_of_a_bundle(self, bundle):
        edit(bundle / "config.json", peft_m2pt_model_type=None)
        with pytest.raises(BundleError, match=f"model_type='{MODEL_TYPE}', but no 'peft_m2pt_model_type'"):
            load(bundle)

    def test_a_bundle_that_lost_its_adapter(self, bundle):
        (bundle / "adapter_config.json").unlink()
        with pytest.raises(BundleError, match=r"has no adapter_config\.json"):
            load(bundle)
