"""Bundles on disk, and what they are made of."""

import json

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from helpers.models import NUM_PATCHES, adapt, make_inputs, make_llava
from helpers.processors import make_processor
from peft_m2pt.layers.attention import M2PTAttention


ROWS = "m2pt_textual_rows.safetensors"
PREFIX = "peft_m2pt.textual_rows."
WEIGHTS = "adapter_model.safetensors"
IN_IMAGE = {"interaction_placement": "image"}
NUM_INTERACTION = 2
SHARDED = {"max_shard_size": "50KB"}


def save_base(folder, processor=False, dtype=torch.float32, **kwargs):
    make_llava().to(dtype).save_pretrained(folder, **kwargs)
    if processor:
        make_processor().save_pretrained(folder)
    return folder


def load_base(folder):
    return LlavaForConditionalGeneration.from_pretrained(folder)


def save_adapter(base, folder, **kwargs):
    model = adapt(load_base(base), **kwargs)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1
    model.save_pretrained(folder)
    return folder


def logits(model, num_image_tokens=NUM_PATCHES):
    inputs = make_inputs("left", num_image_tokens=num_image_tokens)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        return model.eval()(**inputs).logits


def expected(base, adapter, **kwargs):
    return logits(PeftModel.from_pretrained(load_base(base), adapter), **kwargs)


def load(folder, **kwargs):
    return AutoModelForImageTextToText.from_pretrained(folder, **kwargs)


def edit(file, **values):
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def check_rows(folder, model):
    rows = load_file(folder / ROWS)
    layers = [
        module for module in model.modules() if isinstance(module, M2PTAttention) and module.site.kind == "textual"
    ]
    assert rows.keys() == {f"{PREFIX}{layer.site.path}" for layer in layers}
    for layer in layers:
        row = rows[f"{PREFIX}{layer.site.path}"]
        assert row.dtype == torch.float32
        # A product with a thin matrix depends on where in memory that lies.
        torch.testing.assert_close(row, layer._prompt("default", torch.empty(0)), rtol=1e-6, atol=1e-6)
    return rows
