"""M2PT in axolotl's own `axolotl train`, for which `make test-axolotl` makes an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.shapes import draw, make_model, make_processor
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import peft_m2pt


ROOT = Path(__file__).parent.parent.parent
ADAPTER = "adapter_model.safetensors"
OPTIONS = {
    "plugins": ["peft_m2pt.integrations.axolotl.M2PTPlugin"],
    "adapter": "m2pt",
    "m2pt": {"num_visual_tokens": 4, "num_textual_tokens": 3},
    "base_model": "model",
    "processor_type": "AutoProcessor",
    "chat_template": "tokenizer_default",
    "datasets": [{"path": "train.jsonl", "ds_type": "json", "type": "chat_template"}],
    "skip_prepare_dataset": True,
    "remove_unused_columns": False,
    "sample_packing": False,
    "sequence_len": 128,
    "val_set_size": 0,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 8,
    "save_steps": 4,
    "logging_steps": 1,
    "learning_rate": 3e-2,
    "lr_scheduler": "cosine",
    "optimizer": "adamw_torch",
    "weight_decay": 0.0,
    "seed": 1,
    "attn_implementation": "sdpa",
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "bf16": False,
    "fp16": False,
    "tf32": False,
}


def axolotl_train(folder, output, **options):
    """Runs `axolotl train` on the CPU. Returns the process."""
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump({**OPTIONS, "output_dir": output, **options}))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
    }
    command = [Path(sys.executable).parent / "axolotl", "train", path, "--launcher", "python"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def succeed(process):
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]


def log_of(folder, steps=8):
    state = json.loads((folder / f"checkpoint-{steps}/trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny LLaVA and its data, and a run on them."""
    folder = tmp_path_factory.mktemp("axolotl")
    processor = make_processor()
    processor.save_pretrained(folder / "model")
    make_model(processor).save_pretrained(folder / "model")
    lines = []
    for row in draw(folder / "data", 24):
        question, answer = (turn["value"].removeprefix("<image>\n") for turn in row["conversations"])
        image = {"type": "image", "path": str(folder / "data/images" / row["image"])}
        turns = [
            {"role": "user", "content": [image, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        lines.append(json.dumps({"messages": turns}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    succeed(axolotl_train(folder, "adapter"))
    return folder


def logits(model, folder):
    processor = AutoProcessor.from_pretrained(folder / "model")
    image = Image.open(folder / "data/images/3.png")
    inputs = processor(images=image, text="USER: <image>\nWhich colour is it? ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


def base_of(folder):
    return LlavaForConditionalGeneration.from_pretrained(folder / "model")


def test_everything_is_trained(folder):
    """The loss falls, and each prompt and the connector move, those of the vision encoder behind checkpoints too."""
    losses = [entry["loss"] for entry in log_of(folder / "adapter")]
    assert len(losses) == 8 and sum(losses[-3:]) < 0.9 * sum(losses[:3])
    before = load_file(folder / "adapter/checkpoint-4" / ADAPTER)
    after = load_file(folder / "adapter" / ADAPTER)
    trained = {name for name in after if not name.endswith(".scale")}
    assert len(trained) == 8 and before.keys() == after.keys()
    assert {name for name in after if not torch.equal(before[name], after[name])} == trained


@pytest.mark.parametrize("checkpointing", ["reentrant", "none"])
def test_gradient_checkpointing_changes_nothing(folder, checkpointing):
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    if checkpointing == "none":
        options = {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": None}
    succeed(axolotl_train(folder, checkpointing, **options))
    expected = load_file(folder / "adapter" / ADAPTER)
    for name, weight in load_file(folder / checkpointing / ADAPTER).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_continues_from_a_checkpoint(folder):
    """With the weights that the run would have ended with."""
    shutil.copytree(folder / "adapter/checkpoint-4", folder / "resumed/checkpoint-4")
    succeed(axolotl_train(folder, "resumed", auto_resume_from_checkpoints=True))
    assert [entry["step"] for entry in log_of(folder / "resumed")] == list(range(1, 9))
    expected = load_file(folder / "adapter" / ADAPTER)
    for name, weight in load_file(folder / "resumed" / ADAPTER).items():
        assert torch.equal(weight, expected[name]), name


def test_continues_from_an_adapter(folder):
    succeed(axolotl_train(folder, "further", lora_model_dir="adapter", max_steps=2, learning_rate=1e-4))
    start, further = load_file(folder / "adapter" / ADAPTER), load_file(folder / "further" / ADAPTER)
    differences = [(further[name] - start[name]).abs().max() for name in start if not name.endswith(".scale")]
    assert all(0 < difference < 1e-3 for difference in differences)


def test_loads_back(folder, monkeypatch):
    """By PEFT, also from beside the config of the base, by the auto classes of transformers, and as a bundle."""
    monkeypatch.chdir(folder)  # where the base of the adapter is "model"
    assert not (folder / "adapter/config.json").exists()
    expected = logits(PeftModel.from_pretrained(base_of(folder), folder / "adapter"), folder)
    assert (expected - logits(base_of(folder), folder)).abs().max() > 0.1
    beside = folder / "beside"
    shutil.copytree(folder / "adapter", beside)
    shutil.copy(folder / "model/config.json", beside)
    for adapter in (beside, folder / "adapter/checkpoint-8"):
        assert torch.equal(logits(PeftModel.from_pretrained(base_of(folder), adapter), folder), expected)
    peft_m2pt.bundle(folder / "model", beside, folder / "bundle")
    for complete in (folder / "adapter", folder / "bundle"):
        assert torch.equal(logits(AutoModelForImageTextToText.from_pretrained(complete), folder), expected)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForImageTextToText.from_pretrained(beside)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"m2pt": {"num_visual_token": 4}}, "unexpected keyword argument 'num_visual_token'"),
        ({"load_in_4bit": True}, "load_in_4bit: true has no effect with adapter: m2pt"),
        ({"adapter": "lora", "lora_r": 4, "lora_alpha": 4}, "but adapter is 'lora'. Set adapter: m2pt"),
    ],
    ids=["unknown field", "quantized", "another adapter"],
)
def test_mistakes(folder, options, message):
    process = axolotl_train(folder, "mistake", **options)
    assert process.returncode != 0 and message in process.stdout + process.stderr
