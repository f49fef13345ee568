"""
examples/train.py on videos, with processors of transformers, in an environment of the tests with torchvision,
torchcodec and av: PYTHONPATH=.:tests python -m pytest tests/processes/check_video.py
"""

import pytest
import torchvision  # noqa: F401
import transformers as tr
from helpers import media
from helpers.media import (
    ANYRES,
    IMAGES,
    SIZE,
    VIDEO_TEMPLATE,
    VISION,
    answers_in,
    answers_of,
    make_rows,
    make_tokenizer,
    save,
    text_sizes,
)
from helpers.shapes import IMAGE_SIZE, import_examples, run_here
from safetensors.torch import load_file
from transformers import AutoProcessor, GenerationConfig


def llava_onevision():
    def make(tokenizer):
        return tr.LlavaOnevisionProcessor(
            tr.LlavaOnevisionImageProcessor(size=SIZE, **ANYRES),
            tokenizer,
            tr.LlavaOnevisionVideoProcessor(size=SIZE),
            num_image_tokens=4,
            vision_feature_select_strategy="full",
            chat_template=VIDEO_TEMPLATE,
        )

    return media.llava_onevision(make)


def llava_next_video():
    tokenizer = make_tokenizer("<video>")
    processor = tr.LlavaNextVideoProcessor(
        tr.LlavaNextVideoVideoProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=SIZE),
        tr.LlavaNextImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=SIZE, **ANYRES),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VIDEO_TEMPLATE,
    )
    config = tr.LlavaNextVideoConfig(
        vision_config=tr.CLIPVisionConfig(**{**VISION, "num_hidden_layers": 3, "patch_size": 4}),
        text_config=tr.LlamaConfig(**text_sizes(tokenizer)),
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        **ANYRES,
    )
    return tr.LlavaNextVideoForConditionalGeneration, config, processor


def qwen2_vl():
    tokenizer = make_tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    written = "'<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>'"
    template = VIDEO_TEMPLATE.replace("'<' + part['type'] + '>\n'", written)
    sizes = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 256}}
    processor = tr.Qwen2VLProcessor(
        tr.Qwen2VLImageProcessor(**sizes), tokenizer, tr.Qwen2VLVideoProcessor(**sizes), chat_template=template
    )
    config = tr.Qwen2VLConfig(
        vision_config=tr.Qwen2VLVisionConfig(
            depth=2, embed_dim=32, hidden_size=48, mlp_ratio=2, num_heads=4, patch_size=4
        ),
        text_config=tr.Qwen2VLTextConfig(
            **text_sizes(tokenizer, rope_parameters={"rope_type": "default", "mrope_section": [2, 2, 2]})
        ),
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
            for name, token in {
                "image": "image_pad",
                "video": "video_pad",
                "vision_start": "vision_start",
                "vision_end": "vision_end",
            }.items()
        },
    )
    return tr.Qwen2VLForConditionalGeneration, config, processor


FAMILIES = [llava_onevision, llava_next_video, qwen2_vl]


@pytest.fixture
def examples(monkeypatch, tmp_path):
    return import_examples(monkeypatch, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run(examples, monkeypatch, tmp_path, family):
    """On videos, images, several of them and text in one batch, from files to scores."""
    save(family, tmp_path / "model")
    rows = make_rows(tmp_path / "data", ["frames", *IMAGES])
    results = run_here(
        examples,
        monkeypatch,
        tmp_path,
        tmp_path / "adapter",
        train_data=tmp_path / "data/rows.jsonl",
        image_folder=tmp_path / "data",
        eval_size=4,
        gradient_checkpointing=True,
    )
    assert results["eval_num_answers"] == 4
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(weights) > 8 and all(weight.isfinite().all() for weight in weights.values())

    processor = AutoProcessor.from_pretrained(tmp_path / "adapter")
    kinds = examples.conversations.kinds_of(processor)
    assert kinds == ["image", "video"]
    reader = examples.conversations.ImageReader(tmp_path / "data", "error", tmp_path / "bad.jsonl", kinds)
    data = examples.conversations.Conversations(rows, reader)
    samples = [data[i] for i in range(len(data))]
    collator = examples.answers.AnswerCollator(processor, GenerationConfig())
    batch = collator(samples)
    assert "pixel_values_videos" in batch
    assert answers_in(batch, processor.tokenizer) == answers_of(samples)


@pytest.mark.parametrize("family", FAMILIES)
def test_files(examples, tmp_path, family):
    """The processor reads a file, and chooses frames of it."""
    av = pytest.importorskip("av")
    folder = tmp_path / "data"
    make_rows(folder, ["text"])
    with av.open(folder / "a.mp4", "w") as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 32
        for i in range(8):
            image = tr.image_utils.load_image(str(folder / f"{i // 2}.png")).resize((32, 32))
            file.mux(stream.encode(av.VideoFrame.from_image(image)))
        file.mux(stream.encode())
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "red"}]
    reader = examples.conversations.ImageReader(folder, "error", tmp_path / "bad.jsonl")
    data = examples.conversations.Conversations([{"id": "a", "video": "a.mp4", "conversations": turns}], reader)
    processor = family()[2]
    processor.video_processor.num_frames, processor.video_processor.do_sample_frames = 4, True
    batch = examples.answers.AnswerCollator(processor, GenerationConfig())([data[0]])
    assert answers_in(batch, processor.tokenizer) == [" red</s>"]
    if "video_grid_thw" in batch:
        assert batch["video_grid_thw"][0, 0] == 2  # two frames make one patch
    else:
        assert batch["pixel_values_videos"].shape[:2] == (1, 4)
