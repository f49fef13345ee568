"""Pushing to the Hub and loading from it, with the real client and a small Hub on loopback; and the model card."""

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from helpers.adapter_methods import needs_adapter_methods
from helpers.hub_server import TOKEN, HubServer
from helpers.models import adapt, make_config, make_inputs, make_llava, randomise
from helpers.processors import make_processor
from helpers.trainers import make_trainer
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModel, PeftModel
from transformers import AutoModelForImageTextToText

import peft_m2pt
from peft_m2pt.errors import AdapterFileError, BundleError
from peft_m2pt.layers.base import M2PTLayer
from peft_m2pt.tools.cli import main


BASE = "user/base"
ADAPTER = "user/adapter"
WEIGHTS = "adapter_model.safetensors"
M2PT_TAGS = {"m2pt", "multimodal-prompt-tuning", "arxiv:2409.15657"}
FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def hub(server, monkeypatch, tmp_path):
    """Points the client at the server, as HF_ENDPOINT does, with a cache and a token of its own."""
    url_template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url_template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    if BASE not in server.repos:
        make_llava().push_to_hub(BASE)
        make_processor().push_to_hub(BASE)
        adapt(base()).push_to_hub(ADAPTER)
    yield server
    server.failures.clear()


def base():
    return AutoModelForImageTextToText.from_pretrained(BASE)


def logits(model):
    with torch.no_grad():
        return model(**make_inputs()).logits


def expected_logits():
    """Those of the adapter that all tests find on the Hub."""
    return logits(adapt(make_llava()))


def run(command, hub, **environment):
    return subprocess.run(
        command,
        env={
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_CACHE": constants.HF_HUB_CACHE,
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": os.pathsep.join([str(FOLDER), str(FOLDER.parent)]),
            **environment,
        },
        capture_output=True,
        text=True,
    )


def test_files_of_a_push(hub):
    assert hub.files(ADAPTER).keys() == {".gitattributes", "README.md", "adapter_config.json", WEIGHTS}


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(lambda: PeftModel.from_pretrained(base(), ADAPTER), id="PeftModel"),
        pytest.param(lambda: AutoPeftModel.from_pretrained(ADAPTER), id="AutoPeftModel"),
        pytest.param(lambda: AutoModelForImageTextToText.from_pretrained(ADAPTER), id="AutoModelForImageTextToText"),
        pytest.param(lambda: add_adapter(base()), id="load_adapter"),
    ],
)
def test_loading_by_id(load):
    assert torch.equal(logits(load()), expected_logits())


def add_adapter(model):
    model.load_adapter(ADAPTER)
    return model


def test_revisions(hub):
    model = adapt(base())
    first = logits(model)
    model.push_to_hub("user/revisions")
    randomise(model, seed=5)
    second = logits(model)
    model.push_to_hub("user/revisions", revision="v2")
    for kwargs, expected in (({}, first), ({"revision": "v2"}, second)):
        assert torch.equal(logits(PeftModel.from_pretrained(base(), "user/revisions", **kwargs)), expected)
    commit = hub.repos["user/revisions"].branches["v2"]
    loaded = base()
    loaded.load_adapter("user/revisions", adapter_kwargs={"revision": commit})
    assert torch.equal(logits(loaded), second)
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at 'user/revisions'"):
        PeftModel.from_pretrained(base(), "user/revisions", revision="v3")


def test_private_repositories(hub, monkeypatch):
    model = adapt(base())
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HfHubHTTPError, match="401"):
        model.push_to_hub("user/private", private=True)
    assert "user/private" not in hub.repos
    model.push_to_hub("user/private", private=True, token=TOKEN)
    assert hub.repos["user/private"].private
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at 'user/private'"):
        PeftModel.from_pretrained(base(), "user/private")
    loaded = PeftModel.from_pretrained(base(), "user/private", token=TOKEN)
    assert torch.equal(logits(loaded), logits(model))


