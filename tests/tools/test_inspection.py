"""The command `peft-m2pt inspect`."""

import json

import pytest
import torch
from families import FAMILIES
from helpers.models import make_llava
from transformers import AutoConfig

from peft_m2pt.tested import newer_than_tested
from peft_m2pt.tools.cli import main
from peft_m2pt.tools.inspection import inspect_model


def find(name):
    return next(family for family in FAMILIES if family.name == name)


def save_config(name, folder):
    family = find(name)
    config = family.config()
    config.architectures = [family.model_class]
    config.save_pretrained(folder)
    return folder


def test_a_folder_with_a_config(tmp_path, capsys):
    make_llava().config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "LlavaForConditionalGeneration (llava)"
    assert lines[2:15] == [
        "vision encoder  model.vision_tower (CLIPVisionModel)",
        "  layers        0-2 with self-attention; 3 do not affect the output",
        "  attention     CLIPAttention",
        "  norm          layer_norm1 (LayerNorm)",
        "  positions     none: prompts are not rotated",
        "  width         32",
        "language model  model.language_model (LlamaModel)",
        "  layers        0-2 with self-attention",
        "  attention     LlamaAttention",
        "  norm          input_layernorm (LlamaRMSNorm)",
        "  positions     -n ... -1, by LlamaRotaryEmbedding",
        "  width         48",
        "connector       model.multi_modal_projector (LlavaMultiModalProjector): maps each feature row to one token",
    ]
    assert "M2PTConfig() would train:" in lines
    visual = next(line for line in lines if line.startswith("visual  "))
    assert f"{3 * 20 * 32:,}" in visual


def test_a_config_file_alone(tmp_path, capsys):
    save_config("qwen2_vl", tmp_path)
    assert main(["inspect", str(tmp_path / "config.json")]) == 0
    out = capsys.readouterr().out
    assert "Qwen2VLForConditionalGeneration (qwen2_vl)" in out
    assert "maps 4 feature rows to one token" in out


def test_layers_that_differ(tmp_path):
    text = inspect_model(str(save_config("gemma3", tmp_path)))
    assert "by Gemma3RotaryEmbedding for 'sliding_attention' (layers 0" in text
    assert "by Gemma3RotaryEmbedding for 'full_attention' (layers 1" in text
    assert "no interaction prompts" in text


def test_a_part_that_is_refused(tmp_path):
    text = inspect_model(str(save_config("vit", tmp_path)))
    assert "language model  no textual prompts: No language model was found in ViTForImageClassification." in text
    assert "M2PTConfig(num_textual_tokens=0) would train:" in text


def test_a_model_that_is_refused(tmp_path):
    text = inspect_model(str(save_config("blip", tmp_path)))
    assert "bypasses the attention interface" in text
    assert text.endswith("M2PT cannot adapt this model.")


@pytest.mark.parametrize("name, is_refused", [("blip", True), ("vit", True), ("qwen2_vl", False)])
def test_newer_versions_than_the_tested_ones(tmp_path, monkeypatch, name, is_refused):
    """They are said once, and only if something is refused."""
    monkeypatch.setattr("peft_m2pt.tested.version", lambda package: "99.0.0")
    lines = inspect_model(str(save_config(name, tmp_path))).splitlines()
    assert sum("99.0.0" in line for line in lines) == is_refused
    assert (newer_than_tested() in lines) == is_refused


def test_no_weights_are_made(tmp_path, monkeypatch):
    devices = set()
    normal = torch.Tensor.normal_

    def noting(tensor, *args, **kwargs):
        devices.add(tensor.device.type)
        return normal(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "normal_", noting)
    AutoConfig.for_model("llava").save_pretrained(tmp_path)
    # LLaVA-1.5-7B: 23 live layers of width 1024.
    assert f"{23 * 20 * 1024:,}" in inspect_model(str(tmp_path))
    assert devices <= {"meta"}


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "config.json"),
        ("{", "is not a valid JSON file"),
        (json.dumps({"model_type": "nothing-like-it"}), "nothing-like-it"),
    ],
)
def test_no_config(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["inspect", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
