"""examples/train.py: data of one's own, from files to scores."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from hub_server import TOKEN, HubServer, Repo
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from shapes import (
    EXAMPLES,
    TASKS,
    TEMPLATE,
    assistant,
    draw,
    import_examples,
    make_model,
    make_processor,
    run_here,
    teach_words,
    user,
    write,
)
from transformers import AutoModelForImageTextToText, AutoProcessor, EvalPrediction, GenerationConfig

import peft_m2pt


@pytest.fixture
def examples(monkeypatch, tmp_path):
    return import_examples(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data, and with a model and its processor."""
    folder = tmp_path_factory.mktemp("train")
    draw(folder / "data")
    processor = make_processor()
    processor.save_pretrained(folder / "model")
    model = make_model(processor)
    teach_words(model, processor)
    model.save_pretrained(folder / "model")
    return folder


def sample(*messages):
    number = sum(part["type"] == "image" for message in messages for part in message["content"])
    images = [Image.new("RGB", (20 + 4 * i, 20), (50 * i, 100, 20)) for i in range(number)]
    return {"index": 7, "messages": list(messages), "images": images, "videos": []}


SAMPLES = {
    "image": sample(user(None, "Which colour is it?"), assistant("red")),
    "text only": sample(user("Say blue."), assistant("blue, of course")),
    "several turns": sample(
        user(None, "Which colour is it?"),
        assistant("red"),
        user("Is it red?"),
        assistant("yes"),
        user("Which shape is it?"),
        assistant("red"),
    ),
    "several images": sample(user(None, "and", None, "are what?"), assistant("shapes")),
    "an image in each turn": sample(
        user(None, "What?"),
        assistant("a circle"),
        user("And", None),
        assistant("a square"),
        user("?"),
        assistant("no"),
    ),
    "empty answer": sample(user(None, "Nothing?"), {"role": "assistant", "content": []}),
}

# Templates, with the token that ends an answer, and what they write between the answer and what is in front of it.
LLAVA_WITHOUT_END = TEMPLATE.replace("eos_token", "' '")
CHATML = """\
{%- for message in messages -%}
{{ '<start>' + message['role'] + '\n' }}
{%- for part in message['content'] -%}
{{ '<image>' if part['type'] == 'image' else part['text'] }}
{%- endfor -%}
{{ '<end>\n' }}
{%- endfor -%}
{{ '<start>assistant\n' if add_generation_prompt }}"""
THINKING = CHATML.replace("'<start>assistant\n' if", "'<start>assistant\n<think>\n' if")
TEMPLATES = {
    "end of sequence": (TEMPLATE, "</s>", " "),
    "no end": (LLAVA_WITHOUT_END, "</s>", " "),
    "end of turn": (CHATML, "<end>", ""),
    "a longer prompt": (THINKING, "<end>", ""),
}


def make_collator(examples, template=TEMPLATE, **kwargs):
    processor = make_processor(template)
    end_of_turn = processor.tokenizer.convert_tokens_to_ids("<end>")
    config = GenerationConfig(eos_token_id=[end_of_turn, 1])
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    return examples.answers.AnswerCollator(processor, config, {"image": image_token}, **kwargs)


def labelled_runs(batch, row):
    """The runs of labels, each with the place where it begins."""
    runs, labels = [], batch["labels"][row].tolist()
    for i, label in enumerate(labels):
        if label != -100 and (i == 0 or labels[i - 1] == -100):
            runs.append((i, []))
        if label != -100:
            runs[-1][1].append(label)
    return runs