def test_subfolders(hub):
    model = adapt(base(), adapter_name="colours")
    model.add_adapter("shapes", make_config(num_textual_tokens=5))
    model.push_to_hub("user/several")
    assert {f"colours/{WEIGHTS}", f"shapes/{WEIGHTS}", "README.md"} < hub.files("user/several").keys()
    for name in ("colours", "shapes"):
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(base(), "user/several", subfolder=name)
        assert torch.equal(logits(loaded), logits(model))
    loaded = run_card(hub.files("user/several")["README.md"].decode())["model"]
    for name in ("colours", "shapes"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model))


def test_offline(hub, tmp_path):
    PeftModel.from_pretrained(base(), ADAPTER)
    before = len(hub.requests)
    code = f"""
        import peft_m2pt, torch
        from helpers.models import make_inputs
        from peft import AutoPeftModel, PeftModel

        torch.set_num_threads(1)
        model = AutoPeftModel.from_pretrained("{ADAPTER}")
        with torch.no_grad():
            torch.save(model(**make_inputs()).logits, "{tmp_path / "logits"}")
        try:
            PeftModel.from_pretrained(model.unload(), "user/never-seen")
        except ValueError as error:
            print(error)
    """
    result = run([sys.executable, "-c", textwrap.dedent(code)], hub, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "Can't find 'adapter_config.json' at 'user/never-seen'"
    assert torch.equal(torch.load(tmp_path / "logits"), expected_logits())
    assert len(hub.requests) == before


def test_command_line_upload(hub, tmp_path):
    model = adapt(base())
    model.save_pretrained(tmp_path / "adapter")
    command = [Path(sys.executable).with_name("hf"), "upload", "user/uploaded", tmp_path / "adapter"]
    hub.fail("POST", "/commit/", 500)
    result = run(command, hub)
    assert result.returncode != 0
    assert "500" in result.stderr
    assert hub.files("user/uploaded").keys() == {".gitattributes"}
    result = run(command, hub)
    assert result.returncode == 0, result.stderr
    assert torch.equal(logits(PeftModel.from_pretrained(base(), "user/uploaded")), logits(model))


@pytest.mark.parametrize(
    "method, path, error",
    [
        pytest.param("PUT", "/lfs/", f"Error while uploading '{WEIGHTS}' to the Hub", id="weights"),
        pytest.param("POST", "/commit/", "403 Forbidden", id="commit"),
    ],
)
def test_interrupted_push(hub, method, path, error, request):
    repo = f"user/push-{request.node.callspec.id}"
    model = adapt(base(), num_textual_tokens=2 if path == "/lfs/" else 7)
    hub.fail(method, path, 403)
    with pytest.raises((RuntimeError, HfHubHTTPError), match=error):
        model.push_to_hub(repo)
    assert hub.files(repo).keys() == {".gitattributes"}
    with pytest.raises(ValueError, match=f"Can't find 'adapter_config.json' at '{repo}'"):
        PeftModel.from_pretrained(base(), repo)
    model.push_to_hub(repo)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), repo)), logits(model))


@pytest.mark.parametrize("how, error", [("cut", "peer closed connection"), (500, "500")])
def test_interrupted_download(hub, monkeypatch, how, error):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's own retries
    model = base()
    before = logits(model)
    hub.fail("GET", WEIGHTS, how, times=100)
    with pytest.raises(OSError, match=f"The weights of the adapter in '{ADAPTER}' cannot be loaded: .*{error}"):
        PeftModel.from_pretrained(model, ADAPTER)
    assert not any(isinstance(module, M2PTLayer) for module in model.modules())
    assert torch.equal(logits(model), before)
    hub.failures.clear()
    assert torch.equal(logits(PeftModel.from_pretrained(model, ADAPTER)), expected_logits())


