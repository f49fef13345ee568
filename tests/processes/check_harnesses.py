"""
The real lm-eval and lmms-eval, for which `make test-harnesses` makes an environment of its own.

Their data sets are on the Hub. Here, folders of the same names with generated rows are in their place, in the working
directory, where `datasets` looks first: the task files are used as they are.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from helpers.models import adapt, randomise
from lm_eval._cli import HarnessCLI
from lmms_eval.__main__ import parse_eval_args
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import peft_m2pt


ROOT = Path(__file__).parent.parent.parent
EVALUATION = ROOT / "examples" / "evaluation"
sys.path += [str(ROOT / "examples"), str(EVALUATION / "lmms_eval")]
import digits  # noqa: E402
import quickstart  # noqa: E402
import tiny_llava  # noqa: E402
import utils  # noqa: E402
import vqa  # noqa: E402


NUM_DIGITS = 16
# Of the images of each task.
LABELS = [0, 1, 1, 1, 2, 1, 0, 1]
ROWS = len(LABELS)
CIFAR_10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# The first of them, and one that the data set misspells.
CIFAR_100 = ["apple", "aquarium_fish", "baby", "cra"]
SNLI_VE = ["entailment", "neutral", "contradiction"]
IMAGE = ImageFeature()


def make_image(seed, mode="RGB"):
    pixels = torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((32, 32)).convert(mode)


def classes(image, label, names, mode="RGB", **more):
    """Rows of images and classes, with the columns that the data set has on the Hub."""
    features = Features({image: IMAGE, label: ClassLabel(names=names)} | {name: Value("int64") for name in more})
    rows = [{image: make_image(i, mode), label: LABELS[i], **more} for i in range(ROWS)]
    return Dataset.from_list(rows, features=features)


def make_snli_ve():
    strings = ("filename", "premise", "hypothesis", "blip_caption")
    lists = ("clip_tags_ViT_L_14", "LLM_Description_gpt3_downstream_tasks_visual_genome_ViT_L_14")
    features = Features(
        {"image": IMAGE, "label": ClassLabel(names=SNLI_VE), "id": Value("int64"), "id_image": Value("int64")}
        | {name: Value("string") for name in strings}
        | {name: List(Value("string")) for name in lists}
    )
    rows = [
        dict.fromkeys(strings, "")
        | dict.fromkeys(lists, [])
        | {"image": make_image(i), "hypothesis": f"It is number {i}.", "label": LABELS[i], "id": i, "id_image": i}
        for i in range(ROWS)
    ]
    return Dataset.from_list(rows, features=features)


def make_vsr(folder):
    """Rows with addresses of images, which are those of files here."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(ROWS):
        path = folder / f"{i:012}.jpg"
        make_image(i).save(path)
        rows.append(
            {
                "image": path.name,
                "image_link": path.absolute().as_uri(),
                "caption": f"The cat is behind number {i}.",
                "label": min(LABELS[i], 1),
                "relation": "behind",
                "annotator_id": 1,
                "vote_true_validator_id": [1, 2],
                "vote_false_validator_id": [],
            }
        )
    return Dataset.from_list(rows)


ADAPTERS = {"adapter": {}, "in_image": {"interaction_placement": "image"}}
# For each task: the name of the data set, what the task file does with it, and how it asks.
TASKS = {
    "m2pt_vsr": ("cambridgeltl/vsr_zeroshot", utils.load_vsr, utils.ask_vsr),
    "m2pt_snli_ve": ("Multimodal-Fatima/SNLI-VE_test", utils.load_snli_ve, utils.ask_snli_ve),
    "m2pt_cifar_10": ("uoft-cs/cifar10", utils.load_cifar_10, utils.ask_class),
    "m2pt_cifar_100": ("uoft-cs/cifar100", utils.load_cifar_100, utils.ask_class),
    "m2pt_mnist": ("ylecun/mnist", utils.load_mnist, utils.ask_mnist),
}
ANSWERS = {
    "m2pt_vsr": ["no", "yes"],
    "m2pt_snli_ve": SNLI_VE,
    "m2pt_cifar_10": CIFAR_10,
    "m2pt_cifar_100": ["apple", "aquarium fish", "baby", "crab"],
    "m2pt_mnist": list("0123"),
}