class TestLabels:
    @pytest.mark.parametrize("template, end, space", TEMPLATES.values(), ids=TEMPLATES)
    def test_are_the_answers_and_no_more(self, examples, template, end, space):
        collator = make_collator(examples, template)
        samples = list(SAMPLES.values())
        batch = collator(samples)
        assert len(batch["pixel_values"]) == 7
        for i, one in enumerate(samples):
            runs = labelled_runs(batch, i)
            answers = [examples.answers.text_of(m) for m in one["messages"] if m["role"] == "assistant"]
            decoded = [collator.tokenizer.decode(tokens) for _, tokens in runs]
            assert decoded == [f"{space}{answer}{end}" for answer in answers]
            for start, tokens in runs:
                assert batch["input_ids"][i, start : start + len(tokens)].tolist() == tokens
        assert batch["labels"][batch["attention_mask"] == 0].eq(-100).all()

    @pytest.mark.parametrize("template", [TEMPLATE, LLAVA_WITHOUT_END, CHATML])
    def test_stand_behind_what_generation_starts_from(self, examples, template):
        collator = make_collator(examples, template)
        for one in SAMPLES.values():
            batch = collator([one])
            turns = [i for i, message in enumerate(one["messages"]) if message["role"] == "assistant"]
            for (start, _), turn in zip(labelled_runs(batch, 0), turns, strict=True):
                messages = one["messages"][:turn]
                shown = sum(part["type"] == "image" for message in messages for part in message["content"])
                prompt = collator([{**one, "messages": messages, "images": one["images"][:shown]}])
                assert prompt["input_ids"][0].tolist() == batch["input_ids"][0, :start].tolist()

    def test_samples_do_not_depend_on_their_batch(self, examples):
        collator = make_collator(examples)
        batch = collator(list(SAMPLES.values()))
        for i, one in enumerate(SAMPLES.values()):
            alone = collator([one])
            length = alone["input_ids"].shape[1]
            for name in ("input_ids", "attention_mask", "labels"):
                assert torch.equal(batch[name][i, :length], alone[name][0]), name

    def test_only_text(self, examples):
        batch = make_collator(examples)([SAMPLES["text only"]])
        assert set(batch) == {"input_ids", "attention_mask", "labels"}

    def test_max_length(self, examples):
        one = SAMPLES["several turns"]
        whole = make_collator(examples)([one])
        length = whole["input_ids"].shape[1]
        batch = make_collator(examples, max_length=length - 4)([one])
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(batch[name], whole[name][:, : length - 4])
        assert torch.equal(batch["pixel_values"], whole["pixel_values"])
        with pytest.raises(
            ValueError, match=rf"max_length=5 cuts an image apart, in a batch of {length} tokens.*high"
        ):
            make_collator(examples, max_length=5)([one])

    def test_templates_that_do_not_serve(self, examples):
        with pytest.raises(ValueError, match="LlavaProcessor of this model has no chat template. Set chat_template"):
            make_collator(examples, None)
        upper = TEMPLATE.replace("else part['text']", "else part['text'].upper()")
        with pytest.raises(ValueError, match="does not write messages as they are.*WHICH COLOUR.*Set chat_template"):
            make_collator(examples, upper)([SAMPLES["image"]])
        # Answers of the past are left out.
        condition = "{%- if message['role'] == 'user' or loop.last -%}"
        forgetful = TEMPLATE.replace("{%- for part in", condition + "{%- for part in")
        forgetful = forgetful.replace("{%- endfor -%}\n{{ ' '", "{%- endfor -%}{%- endif -%}\n{{ ' '")
        with pytest.raises(ValueError, match="does not write messages as they are"):
            make_collator(examples, forgetful)([SAMPLES["several turns"]])

    def test_prompts(self, examples):
        collator = make_collator(examples)
        ends = [{**one, "messages": one["messages"][:-1]} for one in SAMPLES.values() if one["images"]]
        batch = collator(ends)
        assert batch["index"].tolist() == [7] * len(ends)
        assert "labels" not in batch
        assert (batch["attention_mask"][:, -1] == 1).all()
        texts = collator.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        assert all(text.endswith("ASSISTANT:") for text in texts)


def read_all(examples, source, folder, streaming=False, bad_images="error"):
    """Reads all samples of a source, with images as lists of pixels."""
    conversations = examples.conversations
    reader = conversations.ImageReader(folder / "data" / "images", bad_images, folder / "bad.jsonl")
    rows = conversations.load(str(source), "train", streaming)
    kind = conversations.StreamedConversations if streaming else conversations.Conversations
    data = kind(rows, reader)
    samples = list(data) if streaming else [data[i] for i in range(len(data))]
    return [(one["messages"], [np.asarray(image).tolist() for image in one["images"]]) for one in samples]


@pytest.fixture
def rows(folder):
    return json.loads((folder / "data" / "annotation.json").read_text())[:6]


TURNS = List({"from": Value("string"), "value": Value("string")})


