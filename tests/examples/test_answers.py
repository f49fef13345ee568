"""What is learned of a conversation, and how answers are scored."""

import pytest
import torch
from helpers.shapes import TEMPLATE, assistant, make_collator, make_processor, user
from PIL import Image
from transformers import EvalPrediction


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
