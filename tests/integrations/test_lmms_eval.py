"""
The model `m2pt` of lmms-eval, with a stand-in for its registry. `make test-harnesses` runs the real program; this is
for every change. And the tasks and commands of docs/evaluation.md.
"""

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from helpers.models import adapt, make_inputs, make_llava, without_labels
from helpers.shapes import make_processor
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.distributed.fsdp import FullyShardedDataParallel

import peft_m2pt
from peft_m2pt.tools.cli import _make_parser


ROOT = Path(__file__).parents[2]
EVALUATION = ROOT / "examples" / "evaluation"


class Lmms:
    """As `lmms` in `lmms_eval/api/model.py` of lmms-eval 0.7.3."""

    is_simple = True

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        args = dict(part.split("=", 1) for part in arg_string.split(",") if part)
        return cls(**args, **{k: v for k, v in (additional_config or {}).items() if v is not None})


class Simple(Lmms):
    """A model of lmms-eval, which logs errors of `generate` and answers nothing."""

    def __init__(self, pretrained, device="cuda", batch_size=1, colour=None):
        self.pretrained, self.device, self.batch_size, self.colour = pretrained, device, batch_size, colour
        self._model = self.make_model()
        self._image_processor = self.processor = make_processor()

    def make_model(self):
        return make_llava()

    def generate_until(self, inputs):
        try:
            return self._model.generate(**inputs, max_new_tokens=3, do_sample=False)
        except Exception:
            return None


class Chat(Simple):
    is_simple = False


class Engine(Chat):
    def make_model(self):
        return SimpleNamespace(name="an engine")


class Sharded(Chat):
    def make_model(self):
        # Without a process group, there is no other way to one.
        return object.__new__(FullyShardedDataParallel)


class WithoutProcessor(Chat):
    def __init__(self, pretrained):
        self._model = make_llava()


MODELS = {
    "llava_hf": (Simple, Chat),
    "vllm": (Engine, Engine),
    "sharded": (Sharded, Sharded),
    "bare": (WithoutProcessor, WithoutProcessor),
    "m2pt": (None, None),
}


@pytest.fixture
def plugin(monkeypatch):
    """The entry point, as lmms-eval loads it."""

    def add(name, **values):
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)

    add("lmms_eval")
    add("lmms_eval.api")
    add("lmms_eval.api.model", lmms=Lmms)
    add("lmms_eval.utils", simple_parse_args_string=lambda text: dict(p.split("=", 1) for p in text.split(",") if p))
    add(
        "lmms_eval.models",
        list_available_models=lambda include_aliases: list(MODELS),
        get_model=lambda name, force_simple: MODELS[name][0 if force_simple else 1],
    )
    add("lmms_eval.models.registry_v2", ModelManifest=SimpleNamespace)
    monkeypatch.delitem(sys.modules, "peft_m2pt.integrations.lmms_eval", raising=False)
    group = "lmms_eval.models"
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]
    (point,) = [EntryPoint(name, value, group) for name, value in points.items()]
    assert point.name == "m2pt"
    yield point.load()
    # Made of stand-ins.
    sys.modules.pop("peft_m2pt.integrations.lmms_eval", None)


@pytest.fixture
def create(plugin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Names that are not folders are looked up on the Hub.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    adapt(make_llava()).save_pretrained("adapter")
    adapt(make_llava(), interaction_placement="image").save_pretrained("in_image")
    get_peft_model(make_llava(), LoraConfig(target_modules=["q_proj"])).save_pretrained("lora")
    module = sys.modules["peft_m2pt.integrations.lmms_eval"]
    return lambda arguments, class_name="M2PT", **kwargs: getattr(module, class_name).create_from_arg_string(
        arguments, {"device": None, "max_batch_size": None, **kwargs}
    )


def test_manifest(plugin):
    manifest = plugin()
    classes = {}
    for kind in ("simple", "chat"):
        module, _, name = getattr(manifest, f"{kind}_class_path").rpartition(".")
        classes[kind] = getattr(sys.modules[module], name)
    assert manifest.model_id == "m2pt"
    # What lmms-eval checks.
    assert all(issubclass(model_class, Lmms) for model_class in classes.values())
    assert classes["simple"].is_simple and not classes["chat"].is_simple


@pytest.mark.parametrize("class_name, expected", [("M2PT", Chat), ("M2PTSimple", Simple)])
def test_the_model_that_is_asked_for(create, class_name, expected):
    model = create("model=llava_hf,pretrained=base,adapter=adapter,colour=red", class_name, batch_size=2, device="cpu")
    assert type(model) is expected
    assert (model.pretrained, model.colour, model.batch_size, model.device) == ("base", "red", 2, "cpu")


def test_answers(create):
    model = create("model=llava_hf,pretrained=base,adapter=adapter")
    inputs = without_labels(make_inputs())
    expected = adapt(make_llava()).eval()
    torch.testing.assert_close(model._model(**inputs).logits, expected(**inputs).logits)
    tokens = expected.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate_until(inputs), tokens)
    assert not torch.equal(make_llava().generate(**inputs, max_new_tokens=3, do_sample=False), tokens)
    assert isinstance(model._model, type(make_llava())) and not model._model.training


