"""examples/train.py: runs from files to scores, and its options."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from helpers.hub_server import TOKEN, HubServer, Repo
from helpers.shapes import EXAMPLES, TASKS, draw, run_here, write
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import peft_m2pt


def run(arguments, folder, hub=None):
    environment = {
        **os.environ,
        "PYTHONPATH": str(EXAMPLES.parent),
        "HF_HOME": str(folder / "home"),
        "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9",
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
    }
    process = subprocess.run(
        [sys.executable, EXAMPLES / "train.py", *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


RECIPE = {
    "learning_rate": "3e-2",  # YAML takes this for a string.
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "gradient_checkpointing": True,
    "bad_images": "skip",
    "max_new_tokens": 8,
    "logging_steps": 1,
    "save_steps": 10,
    "dataloader_num_workers": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}
BROKEN = {"shape_4", "is_red_11", "is_red_179"}


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run on 200 images. Three of them are broken, one of those that it is scored with."""
    output = tmp_path_factory.mktemp("run")
    rows = draw(output / "data")
    write(output / "train.json", rows[:160])
    write(output / "eval.json", rows[160:])
    (output / "data/images/4.png").unlink()
    (output / "data/images/11.png").write_bytes(b"broken")
    (output / "data/images/179.png").write_bytes((output / "data/images/178.png").read_bytes()[:50])
    options = {
        **RECIPE,
        "model_name_or_path": str(folder / "model"),
        "train_data": "train.json",
        "eval_data": "eval.json",
        "image_folder": "data/images",
        "output_dir": "adapter",
    }
    (output / "options.yaml").write_text(yaml.safe_dump(options))
    return output, run(["options.yaml"], output)


def load_trained(folder, adapter):
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder / "model"), adapter)
    return model.eval(), AutoProcessor.from_pretrained(adapter)


