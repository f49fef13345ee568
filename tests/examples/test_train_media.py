"""examples/train.py with several images in one conversation, images in later turns, and videos."""

import json

import pytest
import torch
from helpers.media import (
    IMAGES,
    VIDEO_TEMPLATE,
    answers_in,
    answers_of,
    idefics3,
    llava,
    llava_next,
    llava_onevision,
    make_rows,
    mllama,
    save,
)
from helpers.shapes import TEMPLATE, import_examples, make_processor, run_here
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import BatchFeature, GenerationConfig, LlavaOnevisionForConditionalGeneration, LlavaProcessor


@pytest.fixture
def examples(monkeypatch, tmp_path):
    return import_examples(monkeypatch, tmp_path)


def train(examples, monkeypatch, folder, family, kinds, **options):
    save(family, folder / "model")
    make_rows(folder / "data", kinds)
    return run_here(
        examples,
        monkeypatch,
        folder,
        folder / "adapter",
        **{
            "train_data": folder / "data/rows.jsonl",
            "image_folder": folder / "data",
            "eval_size": 4,
            "gradient_checkpointing": True,
            "num_visual_tokens": 3,
            **options,
        },
    )


@pytest.mark.parametrize(
    "family, kinds",
    [(llava, IMAGES), (llava_next, IMAGES), (idefics3, IMAGES), (mllama, IMAGES[:2])],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_images(examples, monkeypatch, tmp_path, family, kinds):
    """All kinds in one batch, from files to scores."""
    results = train(examples, monkeypatch, tmp_path, family, kinds)
    assert results["eval_num_answers"] == 4
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(weights) > 8 and all(weight.isfinite().all() for weight in weights.values())


def read(examples, folder, kinds, rows=None, **kwargs):
    """All samples of made rows."""
    rows = make_rows(folder, kinds) if rows is None else rows
    reader = examples.conversations.ImageReader(folder, "error", folder / "bad.jsonl", **kwargs)
    data = examples.conversations.Conversations(rows, reader)
    return [data[i] for i in range(len(data))]


def collate(examples, processor, samples, **placeholders):
    config = GenerationConfig(eos_token_id=processor.tokenizer.eos_token_id)
    return examples.answers.AnswerCollator(processor, config, placeholders)(samples)


class CountsImages(LlavaProcessor):
    """As that of LLaVA-OneVision, in which the tokens of an image depend on how many images the sample has."""

    def __call__(self, images=None, text=None, **kwargs):
        numbers = [len(shown) for shown in images] if images else [0] * len(text)
        text = [one.replace("<image>", "<image>" + "#" * number) for one, number in zip(text, numbers)]
        return super().__call__(images=images, text=text, **kwargs)


def counts_images():
    model_class, config, processor = llava()
    processor.__class__ = CountsImages
    return model_class, config, processor


@pytest.mark.parametrize("family", [llava, llava_next, idefics3, mllama, counts_images])
def test_labels_are_the_answers(examples, tmp_path, family):
    """Those in front of images of later turns too, whose tokens are counted with all images of the sample."""
    processor = family()[2]
    samples = read(examples, tmp_path / "data", IMAGES[: 2 if family is mllama else 3])
    batch = collate(examples, processor, samples)
    assert answers_in(batch, processor.tokenizer) == answers_of(samples)
    for tokens, labels in zip(batch["input_ids"], batch["labels"]):
        starts = ((labels[1:] != -100) & (labels[:-1] == -100)).nonzero()[:, 0]
        assert all(processor.tokenizer.decode(tokens[: start + 1]).endswith("ASSISTANT:") for start in starts)


class FramesProcessor(LlavaProcessor):
    """
    Takes every second frame of videos, as processors do that have a processor of videos. Those need torchvision:
    tests/processes/check_video.py runs them.
    """

    video_processor = "takes every second frame"

    def __call__(self, images=None, text=None, videos=None, **kwargs):
        frames = [[Image.open(video)] * 2 if isinstance(video, str) else video[::2] for video in videos or []]
        parts = iter(frames)
        text = [
            "".join(part + "<video>" * (len(next(parts)) + 1) for part in pieces[:-1]) + pieces[-1]
            for pieces in (one.split("<video>") for one in text)
        ]
        batch = super().__call__(images=images, text=text, **kwargs)
        if frames:
            pixels = self.image_processor([frame for video in frames for frame in video], return_tensors="pt")
            batch["pixel_values_videos"] = pixels["pixel_values"].unflatten(0, (len(frames), -1))
        return BatchFeature(batch)


def frames_processor(tokenizer):
    return FramesProcessor(
        make_processor().image_processor,
        tokenizer,
        patch_size=8,
        num_additional_image_tokens=0,
        chat_template=VIDEO_TEMPLATE,
    )


def onevision():
    return llava_onevision(frames_processor)


VIDEOS = ["frames", "text"]


class TestVideos:
    def test_a_run(self, examples, monkeypatch, tmp_path):
        """The adapter gets videos and nothing else, and the answers that are scored are to them."""
        processor = onevision()[2]
        monkeypatch.setattr(examples.train, "load_processor", lambda arguments, config: processor)
        results = train(examples, monkeypatch, tmp_path, onevision, VIDEOS, max_new_tokens=2)
        assert results["eval_num_answers"] == 4
        base = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "model")
        model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        rows = [json.loads(line) for line in (tmp_path / "data/rows.jsonl").read_text().splitlines()]
        samples = read(examples, tmp_path / "data", VIDEOS, rows)
        batch = collate(examples, processor, samples)
        assert batch["pixel_values_videos"].shape == (6, 2, 3, 16, 16)
        with torch.no_grad():
            logits = model(**batch).logits
            for i, frames in enumerate([0, None, 1, None, 2, None]):
                alone = collate(examples, processor, [samples[i]])
                assert ("pixel_values_videos" in alone) == (frames is not None)
                length = alone["input_ids"].shape[1]
                torch.testing.assert_close(logits[i, :length], model(**alone).logits[0], rtol=1e-4, atol=1e-4)

    def test_labels_are_the_answers(self, examples, tmp_path):
        """In front of videos of later turns too."""
        turns = [
            {"from": "human", "value": "Which colour is it, <video>?"},
            {"from": "gpt", "value": "red"},
            {"from": "human", "value": "And <video>?"},
            {"from": "gpt", "value": "green"},
        ]
        make_rows(tmp_path / "data", ["text"])
        frames = [[f"{i}.png"] * 3 for i in range(2)]
        [sample] = read(examples, tmp_path / "data", [], [{"id": "a", "videos": frames, "conversations": turns}])
        processor = onevision()[2]
        token = processor.tokenizer.convert_tokens_to_ids("<video>")
        batch = collate(examples, processor, [sample], video=token)
        assert (batch["input_ids"] == token).sum() == 2 * 3
        assert answers_in(batch, processor.tokenizer) == answers_of([sample]) == [" red</s> green</s>"]
        collator = examples.answers.AnswerCollator(processor, GenerationConfig(), {"video": token}, max_length=5)
        with pytest.raises(ValueError, match="max_length=5 cuts a video apart.*those of videos included"):
            collator([sample])

    def test_files_and_frames(self, examples, tmp_path):
        """Files are left to the processor, which chooses frames of them."""
        make_rows(tmp_path / "data", ["text"])
        (tmp_path / "data/a.mp4").write_bytes(b"not looked into here")
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
        rows = [
            {"id": "file", "video": "a.mp4", "conversations": turns},
            {"id": "frames", "video": ["0.png", "1.png"], "image": "2.png", "conversations": turns},
        ]
        file, frames = read(examples, tmp_path / "data", [], rows)
        assert (file["videos"], file["images"]) == ([str(tmp_path / "data/a.mp4")], [])
        assert [[frame.size for frame in video] for video in frames["videos"]] == [[(20, 18), (24, 18)]]
        # Without a place in the text, they stand in front of the first question.
        assert [part["type"] for part in frames["messages"][0]["content"]] == ["video", "image", "text"]

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"video": "../a.mp4"}, "'../a.mp4', which is outside of"),
            ({"video": ["0.png", "/etc/hostname"]}, "'/etc/hostname', which is outside of"),
            ({"video": {"bytes": b"", "path": "a.mp4"}}, "neither a path nor a list of frames, but a dict"),
            ({"videos": ["a.mp4", "b.mp4"]}, "sample 'a' has 1 <video> in its text, but 2 videos"),
            ({}, "sample 'a' has 1 <video> in its text, but 0 videos"),
        ],
    )
    def test_mistakes_are_found_at_the_start(self, examples, tmp_path, change, message):
        turns = [{"from": "human", "value": "<video>x"}, {"from": "gpt", "value": "y"}]
        with pytest.raises(ValueError, match=message):
            read(examples, tmp_path, [], [{"id": "a", "conversations": turns, **change}])

    def test_bad_videos(self, examples, tmp_path):
        make_rows(tmp_path / "data", ["text"])
        turns = [{"from": "human", "value": "<video>x"}, {"from": "gpt", "value": "y"}]
        rows = [
            {"id": "missing", "video": "a.mp4", "conversations": turns},
            {"id": "bad frame", "video": ["0.png", "9.png"], "conversations": turns},
            {"id": "good", "video": ["0.png", "1.png"], "conversations": turns},
        ]
        for row in rows[:2]:
            with pytest.raises(
                ValueError, match=f"sample '{row['id']}' has a video that cannot be read.*bad_images=skip"
            ):
                read(examples, tmp_path / "data", [], [row])
        reader = examples.conversations.ImageReader(tmp_path / "data", "skip", tmp_path / "bad.jsonl")
        assert examples.conversations.Conversations(rows, reader)[0]["index"] == 2
        assert [report["id"] for report in reader.reports()] == ["missing", "bad frame"]
        assert all("video" in report for report in reader.reports())