def test_more_tokens_for_each_image(create):
    """The processor of a model that two adapters get in turn is always that of the one that is used."""
    tokens = {}
    for adapter in ("adapter", "in_image"):
        model = create(f"model=llava_hf,pretrained=base,adapter={adapter}")
        tokens[adapter] = model.processor.num_additional_image_tokens
    assert tokens == {"adapter": 1, "in_image": 3}


def test_a_processor_that_was_adapted_is_set_back(create, monkeypatch):
    adapted = peft_m2pt.adapt_processor(
        make_processor(), adapt(make_llava(), interaction_placement="image").peft_config["default"]
    )
    monkeypatch.setattr(sys.modules[__name__], "make_processor", lambda: adapted)
    assert create("model=llava_hf,pretrained=base,adapter=adapter").processor.num_additional_image_tokens == 1


def test_what_is_refused_while_answering_ends_the_program(create):
    """lmms-eval would score an empty answer."""
    model = create("model=llava_hf,pretrained=base,adapter=adapter")
    input_ids = torch.arange(3, 9)[None]

    def refuse(*args):
        raise peft_m2pt.UnsupportedModelError("layers.0: no.")

    handle = model._model.register_forward_pre_hook(refuse)
    with pytest.raises(SystemExit, match="^error: layers.0: no."):
        model.generate_until({"input_ids": input_ids})
    handle.remove()
    # Other errors are lmms-eval's.
    assert model.generate_until({"no_such_argument": input_ids}) is None
    assert model.generate_until({"input_ids": input_ids}) is not None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "--model m2pt lacks model=, pretrained=, adapter=. It takes --model_args model=llava_hf,pretrained="),
        ("model=llava_hf,adapter=adapter", "--model m2pt lacks pretrained=. It takes"),
        (
            "model=lava,pretrained=base,adapter=adapter",
            "model='lava' is no model of lmms-eval that can get an adapter",
        ),
        (
            "model=m2pt,pretrained=base,adapter=adapter",
            "model='m2pt' is no model of lmms-eval that can get an adapter",
        ),
        (
            "model=vllm,pretrained=base,adapter=adapter",
            "model='vllm' does not hold a model of transformers in `_model`",
        ),
        (
            "model=sharded,pretrained=base,adapter=adapter",
            "but FullyShardedDataParallel, so m2pt cannot put an adapter",
        ),
        ("model=bare,pretrained=base,adapter=in_image", "model='bare' has no processor of transformers"),
        ("model=llava_hf,pretrained=base,adapter=lora", "It has peft_type='LORA', so this is not an M2PT"),
        ("model=llava_hf,pretrained=base,adapter=nowhere", "'adapter_config.json' of the adapter 'nowhere' is wrong"),
        ("model=llava_hf,pretrained=bundle,adapter=adapter", "pretrained='bundle' is a bundle, which has an adapter"),
    ],
)
def test_refusals(create, tmp_path, arguments, message):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "config.json").write_text('{"model_type": "peft_m2pt"}')
    with pytest.raises(ValueError) as error:
        create(arguments)
    assert message in str(error.value)


def test_arguments_given_twice(create):
    with pytest.raises(TypeError, match="multiple values for keyword argument 'batch_size'"):
        create("model=llava_hf,pretrained=base,adapter=adapter,batch_size=2", batch_size=1)


def test_the_package_imports_no_harness():
    code = "import sys, peft_m2pt; print([name for name in sys.modules if name.partition('.')[0] in %s])"
    code %= ["lm_eval", "lmms_eval"]
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.fixture(scope="module")
def utils():
    return SimpleNamespace(**runpy.run_path(str(EVALUATION / "lmms_eval" / "utils.py")))


