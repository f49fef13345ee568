"""What an official checkpoint must hold to be converted."""

import pytest
import torch
from helpers.official_checkpoints import VISION, Folders, write_weights
from helpers.reference import load_case


@pytest.mark.parametrize(
    ("name", "prompts"),
    [("model.prompts.2", "textual"), (VISION + "encoder.prompts.3", "visual"), ("model.prompts.0", "textual")],
)
def test_missing_prompts_are_refused(folders, name, prompts):
    shape = list(folders.weights[name].shape)
    folders.write({n: weight for n, weight in folders.weights.items() if n != name})
    folders.refuse(f"'{name}' in {folders.original}: expected shape {shape}, found nothing")


def test_a_checkpoint_without_prompts_is_refused(folders):
    folders.write({name: weight for name, weight in folders.weights.items() if "prompts" not in name})
    folders.refuse(f"{folders.original} has no prompts", "'model.prompts.0'", f"'{VISION}encoder.prompts.0'")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.prompts.1", [1, 4, 64]),
        ("model.prompts.0", [3, 64]),
        (VISION + "encoder.prompts.3", [1, 4, 64]),
        ("model.mm_projector.weight", [64, 47]),
        ("model.embed_tokens.weight", [161, 64]),
        ("lm_head.weight", [159, 64]),
    ],
)
def test_other_shapes_are_refused(folders, name, shape):
    folders.write({**folders.weights, name: torch.ones(shape)})
    folders.refuse(f"'{name}' in {folders.original}: expected shape ", "found shape ", str(shape))


def test_missing_weights_are_refused(tmp_path):
    folders = Folders(tmp_path, load_case("v4_t3"), complete=False)
    text = torch.load(folders.language_model / "pytorch_model.bin")
    del text["model.norm.weight"]
    write_weights(folders.language_model, text, "bin")
    name = "'model.norm.weight'"
    folders.refuse(
        f"{name} in {folders.original} or {name} in {folders.language_model}: expected shape [64], found nothing"
    )
    write_weights(folders.vision_tower, {}, "bin")
    folders.refuse("'vision_model.embeddings.class_embedding' in ", "expected shape [48], found nothing", "\n- and ")


@pytest.mark.parametrize(
    "name", ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "model.prompts.4", "lm_head.bias"]
)
def test_unknown_tensors_are_refused(folders, name):
    folders.write({**folders.weights, name: torch.ones(1, 3, 64)})
    folders.refuse(f"'{name}' in {folders.original}: expected nothing")


def test_quantized_weights_are_refused(folders):
    name = "model.layers.0.mlp.up_proj.weight"
    folders.write({**folders.weights, name: folders.weights[name].to(torch.int8)})
    folders.refuse(f"'{name}' in {folders.original}: expected floating-point numbers, found torch.int8")


def test_deeper_projectors_are_refused(folders):
    weights = {name.replace("mm_projector.", "mm_projector.0."): weight for name, weight in folders.weights.items()}
    folders.write(weights)
    folders.refuse("'model.mm_projector.weight' in ", "found nothing", "'model.mm_projector.0.weight' in ")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_use_im_start_end", True),
        ("mm_use_im_patch_token", True),
        ("image_aspect_ratio", "pad"),
    ],
)
def test_settings_without_reference_are_refused(folders, setting, value):
    folders.set(folders.original, **{setting: value})
    folders.refuse(f"{folders.original / 'config.json'} has {setting}={value!r}")


@pytest.mark.parametrize("layer", [-1, 0, 4, -5])
def test_feature_layers_without_raw_prompts_are_refused(folders, layer):
    folders.set(folders.original, mm_vision_select_layer=layer)
    folders.refuse(f"mm_vision_select_layer={layer} cannot be converted together with visual prompts")


def test_configs_of_something_else_are_refused(folders):
    folders.set(folders.original, mm_vision_select_layer=7)
    folders.refuse("mm_vision_select_layer=7", "has 4 layers")
    folders.set(folders.original, mm_vision_select_layer=None)
    folders.refuse(f"{folders.original / 'config.json'} has no mm_vision_select_layer")
    folders.set(folders.original, mm_vision_select_layer=-2)
    folders.set(folders.vision_tower, model_type="siglip")
    folders.refuse(f"{folders.vision_tower / 'config.json'} has model_type='siglip', expected 'clip'")
    folders.set(folders.language_model, model_type="qwen2")
    folders.refuse(f"{folders.language_model / 'config.json'} has model_type='qwen2', expected 'llama'")
    folders.set(folders.language_model, model_type="llama", hidden_size="wide")
    folders.refuse(f"{folders.language_model / 'config.json'} is not a valid LlamaConfig")
    (folders.language_model / "config.json").write_text("{")
    folders.refuse(f"{folders.language_model / 'config.json'} cannot be read")
    (folders.original / "config.json").unlink()
    folders.refuse(f"{folders.original / 'config.json'} cannot be read")


def test_configs_that_do_not_make_a_model_are_refused(folders):
    folders.set(folders.language_model, hidden_act="none")
    folders.refuse("The configs do not make a LLaVA")


def test_a_missing_tokenizer_is_refused(folders):
    for file in folders.language_model.glob("tokenizer*"):
        file.unlink()
    folders.refuse(f"No tokenizer could be loaded from {folders.language_model}")


def test_a_broken_image_processor_is_refused(folders):
    (folders.vision_tower / "preprocessor_config.json").write_text("{")
    folders.refuse(f"No image processor could be loaded from {folders.vision_tower}")


@pytest.mark.parametrize("size", ["large", "5 apples", ""])
def test_nonsense_sizes_are_refused(folders, size):
    folders.refuse(f"max_shard_size={size!r} is not a size", max_shard_size=size)