def test_interrupted_download_of_another_adapter(hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    model = adapt(base(), adapter_name="first")
    before = logits(model)
    hub.fail("GET", WEIGHTS, 500, times=100)
    with pytest.raises(OSError, match="No model has been changed"):
        model.load_adapter(ADAPTER, adapter_name="second")
    assert list(model.peft_config) == ["first"]
    assert torch.equal(logits(model), before)
    hub.failures.clear()
    model.load_adapter(ADAPTER, adapter_name="second")
    model.set_adapter("second")
    assert torch.equal(logits(model), expected_logits())


@needs_adapter_methods
def test_interrupted_download_by_transformers(hub, monkeypatch):
    """transformers adds the adapter before it looks for weights. It can be taken away again."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    model = base()
    before = logits(model)
    hub.fail("GET", WEIGHTS, 500, times=100)
    with pytest.raises(OSError, match=f"{ADAPTER} does not appear to have a file named"):
        model.load_adapter(ADAPTER)
    hub.failures.clear()
    model.delete_adapter("default")
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(add_adapter(model)), expected_logits())


def test_half_a_file(tmp_path):
    """A folder that was copied in part."""
    adapt(base()).save_pretrained(tmp_path)
    weights = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    model = base()
    with pytest.raises(AdapterFileError, match=f"'{WEIGHTS}' of the adapter .* is wrong or damaged. SafetensorError"):
        PeftModel.from_pretrained(model, tmp_path)
    assert not any(isinstance(module, M2PTLayer) for module in model.modules())


def card_of(content):
    return ModelCard(content.decode() if isinstance(content, bytes) else Path(content, "README.md").read_text())


def run_card(card, **variables):
    """Runs the first code block as it is printed."""
    code = re.search(r"```py\n(.*?)```", card, re.DOTALL)[1]
    assert code.startswith("import peft_m2pt")
    exec(code, variables)
    return variables


def check_card(card, model):
    assert card.data.library_name == "peft"
    assert card.data.base_model == BASE
    assert card.data.pipeline_tag == "image-text-to-text"
    assert M2PT_TAGS | {"transformers", f"base_model:adapter:{BASE}"} <= set(card.data.tags)
    total = sum(parameter.numel() for parameter in model.parameters())
    sizes = {"visual": 3 * 4 * 32, "textual": 3 * 3 * 48, "interaction": 3 * 2 * 32}
    for (part, size), tokens in zip(sizes.items(), (4, 3, 2)):
        assert f"| {part} | 0-2 | {tokens} | {size:,} | {size / total:.4%} |" in card.text
    everything = sum(sizes.values()) + 32 * 48 + 48 + 48 * 48 + 48
    assert f"| all |  |  | {everything:,} | {everything / total:.4%} |" in card.text
    for name, module in (("PEFT", "peft"), ("peft-m2pt", "peft_m2pt"), ("Transformers", "transformers")):
        assert f"- {name} {sys.modules[module].__version__}\n" in card.text
    assert card.text.count("import peft_m2pt") == 1
    assert "[More Information Needed]" not in card.text


class TestCard:
    def test_of_a_push(self, hub):
        card = card_of(hub.files(ADAPTER)["README.md"])
        check_card(card, adapt(make_llava()))
        assert card.text.strip().startswith(f"# M2PT adapter of {BASE}")
        assert torch.equal(logits(run_card(card.text)["model"]), expected_logits())

    def test_of_a_folder(self, tmp_path, monkeypatch):
        model = adapt(base())
        model.save_pretrained(tmp_path)
        check_card(card_of(tmp_path), model)
        first = (tmp_path / "README.md").read_text()
        model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == first
        monkeypatch.chdir(tmp_path)
        assert torch.equal(logits(run_card(first)["model"]), logits(model))

    def test_with_prompts_in_the_image(self, tmp_path, monkeypatch):
        adapt(base(), interaction_placement="image").save_pretrained(tmp_path)
        card = card_of(tmp_path)
        assert f"| interaction |  | 2 | {2 * 32} |" in card.text
        monkeypatch.chdir(tmp_path)
        processor = run_card(card.text)["processor"]
        assert processor.num_additional_image_tokens == make_processor().num_additional_image_tokens + 2

    def test_a_card_on_the_hub_keeps_its_text(self, hub):
        written = "---\nlicense: mit\ntags: [mine]\ndatasets: [user/digits]\n---\n# Mine\n\nTells cats from dogs.\n"
        HfApi().create_repo("user/written")
        HfApi().upload_file(path_or_fileobj=written.encode(), path_in_repo="README.md", repo_id="user/written")
        model = adapt(base())
        for _ in range(2):
            model.push_to_hub("user/written")
            card = card_of(hub.files("user/written")["README.md"])
            check_card(card, model)
            assert card.text.strip().startswith("# Mine\n\nTells cats from dogs.\n")
            assert card.data.license == "mit"
            assert card.data.datasets == ["user/digits"]
            assert "mine" in card.data.tags

    def test_a_card_in_a_folder_keeps_its_text(self, tmp_path):
        model = adapt(base())
        model.save_pretrained(tmp_path)
        path = tmp_path / "README.md"
        written = path.read_text().replace(f"# M2PT adapter of {BASE}", "# Mine") + "\nThanks to all.\n"
        path.write_text(written.replace("| visual | 0-2 | 4 |", "| visual | 0-2 | 5 |"))
        # Another model, as after a restart.
        adapt(base()).save_pretrained(tmp_path)
        assert path.read_text().strip() == written.strip()
        check_card(card_of(tmp_path), model)

    def test_pipeline_tag(self, tmp_path):
        # PEFT would say "text-generation" for this task type.
        model = adapt(base(), task_type="CAUSAL_LM")
        model.save_pretrained(tmp_path)
        check_card(card_of(tmp_path), model)
        card = card_of(tmp_path)
        card.data.pipeline_tag = "visual-question-answering"
        card.save(tmp_path / "README.md")
        model.save_pretrained(tmp_path)
        assert card_of(tmp_path).data.pipeline_tag == "visual-question-answering"

    def test_a_base_model_that_is_not_on_the_hub(self, hub, tmp_path):
        """The Hub refuses cards that name a folder as the base model."""
        make_llava().save_pretrained(tmp_path / "base")
        model = adapt(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"))
        model.push_to_hub("user/of-a-folder")
        card = card_of(hub.files("user/of-a-folder")["README.md"])
        assert card.data.base_model is None
        assert set(card.data.tags) == M2PT_TAGS | {"transformers"}
        assert torch.equal(logits(run_card(card.text)["model"]), logits(model))

    def test_a_base_model_without_a_name(self, tmp_path):
        adapt(make_llava()).save_pretrained(tmp_path)
        card = card_of(tmp_path)
        assert card.data.base_model is None
        assert set(card.data.tags) == M2PT_TAGS | {"transformers"}
        assert card.text.strip().startswith("# M2PT adapter\n")
        assert "model = AutoModelForImageTextToText.from_pretrained(...)\n" in card.text

    def test_other_readmes_are_left_alone(self, tmp_path):
        (tmp_path / "README.md").write_text("# A project\n")
        model = adapt(base())
        model.save_pretrained(tmp_path / "adapter")
        (tmp_path / "adapter" / "README.md").unlink()
        model.peft_config["default"].save_pretrained(tmp_path / "adapter")
        assert (tmp_path / "README.md").read_text() == "# A project\n"


def test_trainer(hub, tmp_path):
    model = adapt(base())
    trainer = make_trainer(
        model, tmp_path / "trained", push_to_hub=True, hub_model_id="user/trained", hub_token=TOKEN, max_steps=2
    )
    trainer.train()
    trainer.push_to_hub(dataset_tags="user/digits", tags="mine")
    card = card_of(hub.files("user/trained")["README.md"])
    check_card(card, model)
    assert card.data.datasets == ["user/digits"]
    assert {"generated_from_trainer", "mine"} < set(card.data.tags)
    assert "- learning_rate: 0.05" in card.text
    model.eval()
    assert torch.equal(logits(PeftModel.from_pretrained(base(), "user/trained")), logits(model))


class TestBundle:
    """Bundles of models and adapters that are on the Hub."""

    def load(self, folder):
        return AutoModelForImageTextToText.from_pretrained(folder)

    def test_by_id(self, hub, tmp_path):
        hub.requests.clear()
        peft_m2pt.bundle(BASE, ADAPTER, tmp_path / "bundle")
        assert torch.equal(logits(self.load(tmp_path / "bundle")), expected_logits())
        link = tmp_path / "bundle" / "model.safetensors"
        assert link.is_symlink() and link.resolve().is_relative_to(tmp_path / "cache")
        assert (tmp_path / "bundle" / "processor_config.json").is_symlink()
        assert not [request for request in hub.requests if "pytorch_model" in request]

    def test_offline(self, hub, tmp_path, monkeypatch):
        peft_m2pt.bundle(BASE, ADAPTER, tmp_path / "first")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        hub.requests.clear()
        peft_m2pt.bundle(BASE, ADAPTER, tmp_path / "second", copy=True)
        assert torch.equal(logits(self.load(tmp_path / "second")), expected_logits())
        assert not hub.requests

    def test_shards(self, hub, tmp_path):
        make_llava().push_to_hub("user/sharded", max_shard_size="50KB")
        peft_m2pt.bundle("user/sharded", self.adapter_of("user/sharded", tmp_path), tmp_path / "bundle")
        assert torch.equal(logits(self.load(tmp_path / "bundle")), expected_logits())

    def adapter_of(self, base_id, tmp_path, **kwargs):
        adapt(AutoModelForImageTextToText.from_pretrained(base_id, **kwargs)).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    def test_revisions(self, hub, tmp_path):
        second = make_llava()
        second.model.language_model.norm.weight.data += 1
        for model, revision in ((make_llava(), "main"), (second, "v2")):
            model.push_to_hub("user/versions", revision=revision)
        model = adapt(second)
        expected = logits(model)
        model.peft_config["default"].base_model_name_or_path = "user/versions"
        model.push_to_hub("user/tuned", revision="beta")
        peft_m2pt.bundle("user/versions", "user/tuned", tmp_path / "a", revision="v2", adapter_revision="beta")
        assert torch.equal(logits(self.load(tmp_path / "a")), expected)
        # An adapter that names the revision of its base needs no other word.
        model.peft_config["default"].revision = "v2"
        model.save_pretrained(tmp_path / "tuned")
        peft_m2pt.bundle("user/versions", tmp_path / "tuned", tmp_path / "b")
        assert torch.equal(logits(self.load(tmp_path / "b")), expected)
        with pytest.raises(BundleError, match="revision='main' .* was tuned on revision 'v2'"):
            peft_m2pt.bundle("user/versions", tmp_path / "tuned", tmp_path / "c", revision="main")

    def test_subfolders(self, hub, tmp_path):
        adapt(base(), adapter_name="colours").push_to_hub("user/named")
        with pytest.raises(BundleError, match=r"adapters in \['colours'\]: choose one with adapter_subfolder"):
            peft_m2pt.bundle(BASE, "user/named", tmp_path / "bundle")
        peft_m2pt.bundle(BASE, "user/named", tmp_path / "bundle", adapter_subfolder="colours")
        assert torch.equal(logits(self.load(tmp_path / "bundle")), expected_logits())

    def test_another_base(self, hub, tmp_path):
        make_llava().push_to_hub("user/other")
        with pytest.raises(BundleError, match=f"base_model_name_or_path='{BASE}' .*, but BASE is 'user/other'"):
            peft_m2pt.bundle("user/other", ADAPTER, tmp_path / "bundle")

    def test_a_base_that_was_downloaded(self, hub, tmp_path):
        base().save_pretrained(tmp_path / "base")
        with pytest.warns(UserWarning, match=f"tuned on '{BASE}' .*cannot be checked"):
            peft_m2pt.bundle(tmp_path / "base", ADAPTER, tmp_path / "bundle")
        assert torch.equal(logits(self.load(tmp_path / "bundle")), expected_logits())

    @pytest.mark.parametrize("base_id, adapter_id", [("user/nothing", ADAPTER), (BASE, "user/nothing")])
    def test_no_such_repository(self, hub, tmp_path, base_id, adapter_id, capsys):
        assert main(["bundle", base_id, adapter_id, "--output", str(tmp_path / "bundle")]) == 1
        assert "user/nothing" in capsys.readouterr().err
        assert not (tmp_path / "bundle").exists()

    def test_an_interrupted_download(self, hub, tmp_path, monkeypatch):
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty cache"))
        hub.fail("GET", "/model.safetensors", "cut", times=100)
        with pytest.raises(OSError, match=f"'{BASE}' cannot be downloaded: .*peer closed"):
            peft_m2pt.bundle(BASE, ADAPTER, tmp_path / "bundle")
        assert not list(tmp_path.glob("bundle*"))
        hub.failures.clear()
        peft_m2pt.bundle(BASE, ADAPTER, tmp_path / "bundle")
        assert torch.equal(logits(self.load(tmp_path / "bundle")), expected_logits())