class TestTasks:
    """The tasks for lmms-eval in examples/evaluation."""

    @pytest.mark.parametrize(
        "answer, whole, first",
        [
            ("yes", 1, 1),
            (" Yes.\n", 1, 1),
            ('"yes"', 1, 1),
            ("Yes, it is.", 0, 1),
            ("The yes", 1, 1),
            ("no", 0, 0),
            ("yesterday", 0, 0),
            ("", 0, 0),
            (".", 0, 0),
        ],
    )
    def test_scores(self, utils, answer, whole, first):
        row = {"answer": "yes"}
        assert utils.score(row, [answer]) == {"accuracy": whole}
        assert utils.score_first_word(row, [answer]) == {"accuracy": first}

    def test_classes(self, utils):
        features = Features(
            {
                "img": Value("int64"),
                "fine_label": ClassLabel(names=["aquarium_fish", "cra"]),
                "coarse_label": Value("int64"),
            }
        )
        rows = Dataset.from_list([{"img": 0, "fine_label": i, "coarse_label": 0} for i in (1, 0)], features=features)
        rows = utils.load_cifar_100(rows)
        assert rows["answer"] == ["crab", "aquarium fish"]
        assert utils.ask_class(rows[0]) == "What is in the image? Answer with one of these: aquarium fish, crab."
        assert utils.score(rows[0], ["A crab."]) == {"accuracy": 1}
        assert utils.score(rows[1], ["fish"]) == {"accuracy": 0}

    def test_images_at_addresses(self, utils, tmp_path):
        Image.new("L", (3, 2)).save(tmp_path / "image.png")
        (image,) = utils.download_image({"image_link": (tmp_path / "image.png").as_uri()})
        assert image.size == (3, 2) and image.mode == "RGB"

    @pytest.mark.parametrize("path", sorted((EVALUATION / "lmms_eval").glob("*.yaml")), ids=lambda path: path.stem)
    def test_files(self, utils, path):
        task = yaml.load(path.read_text(), Loader)
        assert task["task"] == path.stem
        assert task["generation_kwargs"] == {
            "do_sample": False,
            "temperature": 0,
            "num_beams": 1,
            "max_new_tokens": 16,
        }
        functions = [value for value in task.values() if isinstance(value, str) and value.startswith("utils.")]
        assert len(functions) == 4 and all(hasattr(utils, name.removeprefix("utils.")) for name in functions)
        # Where the split comes from.
        assert path.read_text().startswith("#") and task["test_split"] == "test"
        assert task["dataset_path"] in read_docs()


class Loader(yaml.SafeLoader):
    """Leaves functions as their names."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def read_docs():
    return (ROOT / "docs" / "evaluation.md").read_text()


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", read_docs(), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def options(command):
    return {name: value for name, value in zip(command, command[1:]) if name.startswith("--")}


class TestDocs:
    def test_tasks(self):
        own = {path.stem for path in EVALUATION.rglob("*.yaml")}
        named = {task for command in commands() for task in options(command).get("--tasks", "").split(",")}
        assert own <= named
        assert {"mme", "pope_full", "textvqa_val"} <= named

    def test_commands_of_this_package(self):
        for command in commands():
            if command[0] == "peft-m2pt":
                _make_parser().parse_args(command[1:])
            elif command[:3] == ["python", "-m", "peft_m2pt"]:
                parsed = _make_parser().parse_args(command[3:])
                assert (parsed.program, *parsed.arguments) == tuple(command[4:])

    def test_commands_of_harnesses(self, create):
        """`make test-harnesses` parses them with the real programs."""
        names = {"lm_eval": set(), "lmms-eval": set()}
        for command in commands():
            program = next((name for name in names if name in command), None)
            if program is None:
                continue
            given = options(command)
            names[program].add(given["--model"])
            if "--include_path" in given:
                assert any((ROOT / given["--include_path"]).glob("*.yaml"))
            if given["--model"] == "m2pt":
                arguments = re.sub(r"(pretrained|adapter)=[^,]*", r"\1=\1", given["--model_args"])
                with pytest.raises(TypeError, match="device_map"):  # which the stand-in does not know
                    create(arguments)
        assert names == {"lm_eval": {"hf-multimodal"}, "lmms-eval": {"m2pt", "llava_hf"}}
