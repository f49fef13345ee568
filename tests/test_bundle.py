"""Bundles: one folder with base model and adapter that answers as a `PeftModel`, and never as the base model alone."""

import copy
import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_methods import WORK
from families import FAMILIES
from families.spec import make_inputs as make_family_inputs
from families.spec import make_model
from models import NUM_PATCHES, adapt, make_config, make_inputs, make_llava, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_interaction import make_processor
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    pipeline,
)

import peft_m2pt
import peft_m2pt.bundling
from peft_m2pt import BundleError, M2PTConfig, running
from peft_m2pt.bundled import MODEL_TYPE
from peft_m2pt.checkpoint import Checkpoint
from peft_m2pt.cli import main
from peft_m2pt.layer import M2PTAttention
from peft_m2pt.upstream import AUTO_CLASSES


ROWS = "m2pt_textual_rows.safetensors"
PREFIX = "peft_m2pt.textual_rows."
WEIGHTS = "adapter_model.safetensors"
IN_IMAGE = {"interaction_placement": "image"}
NUM_INTERACTION = 2
SHARDED = {"max_shard_size": "50KB"}


def save_base(folder, processor=False, dtype=torch.float32, **kwargs):
    make_llava().to(dtype).save_pretrained(folder, **kwargs)
    if processor:
        make_processor().save_pretrained(folder)
    return folder


def load_base(folder):
    return LlavaForConditionalGeneration.from_pretrained(folder)


def save_adapter(base, folder, **kwargs):
    model = adapt(load_base(base), **kwargs)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    return save_adapter(base, tmp_path / "adapter")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "bundle"


def logits(model, num_image_tokens=NUM_PATCHES):
    inputs = make_inputs("left", num_image_tokens=num_image_tokens)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        return model.eval()(**inputs).logits


def expected(base, adapter, **kwargs):
    return logits(PeftModel.from_pretrained(load_base(base), adapter), **kwargs)


def load(folder, **kwargs):
    return AutoModelForImageTextToText.from_pretrained(folder, **kwargs)


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


def edit(file, **values):
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


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


class TestWithoutThePackage:
    """What other programs make of a bundle."""

    @pytest.fixture(scope="class")
    def bundles(self, tmp_path_factory):
        made = {}
        for name, kwargs in (("one file", {}), ("sharded", SHARDED)):
            folder = tmp_path_factory.mktemp("made")
            base = save_base(folder / "base", processor=True, **kwargs)
            adapter = save_adapter(base, folder / "adapter", num_textual_tokens=0, num_interaction_tokens=0)
            peft_m2pt.bundle(base, adapter, folder / "bundle")
            made[name] = folder / "bundle"
        return made

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