def make_hub(folder):
    """Puts data sets with generated rows where those of the Hub are looked for."""
    data = {
        "m2pt_vsr": make_vsr(folder / "images"),
        "m2pt_snli_ve": make_snli_ve(),
        "m2pt_cifar_10": classes("img", "label", CIFAR_10),
        "m2pt_cifar_100": classes("img", "fine_label", CIFAR_100, coarse_label=0),
        "m2pt_mnist": classes("image", "label", [str(i) for i in range(10)], mode="L"),
    }
    for task, rows in data.items():
        (folder / TASKS[task][0]).mkdir(parents=True)
        if task == "m2pt_vsr":
            rows.to_json(folder / TASKS[task][0] / "test.jsonl")
        else:
            rows.to_parquet(folder / TASKS[task][0] / "test-00000-of-00001.parquet")
    return data


def read_questions(task, rows):
    """What a task asks of a model: image, instruction and answer."""
    _, load, ask = TASKS[task]
    rows = load(rows)
    images = [(utils.download_image if task == "m2pt_vsr" else utils.to_image)(row)[0] for row in rows]
    questions = [{"image": image, "instruction": ask(row)} for image, row in zip(images, rows)]
    labels = next(rows[name] for name in ("fine_label", "label") if name in rows.column_names)
    return [question | {"answer": ANSWERS[task][label]} for question, label in zip(questions, labels)]


def always(rows, which):
    """Some of the questions, all with the answer that most of them have (-1), or that fewest have (0)."""
    answers = sorted((row["answer"] for row in rows), key=[row["answer"] for row in rows].count)
    return [{name: row[name] for name in ("image", "instruction")} | {"answer": answers[which]} for row in rows[:2]]


class Tuned:
    """
    A base model that answers a task in one way, and adapters that answer in another, so that each is right for some of
    the images. What is trained of an adapter is the head, behind random prompts.
    """

    def __init__(self, folder):
        self.folder = folder
        self.questions = {task: read_questions(task, rows) for task, rows in make_hub(folder).items()}
        self.digits = list(quickstart.test_questions(quickstart.FULL.num_test_images).select(range(NUM_DIGITS)))
        tasks = [*self.questions.values(), self.digits]
        few, most = (Dataset.from_list([row for rows in tasks for row in always(rows, i)]) for i in (0, -1))
        texts = [f"{row['instruction']} {row['answer']}" for rows in tasks for row in rows]
        processor = tiny_llava.build_processor([*digits.texts(), *texts])
        torch.manual_seed(0)
        model = tiny_llava.build_model(processor, width=32)
        vqa.train(model, few, vqa.AnswerCollator(processor), 60, 5e-3, 0, "base")
        vqa.save(folder / "base", model, processor)
        for name, kwargs in ADAPTERS.items():
            adapted = adapt(self.load_base(), modules_to_save=["lm_head"], **kwargs)
            processor = peft_m2pt.adapt_processor(processor, adapted.peft_config["default"])
            for parameter_name, parameter in adapted.named_parameters():
                parameter.requires_grad_("lm_head.modules_to_save" in parameter_name)
            vqa.train(adapted, most, vqa.AnswerCollator(processor), 40, 1e-2, 0, name)
            adapted.save_pretrained(folder / name)
            peft_m2pt.bundle(folder / "base", folder / name, folder / f"bundle_{name}")

    def load_base(self):
        return AutoModelForImageTextToText.from_pretrained(self.folder / "base")

    def load(self, adapter):
        return PeftModel.from_pretrained(self.load_base(), self.folder / adapter)

    def generate(self, questions, model, max_new_tokens):
        """What `generate` answers, one question after the other."""
        processor = AutoProcessor.from_pretrained(self.folder / "base")
        if isinstance(model, PeftModel):
            processor = peft_m2pt.adapt_processor(processor, model.peft_config["default"])
        answers = []
        for row in questions:
            content = [{"type": "image"}, {"type": "text", "text": row["instruction"]}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = processor(images=row["image"], text=text, return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            answers.append(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        return answers

    def run(self, name, *arguments):
        """Runs a program and returns its results, and for each task the answers that it got."""
        output = self.folder / f"output_{name}"
        arguments = [*arguments, "--device", "cpu", "--log_samples", "--output_path", output]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(self.folder / "home"), "OMP_NUM_THREADS": "1"}
        process = subprocess.run(
            [sys.executable, "-m", *map(str, arguments)], cwd=self.folder, env=env, capture_output=True, text=True
        )
        results = list(output.rglob("*results*.json"))
        assert process.returncode == 0 and results, process.stdout + process.stderr
        samples = {}
        for path in output.rglob("*samples_*.jsonl"):
            rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])
            samples[max((task for task in (*TASKS, "m2pt_digits") if task in path.name), key=len)] = rows
        return json.loads(results[0].read_text())["results"], samples

    def lmms_eval(self, name, model, tasks, model_args):
        model_args = ",".join(f"{key}={value}" for key, value in (model_args | {"device_map": "cpu"}).items())
        return self.run(
            name,
            *("lmms_eval", "--model", model, "--model_args", model_args, "--tasks", ",".join(tasks)),
            *("--include_path", EVALUATION / "lmms_eval"),
        )

    def lmms(self, monkeypatch, adapter):
        """What lmms-eval asks."""
        monkeypatch.chdir(self.folder)
        # Not that of another run, which had a folder of the same name.
        monkeypatch.setenv("HF_DATASETS_CACHE", str(self.folder / "home" / "datasets"))
        arguments = f"model=llava_hf,pretrained=base,adapter={adapter},device_map=cpu"
        return get_model("m2pt").create_from_arg_string(arguments, {"device": "cpu", "batch_size": 1})

    def lm_eval(self, name, model_args):
        return self.run(
            name,
            *("peft_m2pt", "run", "lm_eval", "--model", "hf-multimodal", "--model_args", model_args),
            *("--tasks", "m2pt_digits", "--include_path", EVALUATION / "lm_eval", "--apply_chat_template"),
            *("--limit", NUM_DIGITS, "--batch_size", 4),
        )


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return Tuned(tmp_path_factory.mktemp("tuned"))