class TestLayouts:
    def expected(self, folder, rows):
        """What the rows are, without any of the code that reads them."""
        samples = []
        for row in rows:
            question, answer = (turn["value"] for turn in row["conversations"])
            pixels = np.asarray(Image.open(folder / "data" / "images" / row["image"])).tolist()
            samples.append(([user(None, question.removeprefix("<image>\n")), assistant(answer)], [pixels]))
        return samples

    def content(self, folder, name):
        return {"bytes": (folder / "data" / "images" / name).read_bytes(), "path": name}

    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
    @pytest.mark.parametrize("layout", ["lines", "paths in parquet", "images in parquet", "lists of images"])
    def test_files(self, examples, folder, rows, tmp_path, layout, streaming):
        expected = self.expected(folder, rows)
        if layout == "lines":
            source = write(tmp_path / "rows.jsonl", rows)
        else:
            source = tmp_path / "*.parquet"
            stored, image = rows, Value("string")
            if layout != "paths in parquet":
                stored, image = [{**row, "image": self.content(folder, row["image"])} for row in rows], ImageFeature()
            if layout == "lists of images":
                stored, image = [{**row, "image": [row["image"]]} for row in stored], List(image)
            text = {"id": Value("string"), "task_name": Value("string"), "conversations": TURNS}
            dataset = Dataset.from_list(stored, features=Features({**text, "image": image}))
            for i in range(2):
                dataset.shard(2, i, contiguous=True).to_parquet(tmp_path / f"rows-{i}.parquet")
        assert read_all(examples, source, folder, streaming) == expected

    def test_json(self, examples, folder, rows, tmp_path):
        assert read_all(examples, write(tmp_path / "rows.json", rows), folder) == self.expected(folder, rows)

    def test_folder_in_place_of_a_repository(self, examples, folder, rows, tmp_path):
        (tmp_path / "set").mkdir()
        write(tmp_path / "set" / "train.jsonl", rows[:2])
        write(tmp_path / "set" / "test.jsonl", rows[2:])
        assert read_all(examples, tmp_path / "set", folder) == self.expected(folder, rows[:2])
        assert len(examples.conversations.load(str(tmp_path / "set"), "test", False)) == 4

    def test_llava(self, examples):
        """Several turns, a system message, several images, none, and one without its marker."""
        turns = [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Compare <image> with <image>\nplease"},
            {"from": "gpt", "value": " They differ. "},
            {"from": "human", "value": "How?"},
            {"from": "gpt", "value": ""},
        ]
        system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
        first = user(None, "x")
        first["content"] = [
            {"type": "text", "text": "Compare"},
            {"type": "image"},
            {"type": "text", "text": "with"},
            {"type": "image"},
            {"type": "text", "text": "please"},
        ]
        messages = examples.conversations.messages_of
        second = [user("How?"), {"role": "assistant", "content": []}]
        assert messages({"image": ["a", "b"], "conversations": turns}) == [
            system,
            first,
            assistant("They differ."),
            *second,
        ]
        assert messages({"images": ["a"], "conversations": turns[3:]})[0] == user(None, "How?")
        assert messages({"image": None, "conversations": turns[3:]}) == second

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"conversations": None}, r"sample 'a' has no 'conversations'; its fields are \['conversations', 'id'"),
            ({"conversations": [{"from": "bot", "value": "x"}]}, r"'bot'.*needs a 'from', one of \['human', 'user'"),
            ({"conversations": [{"from": "gpt", "value": 3}]}, "has the turn.*and a 'value'"),
            ({"conversations": [{"from": "human", "value": "x"}]}, r"turns of \['user'\], but questions and answers"),
            ({"image": ["a.png", "b.png"]}, "sample 'a' has 1 <image> in its text, but 2 images"),
            ({"image": None}, "sample 'a' has 1 <image> in its text, but 0 images"),
            (
                {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "<image>"}]},
                "<image> in a turn of 'gpt', but only users show images",
            ),
            ({"image": "../../secret.png"}, "'../../secret.png', which is outside of"),
            ({"image": "/etc/hostname"}, "'/etc/hostname', which is outside of"),
            ({"image": {"bytes": None, "path": "../x.png"}}, "'../x.png', which is outside of"),
        ],
    )
    def test_mistakes_are_found_at_the_start(self, examples, folder, change, message):
        turns = [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "y"}]
        row = {"id": "a", "image": "a.png", "conversations": turns, **change}
        good = {"id": "b", "image": "0.png", "conversations": turns}
        reader = examples.conversations.ImageReader(folder / "data" / "images", "skip", folder / "bad.jsonl")
        with pytest.raises(ValueError, match=message):
            examples.conversations.Conversations([good, row], reader)
        with pytest.raises(ValueError, match=message):
            list(examples.conversations.StreamedConversations([good, row], reader))

    def test_sources_that_are_not_there(self, examples, folder, tmp_path):
        load = examples.conversations.load
        with pytest.raises(FileNotFoundError, match="There is no file nowhere/x.json"):
            load("nowhere/x.json", "train", False)
        with pytest.raises(ValueError, match="is one JSON array, which is only read as a whole.*.jsonl"):
            load(str(folder / "data" / "annotation.json"), "train", True)
        reader = examples.conversations.ImageReader(None, "error", tmp_path / "bad.jsonl")
        with pytest.raises(ValueError, match="There are no samples"):
            examples.conversations.Conversations([], reader)
        with pytest.raises(ValueError, match="sample 'is_red_2' has its image in the file '2.png'. Set image_folder"):
            examples.conversations.Conversations(json.loads((folder / "data/annotation.json").read_text())[2:], reader)