class TestRows:
    @pytest.mark.parametrize(
        "kwargs", [{}, {"connector_rank": 4}, {"tune_connector": False}, {"num_interaction_tokens": 0}], ids=str
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_they_are_what_the_model_computes(self, tmp_path, output, kwargs, dtype):
        base = save_base(tmp_path / "base", dtype=dtype)
        adapter = save_adapter(base, tmp_path / "adapter", **kwargs)
        peft_m2pt.bundle(base, adapter, output)
        rows = check_rows(output, load(output))
        num_rows = 3 + kwargs.get("num_interaction_tokens", NUM_INTERACTION)
        assert [row.shape for row in rows.values()] == [(num_rows, 48)] * 3

    def test_they_are_all_that_a_decoder_needs(self, base, adapter, output):
        """Rows in front whose hidden states are overwritten in every layer, as an engine computes it."""
        peft_m2pt.bundle(base, adapter, output)
        rows = load_file(output / ROWS)
        num_rows = 3 + NUM_INTERACTION
        input_ids = make_inputs(images=False)["input_ids"]
        engine = load_base(base)
        decoder = engine.model.language_model
        for i, layer in enumerate(decoder.layers):
            own = rows[f"{PREFIX}model.language_model.layers.{i}.self_attn"]

            def overwrite(layer, args, kwargs, own=own):
                hidden_states = args[0].clone()
                hidden_states[:, :num_rows] = own
                return (hidden_states, *args[1:]), kwargs

            layer.register_forward_pre_hook(overwrite, with_kwargs=True)
        positions = torch.arange(-num_rows, input_ids.shape[1])[None]
        padded = nn.functional.pad(input_ids, (num_rows, 0), value=3)
        with torch.no_grad():
            hidden_states = decoder(input_ids=padded, position_ids=positions).last_hidden_state
            actual = engine.lm_head(hidden_states)[:, num_rows:]
            reference = load(output)(input_ids=input_ids).logits
        torch.testing.assert_close(actual, reference, rtol=0, atol=2e-4)

    @pytest.mark.parametrize(
        "kwargs, reason",
        [
            ({"num_textual_tokens": 0, "num_interaction_tokens": 0}, "no prompts in the language model"),
            ({"modules_to_save": ["input_layernorm"]}, "the adapter holds more than prompts and a connector"),
        ],
        ids=str,
    )
    def test_none_where_an_engine_would_need_more(self, base, tmp_path, output, kwargs, reason):
        peft_m2pt.bundle(base, save_adapter(base, tmp_path / "adapter", **kwargs), output)
        assert not (output / ROWS).exists()
        assert reason in (output / "README.md").read_text()

    @pytest.mark.parametrize(
        "kwargs, is_read", [({}, True), (IN_IMAGE, False), ({"num_interaction_tokens": 0}, False)]
    )
    def test_nothing_of_the_base_is_read_but_its_connector(self, tmp_path, output, monkeypatch, kwargs, is_read):
        base = save_base(tmp_path / "base", processor=True, **SHARDED)
        adapter = save_adapter(base, tmp_path / "adapter", **kwargs)
        names, read = [], Checkpoint.read
        monkeypatch.setattr(Checkpoint, "read", lambda self, name: names.append(name) or read(self, name))
        peft_m2pt.bundle(base, adapter, output)
        assert {"multi_modal_projector" in name for name in names} == ({True} if is_read else set())

    def test_names_of_weights_that_are_those_of_the_model(self, base, tmp_path, output):
        """transformers saves others, and renames them when it loads them."""
        weights = load_base(base).state_dict()
        assert not weights.keys() & load_file(base / "model.safetensors").keys()
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        adapter = save_adapter(base, tmp_path / "adapter", tune_connector=False)
        peft_m2pt.bundle(base, adapter, output)
        model = load(output)
        assert torch.equal(logits(model), expected(base, adapter))
        check_rows(output, model)


def check_rows(folder, model):
    rows = load_file(folder / ROWS)
    layers = [
        module for module in model.modules() if isinstance(module, M2PTAttention) and module.site.kind == "textual"
    ]
    assert rows.keys() == {f"{PREFIX}{layer.site.path}" for layer in layers}
    for layer in layers:
        row = rows[f"{PREFIX}{layer.site.path}"]
        assert row.dtype == torch.float32
        # A product with a thin matrix depends on where in memory that lies.
        torch.testing.assert_close(row, layer._prompt("default", torch.empty(0)), rtol=1e-6, atol=1e-6)
    return rows


class TestFiles:
    def test_links(self, base, adapter, output):
        (base / "notes.txt").write_text("kept")
        (base / "model.onnx").write_text("not taken")
        (base / "README.md").write_text("the base's")
        before = {path.name: path.read_bytes() for path in base.iterdir()}
        peft_m2pt.bundle(base, adapter, output)
        links = {path.name: path.resolve() for path in output.iterdir() if path.is_symlink()}
        names = ("model.safetensors", "generation_config.json", "notes.txt")
        assert links == {name: (base / name).resolve() for name in names}
        own = {"README.md", "config.json", "adapter_config.json", WEIGHTS, ROWS}
        assert {path.name for path in output.iterdir()} == {*names, *own}
        assert before == {path.name: path.read_bytes() for path in base.iterdir()}

    @pytest.mark.parametrize("how", [{}, SHARDED], ids=["one file", "sharded"])
    def test_copies(self, tmp_path, output, how):
        base = save_base(tmp_path / "base", **how)
        adapter = save_adapter(base, tmp_path / "adapter")
        reference = expected(base, adapter)
        peft_m2pt.bundle(base, adapter, output, copy=True)
        assert not any(path.is_symlink() for path in output.iterdir())
        for folder in (base, adapter):
            shutil.rmtree(folder)
        assert torch.equal(logits(load(output)), reference)

    def test_links_from_a_relative_path(self, base, adapter, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        reference = expected(base, adapter)
        peft_m2pt.bundle("base", "adapter", "deep/er/bundle")
        monkeypatch.chdir("/")
        assert torch.equal(logits(load(tmp_path / "deep" / "er" / "bundle")), reference)

    def test_the_readme(self, base, adapter, output):
        peft_m2pt.bundle(base, adapter, output)
        text = (output / "README.md").read_text()
        assert f"# {base} with an M2PT adapter" in text and str(adapter) in text
        code = text.partition("```py\n")[2].partition("```")[0].replace('"."', repr(str(output)))
        scope = {}
        exec(code.replace("processor = ", "# "), scope)
        assert torch.equal(logits(scope["model"]), expected(base, adapter))

    @pytest.mark.parametrize("what", ["file", "folder", "link"])
    def test_what_is_there_stays(self, base, adapter, output, what):
        if what == "file":
            output.write_text("kept")
        elif what == "folder":
            output.mkdir()
            (output / "notes").write_text("kept")
        else:
            output.symlink_to(base.parent / "nowhere")
        with pytest.raises(BundleError, match="exists and is not empty"):
            peft_m2pt.bundle(base, adapter, output)
        assert what != "folder" or [path.name for path in output.iterdir()] == ["notes"]

    def test_an_empty_folder(self, base, adapter, output):
        output.mkdir()
        peft_m2pt.bundle(base, adapter, output)
        assert torch.equal(logits(load(output)), expected(base, adapter))


class TestProcessor:
    def count(self, folder):
        processor = AutoProcessor.from_pretrained(folder)
        image = torch.zeros(3, 16, 16, dtype=torch.uint8)
        inputs = processor(images=[image], text=["what <image>"], return_tensors="pt")
        return (inputs["input_ids"] == processor.image_token_id).sum().item()

    def test_as_it_is(self, tmp_path, output):
        base = save_base(tmp_path / "base", processor=True)
        peft_m2pt.bundle(base, save_adapter(base, tmp_path / "adapter"), output)
        assert (output / "processor_config.json").is_symlink()
        assert self.count(output) == NUM_PATCHES

    def test_adapted(self, tmp_path, output):
        base = save_base(tmp_path / "base", processor=True)
        adapter = save_adapter(base, tmp_path / "adapter", **IN_IMAGE)
        before = {path.name: path.read_bytes() for path in base.iterdir()}
        peft_m2pt.bundle(base, adapter, output)
        assert self.count(output) == NUM_PATCHES + NUM_INTERACTION
        assert before == {path.name: path.read_bytes() for path in base.iterdir()}
        num_image_tokens = NUM_PATCHES + NUM_INTERACTION
        reference = expected(base, adapter, num_image_tokens=num_image_tokens)
        assert torch.equal(logits(load(output), num_image_tokens=num_image_tokens), reference)

    def test_set_back(self, tmp_path, output):
        """The processor that the base model was saved with is one for another adapter."""
        base = save_base(tmp_path / "base")
        peft_m2pt.adapt_processor(make_processor(), make_config(**IN_IMAGE)).save_pretrained(base)
        peft_m2pt.bundle(base, save_adapter(base, tmp_path / "adapter"), output)
        assert self.count(output) == NUM_PATCHES

    def test_the_one_that_was_saved_with_the_adapter(self, tmp_path, output):
        base = save_base(tmp_path / "base", processor=True)
        adapter = save_adapter(base, tmp_path / "adapter")
        make_processor(chat_template="of the adapter").save_pretrained(adapter)
        (base / "chat_template.jinja").write_text("of the base")
        peft_m2pt.bundle(base, adapter, output)
        assert AutoProcessor.from_pretrained(output).chat_template == "of the adapter"
        assert (base / "chat_template.jinja").read_text() == "of the base"

    def test_none_to_adapt(self, base, tmp_path, output):
        adapter = save_adapter(base, tmp_path / "adapter", **IN_IMAGE)
        with pytest.raises(
            BundleError, match="interaction_placement='image': the processor has to be adapted, .* none"
        ):
            peft_m2pt.bundle(base, adapter, output)
        assert not output.exists()


class TestRefused:
    def check(self, base, adapter, output, message, **kwargs):
        before = sorted(output.parent.iterdir())
        with pytest.raises(BundleError, match=message):
            peft_m2pt.bundle(base, adapter, output, **kwargs)
        assert sorted(output.parent.iterdir()) == before

    def test_an_adapter_of_another_method(self, base, tmp_path, output):
        get_peft_model(load_base(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
        self.check(base, tmp_path / "lora", output, r"peft_type='LORA' in .*: this is not an M2PT adapter")

    def test_no_adapter(self, base, tmp_path, output):
        self.check(base, base, output, r"ADAPTER '.*base' has no adapter_config\.json")
        self.check(
            base, tmp_path / "nowhere", output, "ADAPTER '.*nowhere' is neither a folder nor the name of a repo"
        )

    def test_one_of_several(self, base, tmp_path, output):
        model = adapt(load_base(base), adapter_name="first")
        model.add_adapter("second", make_config())
        model.save_pretrained(tmp_path / "adapters")
        self.check(base, tmp_path / "adapters", output, r"adapters in \['first', 'second'\]: .* adapter_subfolder")
        peft_m2pt.bundle(base, tmp_path / "adapters", output, adapter_subfolder="first")
        assert torch.equal(logits(load(output)), expected(base, tmp_path / "adapters" / "first"))

    @pytest.mark.parametrize(
        "lora, m2pt, subfolder", [("lora", "m2pt", None), ("lora", "m2pt", "m2pt"), ("lora", "default", None)]
    )
    def test_lora_beneath(self, base, tmp_path, output, lora, m2pt, subfolder):
        model = get_peft_model(load_base(base), LoraConfig(target_modules=["q_proj"]), adapter_name=lora)
        get_peft_model(model, make_config(), adapter_name=m2pt).save_pretrained(tmp_path / "both")
        own = tmp_path / "both" / ("" if m2pt == "default" else m2pt)
        message = r"adapters of other methods too, by peft_type: \{'lora': 'LORA'\}"
        self.check(base, tmp_path / "both" if subfolder else own, output, message, adapter_subfolder=subfolder)
        # Who says that it was tuned without, by putting it elsewhere, is believed.
        (tmp_path / "alone").mkdir()
        for name in ("adapter_config.json", WEIGHTS):
            shutil.copy(own / name, tmp_path / "alone")
        peft_m2pt.bundle(base, tmp_path / "alone", output)

    def test_adapters_that_only_lie_beside_each_other(self, base, tmp_path, output):
        get_peft_model(load_base(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
        save_adapter(base, tmp_path / "m2pt")
        (tmp_path / "README.md").write_text("adapters of mine")
        peft_m2pt.bundle(base, tmp_path / "m2pt", output)

    def test_a_base_with_an_adapter_of_its_own(self, base, adapter, output):
        get_peft_model(load_base(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(base)
        self.check(
            base, adapter, output, r"BASE '.*' has an adapter of its own \(peft_type='LORA' in .*merge_and_unload"
        )

    def test_a_bundle_as_base(self, base, adapter, output, tmp_path):
        peft_m2pt.bundle(base, adapter, tmp_path / "first")
        self.check(tmp_path / "first", adapter, output, r"has an adapter of its own \(peft_type='M2PT'")

    def test_another_base(self, base, adapter, output, tmp_path):
        other = make_llava()
        other.model.language_model.norm.weight.data += 1
        other.save_pretrained(tmp_path / "other")
        message = r"base_model_name_or_path='.*base' in the adapter_config\.json of the adapter, but BASE is '.*other'"
        self.check(tmp_path / "other", adapter, output, message)

    def test_a_copy_of_the_base(self, base, adapter, output, tmp_path, recwarn):
        reference = expected(base, adapter)
        shutil.copytree(base, tmp_path / "copy")
        peft_m2pt.bundle(tmp_path / "copy", adapter, output)
        assert torch.equal(logits(load(output)), reference)
        assert not any("cannot be seen" in str(warning.message) for warning in recwarn)

    def test_a_base_of_which_nothing_is_known(self, base, adapter, output, tmp_path):
        base.rename(tmp_path / "moved")
        with pytest.warns(
            UserWarning, match="tuned on '.*base' .base_model_name_or_path., and is bundled with '.*moved'"
        ):
            peft_m2pt.bundle(tmp_path / "moved", adapter, output)

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"text": "mistral"}, "do not fit the model"),
            ({"vision": "siglip"}, "do not fit the model"),
        ],
        ids=str,
    )
    def test_a_base_of_other_shapes(self, base, adapter, output, tmp_path, kwargs, message):
        config = make_llava(**kwargs).config
        config.text_config.hidden_size, config.text_config.num_hidden_layers = 64, 2
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "other")
        edit(adapter / "adapter_config.json", base_model_name_or_path=None)
        self.check(tmp_path / "other", adapter, output, f"does not fit the base model in .*{message}")

    def test_a_base_that_is_no_model(self, base, adapter, output):
        edit(base / "config.json", model_type="unheard_of")
        self.check(
            base, adapter, output, r"config\.json' is not that of a model in transformers|is not that of a model"
        )

    def test_a_base_with_a_shard_missing(self, tmp_path, output):
        base = save_base(tmp_path / "base", **SHARDED)
        adapter = save_adapter(base, tmp_path / "adapter")
        next(base.glob("model-00002*")).unlink()
        self.check(base, adapter, output, "names the shard 'model-00002.*', which does not exist")

    def test_a_vocabulary_that_has_grown(self, base, tmp_path, output):
        model = load_base(base)
        model.resize_token_embeddings(120)
        adapt(model).save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        self.check(base, tmp_path / "adapter", output, r"does not fit .*\n.*embed_tokens\.weight.*\[120, 48\]")

    def test_a_field_that_bundles_need(self, base, adapter, output):
        edit(base / "config.json", transformers_weights="model.safetensors")
        self.check(base, adapter, output, "transformers_weights='model.safetensors' in .*: a bundle needs this field")

    @pytest.mark.parametrize("field", ["revision", "adapter_revision"])
    def test_revisions_of_folders(self, base, adapter, output, field):
        self.check(base, adapter, output, f"{field}='v2' is one of a repository of the Hub", **{field: "v2"})

    def test_a_quantized_connector(self, base, tmp_path, output):
        """Of which the file has other numbers, or none of this name."""
        adapter = save_adapter(base, tmp_path / "adapter")
        weights = load_file(base / "model.safetensors")
        name = "multi_modal_projector.linear_1.weight"
        edit(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
        for changed in ({name: weights[name].to(torch.float8_e4m3fn)}, {f"{name}.absmax": torch.ones(3)}):
            kept = {key: weight for key, weight in weights.items() if key != name}
            save_file({**kept, **changed}, base / "model.safetensors", metadata={"format": "pt"})
            message = rf"'model\.{name}' is needed: expected shape .* \(config.json has a quantization_config\)"
            self.check(base, adapter, output, message)
        # Prompts that are there already need no connector.
        plain = save_adapter(save_base(tmp_path / "plain"), tmp_path / "textual", num_interaction_tokens=0)
        edit(plain / "adapter_config.json", base_model_name_or_path=str(base))
        peft_m2pt.bundle(base, plain, output)
        assert (output / ROWS).exists()


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=str)
@pytest.mark.parametrize("where", ["shutil.copyfile", "peft_m2pt.bundling.save_file", "peft_m2pt.bundling.mask"])
def test_an_interruption_leaves_nothing(base, adapter, output, monkeypatch, where, error, copies):
    before = sorted(output.parent.rglob("*"))

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(where, fail)
    with pytest.raises(type(error)):
        peft_m2pt.bundle(base, adapter, output, copy=copies)
    assert sorted(output.parent.rglob("*")) == before


def test_a_killed_process_leaves_nothing_that_loads(base, adapter, output, tmp_path, monkeypatch):
    """config.json is the last file."""
    seen = []

    def look(config):
        seen.extend(path.name for path in next(tmp_path.glob("bundle.incomplete-*")).iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(peft_m2pt.bundling, "mask", look)
    with pytest.raises(KeyboardInterrupt):
        peft_m2pt.bundle(base, adapter, output)
    assert {"model.safetensors", WEIGHTS, "README.md"} <= set(seen) and "config.json" not in seen


class TestCommand:
    def test_it_bundles(self, base, adapter, output, capsys):
        assert main(["bundle", str(base), str(adapter), "--output", str(output), "--copy"]) == 0
        assert "is complete" in capsys.readouterr().out
        assert not (output / "model.safetensors").is_symlink()
        assert torch.equal(logits(load(output)), expected(base, adapter))

    def test_errors(self, base, output, capsys):
        assert main(["bundle", str(base), str(base), "--output", str(output)]) == 1
        assert "error: ADAPTER" in capsys.readouterr().err and not output.exists()

    def test_ctrl_c(self, base, adapter, output, monkeypatch):
        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(peft_m2pt.bundling, "save_file", interrupt)
        assert main(["bundle", str(base), str(adapter), "--output", str(output)]) == 130
        assert not output.exists()

    def test_a_program_that_knows_nothing_of_the_package(self, base, adapter, output, tmp_path):
        peft_m2pt.bundle(base, adapter, output)
        script = tmp_path / "script.py"
        script.write_text(
            "import sys\nfrom transformers import AutoModelForImageTextToText\n"
            "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])\n"
            "print(model.model.language_model.layers[0].self_attn.m2pt_prompt)"
        )
        command = [sys.executable, "-m", "peft_m2pt", "run", str(script), str(output)]
        environment = {**os.environ, "PYTHONPATH": str(Path(peft_m2pt.__file__).parent.parent)}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert "M2PTPrompt" in result.stdout, result.stderr


class TestServe:
    """How the server is started. `make test-serving` asks it."""

    @pytest.fixture(autouse=True)
    def packages(self, monkeypatch):
        monkeypatch.setattr(running, "is_serve_available", lambda: True)
        monkeypatch.setattr(running, "_find", lambda program: lambda: print(*sys.argv))
        monkeypatch.setattr(sys, "argv", [])

    def test_arguments(self, base, adapter, output, capsys):
        peft_m2pt.bundle(base, adapter, output)
        assert main(["serve", str(output), "--port", "8001", "--device", "cpu"]) == 0
        assert capsys.readouterr().out == f"transformers serve {output} --port 8001 --device cpu\n"

    def test_no_bundle(self, base, tmp_path, capsys):
        for folder in (base, tmp_path / "nowhere"):
            assert main(["serve", str(folder)]) == 1
            assert f"{folder} is not a bundle. Make one with `peft-m2pt bundle" in capsys.readouterr().err

    def test_no_packages(self, base, adapter, output, capsys, monkeypatch):
        peft_m2pt.bundle(base, adapter, output)
        monkeypatch.setattr(running, "is_serve_available", lambda: False)
        assert main(["serve", str(output)]) == 1
        assert "pip install 'transformers[serving]'" in capsys.readouterr().err
