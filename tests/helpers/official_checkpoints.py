"""Checkpoints as the official code saves them, made of the reference weights."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_m2pt.convert import convert_checkpoint
from peft_m2pt.errors import ConversionError


VISION = "model.vision_tower.vision_tower.vision_model."
INDEX = "pytorch_model.bin.index.json"
NUM_TOKENS = 160


def official_weights(case):
    return {name.removeprefix("weights."): case[name] for name in case.tensors if name.startswith("weights.")}


def is_trained(name):
    return "prompts" in name or "mm_projector" in name or name == "lm_head.weight"


def is_vision(name):
    return name.startswith(VISION) and not is_trained(name)


def is_text(name):
    return not is_vision(name) and "prompts" not in name and "mm_projector" not in name


def write_json(path, content):
    path.write_text(json.dumps(content))


def write_weights(folder, weights, layout, num_shards=3):
    """Layouts: "bin", "sharded bin", "safetensors", "sharded safetensors"."""
    suffix = layout.split()[-1]
    name, write = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    if not layout.startswith("sharded"):
        write(weights, folder / f"{name}.{suffix}")
        return
    weight_map = {}
    for i in range(num_shards):
        shard = dict(list(weights.items())[i::num_shards])
        file = f"{name}-{i + 1:05d}-of-{num_shards:05d}.{suffix}"
        write(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    write_json(folder / f"{name}.{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})


def write_tokenizer(folder, num_tokens=NUM_TOKENS, **ids):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, num_tokens)}
    words = {token_id: token for token, token_id in (vocabulary | ids).items()}
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in words.items()}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


class Folders:
    """An official checkpoint of a reference case, the two models that it was trained on, and where the output goes."""

    def __init__(self, root, case, layout="bin", complete=True):
        self.root = root
        self.original, self.language_model, self.vision_tower = root / "original", root / "llama", root / "clip"
        self.output = root / "output"
        for folder in (self.original, self.language_model, self.vision_tower):
            folder.mkdir()
        self.weights = official_weights(case)
        llama = case.facts["llama"]
        write_json(
            self.original / "config.json",
            {**llama, "model_type": "llava_finetune", "mm_vision_select_layer": case.facts["mm_vision_select_layer"]},
        )
        write_json(self.language_model / "config.json", {**llama, "model_type": "llama"})
        vision = {**case.facts["clip_vision"], "model_type": "clip_vision_model"}
        write_json(self.vision_tower / "config.json", {"model_type": "clip", "vision_config": vision})
        write_tokenizer(self.language_model)

        text = {name: weight for name, weight in self.weights.items() if is_text(name)}
        # CLIP models have a text encoder too.
        clip = {name.removeprefix(VISION): weight for name, weight in self.weights.items() if is_vision(name)}
        clip = {f"vision_model.{name}": weight for name, weight in clip.items()}
        clip |= {"text_model.embeddings.token_embedding.weight": torch.ones(2, 2), "logit_scale": torch.ones(())}
        if complete:
            # What the official checkpoint holds must win over these.
            text, clip = ({name: torch.ones_like(weight) for name, weight in part.items()} for part in (text, clip))
        else:
            self.weights = {name: weight for name, weight in self.weights.items() if is_trained(name)}
            text["lm_head.weight"] = torch.ones_like(text["lm_head.weight"])
        write_weights(self.original, self.weights, layout)
        write_weights(self.language_model, text, layout)
        write_weights(self.vision_tower, clip, layout)

    def convert(self, **kwargs):
        folders = (self.original, self.language_model, self.vision_tower, self.output)
        return convert_checkpoint(*folders, progressbar=False, **kwargs)

    def write(self, weights):
        write_weights(self.original, weights, "bin")

    def set(self, folder, **changes):
        path = folder / "config.json"
        write_json(path, {**json.loads(path.read_text()), **changes})

    def refuse(self, *parts, **kwargs):
        before = set(self.root.rglob("*"))
        with pytest.raises(ConversionError) as error:
            self.convert(**kwargs)
        for part in parts:
            assert part in str(error.value)
        assert set(self.root.rglob("*")) == before
