"""Making bundles: what is in the folder, what is refused, and the command."""

import errno
import shutil
import sys

import pytest
import torch
from helpers.bundles import (
    IN_IMAGE,
    NUM_INTERACTION,
    ROWS,
    SHARDED,
    WEIGHTS,
    edit,
    expected,
    load,
    load_base,
    logits,
    save_adapter,
    save_base,
)
from helpers.models import NUM_PATCHES, adapt, make_config, make_llava
from helpers.processors import make_processor
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import peft_m2pt
import peft_m2pt.bundles.bundler
from peft_m2pt import AdapterFileError, BundleError
from peft_m2pt.tools import running
from peft_m2pt.tools.cli import main


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
            BundleError, match="interaction_placement='image': the bundle needs a processor of its own, .* none"
        ):
            peft_m2pt.bundle(base, adapter, output)
        assert not output.exists()


class TestRefused:
    def check(self, base, adapter, output, message, error=BundleError, **kwargs):
        before = sorted(output.parent.iterdir())
        with pytest.raises(error, match=message):
            peft_m2pt.bundle(base, adapter, output, **kwargs)
        assert sorted(output.parent.iterdir()) == before

    def test_an_adapter_of_another_method(self, base, tmp_path, output):
        get_peft_model(load_base(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
        message = r"adapter '.*lora' is wrong or damaged\. It has peft_type='LORA', so this is not an M2PT adapter"
        self.check(base, tmp_path / "lora", output, message, AdapterFileError)

    def test_no_adapter(self, base, tmp_path, output):
        self.check(base, base, output, r"ADAPTER '.*base' has no adapter_config\.json")
        self.check(base, tmp_path / "nowhere", output, "ADAPTER '.*nowhere' is neither a folder nor the id of a repo")

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
        message = r"adapters of other methods \(by peft_type\): \{'lora': 'LORA'\}"
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
        assert not any("cannot be checked" in str(warning.message) for warning in recwarn)

    def test_a_base_of_which_nothing_is_known(self, base, adapter, output, tmp_path):
        base.rename(tmp_path / "moved")
        with pytest.warns(
            UserWarning, match="tuned on '.*base' .base_model_name_or_path., but is bundled with '.*moved'"
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
            base,
            adapter,
            output,
            r"config\.json' is not the config of a transformers model|is not the config of a transformers model",
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
        self.check(base, adapter, output, f"{field}='v2' needs a repository on the Hub", **{field: "v2"})

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
@pytest.mark.parametrize(
    "where", ["shutil.copyfile", "peft_m2pt.bundles.bundler.save_file", "peft_m2pt.bundles.bundler.make_bundle_config"]
)
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

    monkeypatch.setattr(peft_m2pt.bundles.bundler, "make_bundle_config", look)
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

        monkeypatch.setattr(peft_m2pt.bundles.bundler, "save_file", interrupt)
        assert main(["bundle", str(base), str(adapter), "--output", str(output)]) == 130
        assert not output.exists()

    def test_a_program_that_knows_nothing_of_the_package(self, base, adapter, output, tmp_path, fresh):
        peft_m2pt.bundle(base, adapter, output)
        script = tmp_path / "script.py"
        script.write_text(
            "import sys\nfrom transformers import AutoModelForImageTextToText\n"
            "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])\n"
            "print(model.model.language_model.layers[0].self_attn.m2pt_prompt)"
        )
        result = fresh.command("run", script, output)
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