BAD = {
    "missing": lambda path: path.unlink(),
    "no image": lambda path: path.write_text("this is text"),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "empty": lambda path: path.write_bytes(b""),
}


class TestBadImages:
    @pytest.fixture(params=BAD)
    def bad_rows(self, request, tmp_path):
        """Rows 1 and 2 of 6, side by side in a batch of two, have bad images."""
        rows = draw(tmp_path / "data", 6)
        for i in (2, 3):
            BAD[request.param](tmp_path / "data" / "images" / f"{i}.png")
        return rows

    def make(self, examples, rows, folder, bad_images, streamed=False):
        kind = examples.conversations.StreamedConversations if streamed else examples.conversations.Conversations
        return kind(rows, examples.conversations.ImageReader(folder / "data/images", bad_images, folder / "bad.jsonl"))

    def test_error(self, examples, bad_rows, tmp_path):
        message = r"sample 'is_red_2' has an image that cannot be read, .*2\.png \(.*Error.*bad_images=skip"
        data = self.make(examples, bad_rows, tmp_path, "error")
        assert len(data[0]["images"]) == 1
        with pytest.raises(ValueError, match=message):
            data[2]
        with pytest.raises(ValueError, match=message):
            list(self.make(examples, bad_rows, tmp_path, "error", streamed=True))

    def test_skip(self, examples, bad_rows, tmp_path, caplog):
        data = self.make(examples, bad_rows, tmp_path, "skip")
        assert [data[i]["index"] for i in range(6)] == [0, 1, 4, 4, 4, 5]
        assert data[2]["messages"] == data[4]["messages"]
        # A batch of bad images only is as large as any other.
        batch = make_collator(examples)([data[2], data[3]])
        assert len(batch["pixel_values"]) == len(batch["input_ids"]) == 2
        # Once for each, however often they were asked for.
        assert [record.args[0] for record in caplog.records] == ["is_red_2", "colour_3"]
        assert [report["id"] for report in data.reader.reports()] == ["is_red_2", "colour_3"]
        # As another worker would.
        other = self.make(examples, bad_rows, tmp_path, "skip")
        other[3]
        assert len(other.reader.reports()) == 2
        streamed = self.make(examples, bad_rows, tmp_path, "skip", streamed=True)
        assert [one["messages"] for one in streamed] == [data[i]["messages"] for i in (0, 1, 4, 5)]

    def test_all_bad(self, examples, bad_rows, tmp_path, monkeypatch):
        rows = [bad_rows[2]] * 3
        for streamed in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(examples.conversations, "MAX_BAD_IN_A_ROW", 3)
                with pytest.raises(ValueError, match="No image of many samples in a row.*Is image_folder right"):
                    next(iter(self.make(examples, rows, tmp_path, "skip", streamed)))


def test_scores(examples, folder, rows):
    """Right and wrong answers of three tasks, with one that came twice, and one that could not be read."""
    reader = examples.conversations.ImageReader(folder / "data" / "images", "skip", folder / "bad.jsonl")
    data = examples.conversations.Conversations(rows, reader, ask=True)
    assert data[0]["messages"] == [user(None, "Which colour is it?")]
    processor = make_processor()
    given = {0: " red</s>", 1: "circle</s>", 2: " yes</s>", 3: " red</s>", 4: " circle</s>"}
    assert [data.answer(i) for i in given] == ["red", "circle", "no", "yellow", "square"]
    tokens = [processor.tokenizer(given[i])["input_ids"] for i in (0, 1, 2, 3, 4, 4)]
    predictions = torch.full((6, max(map(len, tokens))), -100)
    for i, row in enumerate(tokens):
        predictions[i, : len(row)] = torch.tensor(row)
    labels = torch.tensor([0, 1, 2, 3, 4, 4])
    scores = examples.answers.Scores(data, processor)(EvalPrediction(predictions.numpy(), labels.numpy()))
    assert scores == {
        "exact_match": 2 / 5,
        "num_answers": 5,
        "exact_match/colour": 1 / 2,
        "exact_match/is_red": 0,
        "exact_match/shape": 1 / 2,
    }


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
        assert np.mean(losses[-5:]) < 0.7 * losses[0]

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