def share(answers, questions):
    return sum(answer.strip() == row["answer"] for answer, row in zip(answers, questions)) / len(answers)


class TestLmmsEval:
    @pytest.mark.parametrize(
        "model, adapter, model_args",
        [
            ("m2pt", "adapter", {"model": "llava_hf", "pretrained": "base", "adapter": "adapter"}),
            ("m2pt", "in_image", {"model": "llava_hf", "pretrained": "base", "adapter": "in_image"}),
            ("llava_hf", None, {"pretrained": "base"}),
        ],
        ids=["adapter", "in_image", "base"],
    )
    def test_scores(self, tuned, model, adapter, model_args):
        results, samples = tuned.lmms_eval(str(adapter), model, TASKS, model_args)
        expected = tuned.load(adapter) if adapter else tuned.load_base()
        scores = []
        for task, questions in tuned.questions.items():
            answers = tuned.generate(questions, expected, max_new_tokens=16)
            assert [row["input"].strip() for row in samples[task]] == [row["instruction"] for row in questions]
            assert [row["filtered_resps"] for row in samples[task]] == [answer.strip() for answer in answers]
            assert [row["target"] for row in samples[task]] == [row["answer"] for row in questions]
            scores.append(share(answers, questions))
            assert results[task]["accuracy,none"] == pytest.approx(scores[-1])
        if adapter is None:
            assert sum(scores) / len(scores) < 0.3
        else:
            assert sum(scores) / len(scores) > 0.4

    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_logits(self, tuned, monkeypatch, adapter):
        """Other prompts are seen in the logits, where they are not in answers."""
        expected, model = tuned.load(adapter), tuned.lmms(monkeypatch, adapter)
        row = tuned.questions["m2pt_mnist"][0]
        inputs = model._image_processor(images=row["image"], text="<image>Which?", return_tensors="pt")
        logits = expected(**inputs).logits
        torch.testing.assert_close(model._model(**inputs).logits, logits, rtol=0, atol=0)
        randomise(expected, seed=3)
        assert (expected(**inputs).logits - logits).abs().max() > 0.01