class TestRuns:
    def test_loss_falls(self, trained):
        state = json.loads((trained[0] / "adapter/trainer_state.json").read_text())
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        assert len(losses) == state["max_steps"] == 20
        assert np.mean(losses[-5:]) < 0.75 * losses[0]

    def test_bad_images_are_reported(self, trained):
        output, stdout = trained
        reports = [json.loads(line) for line in (output / "adapter/bad_images.jsonl").read_text().splitlines()]
        assert {report["id"] for report in reports} == BROKEN
        assert "Images that could not be read: 3 (see adapter/bad_images.jsonl)" in stdout

    def test_scores_are_those_of_the_saved_adapter(self, folder, trained):
        """One question at a time, with nothing of the script."""
        output, stdout = trained
        model, processor = load_trained(folder, output / "adapter")
        right = {task: [] for task in TASKS}
        for row in json.loads((output / "eval.json").read_text()):
            if row["id"] in BROKEN:
                continue
            question, answer = (turn["value"] for turn in row["conversations"])
            image = Image.open(output / "data/images" / row["image"])
            inputs = processor(images=image, text=f"USER: {question} ASSISTANT:", return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            right[row["task_name"]].append(processor.decode(tokens, skip_special_tokens=True).strip() == answer)
        results = json.loads((output / "adapter/eval_results.json").read_text())
        scores = {name: value for name, value in results.items() if "exact_match" in name}
        assert results["eval_num_answers"] == 39
        assert scores == pytest.approx(
            {
                "eval_exact_match": np.mean(sum(right.values(), [])),
                **{f"eval_exact_match/{task}": np.mean(hits) for task, hits in right.items()},
            }
        )
        assert 0 < scores["eval_exact_match"]
        assert "eval_exact_match/colour" in stdout

    def test_resumes_with_data_of_the_hub_and_pushes(self, folder, trained):
        """From the middle, in another folder, and with flags alone."""
        output, _ = trained
        shutil.copytree(output / "adapter/checkpoint-10", output / "resumed/checkpoint-10")
        options = {
            **RECIPE,
            "model_name_or_path": folder / "model",
            "train_data": "user/conversations",
            "image_folder": output / "data/images",
            "output_dir": "resumed",
            "resume_from_checkpoint": "last",
            "push_to_hub": True,
            "hub_model_id": "user/shapes",
        }
        lines = [json.dumps(row) for row in json.loads((output / "train.json").read_text())]
        with HubServer() as hub:
            hub.repos["user/conversations"] = Repo(private=True)
            hub.repos["user/conversations"].commit("main", {"train.jsonl": "\n".join(lines).encode()})
            run([part for name, value in options.items() for part in (f"--{name}", value)], output, hub)
            pushed = hub.files("user/shapes")
        expected = load_file(output / "adapter/adapter_model.safetensors")
        resumed = load_file(output / "resumed/adapter_model.safetensors")
        assert resumed.keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(resumed[name], weight), name
        start = load_file(output / "resumed/checkpoint-10/adapter_model.safetensors")
        assert not any(torch.equal(start[name], weight) for name, weight in expected.items() if "scale" not in name)
        assert pushed["adapter_model.safetensors"] == (output / "resumed/adapter_model.safetensors").read_bytes()
        assert {"adapter_config.json", "README.md", "processor_config.json", "tokenizer.json"} <= pushed.keys()


def parse(examples, *arguments):
    return examples.train.parse([str(argument) for argument in arguments])


NEEDED = ("--model_name_or_path", "x", "--train_data", "y.json")


class TestOptions:
    def test_file_and_flags(self, examples, tmp_path):
        options = {
            "model_name_or_path": "user/model",
            "train_data": "data.json",
            "learning_rate": "1e-3",
            "num_visual_tokens": 5,
            "textual_layers": [0, -1],
            "visual_layers": "odd",
            "tune_connector": False,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "output_dir": str(tmp_path),
        }
        yaml_file, json_file = tmp_path / "options.yaml", tmp_path / "options.json"
        yaml_file.write_text(yaml.safe_dump(options))
        json_file.write_text(json.dumps(options))
        for file in (yaml_file, json_file):
            model, data, prompts, run = parse(examples, file, "--num_visual_tokens", 7, "--bad_images", "skip")
            assert (model.model_name_or_path, data.train_data, data.bad_images) == ("user/model", "data.json", "skip")
            assert run.learning_rate == 1e-3
            assert run.gradient_checkpointing_kwargs == {"use_reentrant": False}
            config = prompts.config()
            assert (config.num_visual_tokens, config.visual_layers, config.textual_layers) == (7, "odd", [0, -1])
            assert not config.tune_connector
        flags = parse(examples, *NEEDED, "--textual_layers", "0", "1", "--visual_layers", "first")
        assert (flags[2].config().textual_layers, flags[2].config().visual_layers) == ([0, 1], "first")

    def test_defaults(self, examples):
        """Those of M2PTConfig, and but for the rate the recipe of the paper. Code of others is not run."""
        model, data, prompts, run = parse(examples, *NEEDED)
        assert prompts.config().to_dict() == peft_m2pt.M2PTConfig().to_dict()
        assert (run.learning_rate, run.lr_scheduler_type, run.warmup_steps) == (3e-3, "cosine", 0.03)
        assert (run.weight_decay, run.num_train_epochs) == (0, 3)
        assert not model.trust_remote_code
        assert data.bad_images == "error"

    def test_the_recipe(self, examples):
        _, data, prompts, run = parse(examples, EXAMPLES / "train.yaml", "--bf16", "false", "--use_cpu")
        assert (run.learning_rate, run.lr_scheduler_type, run.warmup_steps) == (3e-3, "cosine", 0.03)
        assert (run.weight_decay, run.num_train_epochs, run.gradient_checkpointing) == (0, 3, True)
        assert run.per_device_train_batch_size * run.gradient_accumulation_steps == 32
        assert (data.max_length, prompts.num_visual_tokens, prompts.num_textual_tokens) == (1024, 20, 10)
        assert "\nbf16: true\n" in (EXAMPLES / "train.yaml").read_text()

    @pytest.mark.parametrize(
        "options, message",
        [
            ("leaning_rate: 1", r"options.yaml has an unknown option 'leaning_rate'. Is it 'learning_rate'\?"),
            ("xyz: 1", r"unknown option 'xyz'\.$"),
            ("just text", "options.yaml does not hold options, lines such as 'learning_rate: 7e-4'"),
            ("train_data: x.json", "There is no model to tune. Set model_name_or_path."),
            ("model_name_or_path: x", "There is nothing to train on. Set train_data."),
            (
                "{model_name_or_path: x, train_data: x, bad_images: keep}",
                r"bad_images='keep' is unknown. Choose one of \('error', 'skip'\)",
            ),
            (
                "{model_name_or_path: x, train_data: x, visual_layers: [0, some]}",
                r"visual_layers=\[0, 'some'\] is neither a list of layer indices nor one of",
            ),
        ],
    )
    def test_mistakes(self, examples, tmp_path, options, message):
        (tmp_path / "options.yaml").write_text(options)
        with pytest.raises(ValueError, match=message):
            parse(examples, tmp_path / "options.yaml")[2].config()

    def test_streaming_needs_max_steps(self, examples, folder, tmp_path):
        _, data, _, run = parse(examples, *NEEDED, "--streaming", "--output_dir", tmp_path, "--use_cpu")
        with pytest.raises(ValueError, match="streaming=True needs max_steps, since nobody knows how many samples"):
            examples.train.load_data(data, run, data.image_reader(tmp_path / "bad.jsonl", ["image"]))

    def test_checkpoints(self, examples, tmp_path):
        def find(*arguments):
            return examples.train.find_checkpoint(parse(examples, *NEEDED, "--output_dir", tmp_path, *arguments)[3])

        assert find() is None
        assert find("--resume_from_checkpoint", "last") is None
        for step in (9, 10):
            (tmp_path / f"checkpoint-{step}").mkdir()
        assert find("--resume_from_checkpoint", "last") == str(tmp_path / "checkpoint-10")
        assert find("--resume_from_checkpoint", "other") == "other"
        with pytest.raises(ValueError, match="checkpoint-10 is of an earlier run. Set resume_from_checkpoint=last"):
            find()


class TestInProcess:
    """What the runs above leave out."""

    def test_streaming_in_bfloat16(self, examples, monkeypatch, folder, rows, tmp_path):
        """Images alone, text alone, and both in one batch; the best checkpoint is loaded at the end."""
        turns = [{"from": "human", "value": "Say red."}, {"from": "gpt", "value": "red"}]
        source = write(tmp_path / "rows.jsonl", [*rows[:4], {"id": "text", "conversations": turns}] * 5)
        results = run_here(
            examples,
            monkeypatch,
            folder,
            tmp_path / "run",
            train_data=source,
            streaming=True,
            bf16=True,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="exact_match",
            max_length=40,
        )
        assert results["eval_num_answers"] == 8
        state = json.loads((tmp_path / "run/trainer_state.json").read_text())
        evaluations = [entry for entry in state["log_history"] if "eval_exact_match" in entry]
        scores = {entry["step"]: entry["eval_exact_match"] for entry in evaluations}
        assert scores.keys() == {2, 4}
        best = state["best_model_checkpoint"]
        assert best == str(tmp_path / "run" / f"checkpoint-{max(scores, key=scores.get)}")
        assert results["eval_exact_match"] == max(scores.values())

    def test_equal_seeds_give_equal_adapters(self, examples, monkeypatch, folder, tmp_path):
        adapters = []
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            torch.manual_seed(len(adapters))
            run_here(
                examples, monkeypatch, folder, tmp_path / name, max_steps=1, warmup_steps=0, eval_size=1, seed=seed
            )
            adapters.append(load_file(tmp_path / name / "adapter_model.safetensors"))
        first, second, other = adapters
        assert all(torch.equal(second[name], weight) for name, weight in first.items())
        trained = {name: weight for name, weight in first.items() if "prompt" in name and "scale" not in name}
        assert trained and not any(torch.equal(other[name], weight) for name, weight in trained.items())

    def test_image_placement(self, examples, monkeypatch, folder, tmp_path):
        """The processor leaves room for interaction prompts, also when it is loaded again."""
        run_here(
            examples, monkeypatch, folder, tmp_path / "run", interaction_placement="image", num_interaction_tokens=3
        )
        model, processor = load_trained(folder, tmp_path / "run")
        inputs = processor(images=Image.new("RGB", (16, 16)), text="<image>", return_tensors="pt")
        assert inputs["input_ids"].shape == (1, 4 + 3)
        assert model(**inputs).logits.isfinite().all()
