"""Conversations in files of all layouts, and images that cannot be read."""

import json

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from helpers.shapes import assistant, draw, make_collator, user, write
from PIL import Image


BAD = {
    "missing": lambda path: path.unlink(),
    "no image": lambda path: path.write_text("this is text"),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "empty": lambda path: path.write_bytes(b""),
}


def read_all(examples, source, folder, streaming=False, bad_images="error"):
    """Reads all samples of a source, with images as lists of pixels."""
    conversations = examples.conversations
    reader = conversations.ImageReader(folder / "data" / "images", bad_images, folder / "bad.jsonl")
    rows = conversations.load(str(source), "train", streaming)
    kind = conversations.StreamedConversations if streaming else conversations.Conversations
    data = kind(rows, reader)
    samples = list(data) if streaming else [data[i] for i in range(len(data))]
    return [(one["messages"], [np.asarray(image).tolist() for image in one["images"]]) for one in samples]


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