class TestLmEval:
    @pytest.mark.parametrize(
        "model_args, adapter",
        [
            ("pretrained=base,peft=adapter", "adapter"),
            ("pretrained=bundle_adapter", "adapter"),
            ("pretrained=bundle_in_image", "in_image"),
            ("pretrained=base", None),
        ],
        ids=["peft", "bundle", "in_image", "base"],
    )
    def test_scores(self, tuned, model_args, adapter):
        results, samples = tuned.lm_eval(model_args.replace("=", "_"), model_args)
        expected = tuned.load(adapter) if adapter else tuned.load_base()
        answers = tuned.generate(tuned.digits, expected, max_new_tokens=8)
        rows = samples["m2pt_digits"]
        assert [row["filtered_resps"][0] for row in rows] == [answer.strip() for answer in answers]
        score = share(answers, tuned.digits)
        assert results["m2pt_digits"]["exact_match,stripped"] == pytest.approx(score)
        assert score < 0.1 if adapter is None else score > 0.1


def read_commands(program):
    """Commands of docs/evaluation.md, from the name of a program on."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [command[command.index(program) :] for command in commands if program in command]


class TestDocs:
    def test_lmms_eval(self, monkeypatch):
        for command in read_commands("lmms-eval"):
            monkeypatch.setattr(sys, "argv", command)
            _, arguments = parse_eval_args()
            include = arguments.include_path and str(ROOT / arguments.include_path)
            tasks = arguments.tasks.split(",")
            assert TaskManager(include_path=include).match_tasks(tasks) == sorted(tasks)
            assert get_model(arguments.model)

    def test_lm_eval(self, monkeypatch):
        for command in read_commands("lm_eval"):
            monkeypatch.setattr(sys, "argv", list(command))
            arguments = HarnessCLI().parse_args()
            assert arguments.model == "hf-multimodal" and (ROOT / arguments.include_path).is_dir()


class TestRefusals:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ("model=llava_hf,pretrained=base", "--model m2pt lacks adapter=. It takes"),
            ("adapter=adapter", "--model m2pt lacks model=, pretrained=."),
            ("model=lava,pretrained=base,adapter=adapter", "model='lava' is no model of lmms-eval"),
            ("model=m2pt,pretrained=base,adapter=adapter", "model='m2pt' is no model of lmms-eval"),
            ("model=dummy,pretrained=base,adapter=adapter", "model='dummy' does not hold a model of transformers"),
            (
                "model=llava_hf,pretrained=base,adapter=lora",
                "It has peft_type='LORA', so this is not an M2PT",
            ),
            ("model=llava_hf,pretrained=base,adapter=base", "'adapter_config.json' of the adapter 'base'"),
            ("model=llava_hf,pretrained=bundle_adapter,adapter=adapter", "pretrained='bundle_adapter' is a bundle"),
        ],
    )
    def test_arguments(self, tuned, monkeypatch, arguments, message):
        monkeypatch.chdir(tuned.folder)
        get_peft_model(tuned.load_base(), LoraConfig(target_modules=["q_proj"])).save_pretrained("lora")
        with pytest.raises(ValueError) as error:
            get_model("m2pt").create_from_arg_string(arguments, {"device": "cpu"})
        assert message in str(error.value)

    def test_what_is_refused_while_answering_ends_the_program(self, tuned, monkeypatch):
        """lmms-eval would score an empty answer."""
        model = tuned.lmms(monkeypatch, "adapter")
        tasks = TaskManager(include_path=str(EVALUATION / "lmms_eval"), model_name="m2pt")

        def refuse(*args):
            raise peft_m2pt.UnsupportedModelError("layers.0: no.")

        handle = model._model.register_forward_pre_hook(refuse)
        with pytest.raises(SystemExit, match="error: layers.0: no."):
            simple_evaluate(model=model, tasks=["m2pt_mnist"], task_manager=tasks)
        handle.remove()
        assert isinstance(model._model, LlavaForConditionalGeneration)
        results = simple_evaluate(model=model, tasks=["m2pt_mnist"], task_manager=tasks)
        assert results["results"]["m2pt_mnist"]["accuracy,none"] > 0