class TestRefusals:
    def test_videos_that_the_processor_does_not_take(self, examples, monkeypatch, tmp_path):
        """Before anything is trained; in a stream, when the row is read."""
        message = "sample '0' has videos, which the processor of this model does not take. Leave such samples out"
        with pytest.raises(ValueError, match=message):
            train(examples, monkeypatch, tmp_path, llava, VIDEOS)
        rows = [json.loads(line) for line in (tmp_path / "data/rows.jsonl").read_text().splitlines()]
        reader = examples.conversations.ImageReader(tmp_path / "data", "error", tmp_path / "bad", ["image"])
        with pytest.raises(ValueError, match=message):
            next(iter(examples.conversations.StreamedConversations(rows, reader)))

    def test_batches_that_the_processor_does_not_make(self, examples, tmp_path):
        class OneImage(LlavaProcessor):
            def __call__(self, images=None, text=None, **kwargs):
                if any(len(shown) > 1 for shown in images):
                    raise TypeError("one image for each text")
                return super().__call__(images=images, text=text, **kwargs)

        processor = make_processor()
        processor.__class__ = OneImage
        samples = read(examples, tmp_path / "data", ["several images", "text"])[:2]
        message = r"OneImage.*so many images and videos, \[\(2, 0\), \(0, 0\)\]: one image for each text"
        with pytest.raises(ValueError, match=message):
            collate(examples, processor, samples)

    def test_templates_that_leave_images_out(self, examples, tmp_path):
        """Where the processor does not notice."""

        class LooksAway(LlavaProcessor):
            def __call__(self, images=None, text=None, **kwargs):
                return super().__call__(text=text, **kwargs)

        processor = make_processor(TEMPLATE.replace("'<image>\n' if", "'' if"))
        processor.__class__ = LooksAway
        samples = read(examples, tmp_path / "data", ["several images"])
        with pytest.raises(ValueError, match="template of this model leaves images out. Set chat_template to another"):
            collate(examples, processor, samples[:1], image=processor.image_token_id)
