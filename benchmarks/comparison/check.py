"""
All of a study in a minute: toys in the place of the base models, a few methods, a few steps, generated pictures and
those of scikit-learn. Nothing is downloaded, and the results say nothing.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from . import costs, report
from .clothing import INSTRUCTIONS, PLAIN_TEXT, Clothing
from .contrasts import DEFAULT
from .experiments import FOLDER
from .folders import appearing
from .handwriting import Handwriting, tiny_llava
from .study import Study
from .tasks import Pictures
from .towers import PATCH, SIZE, TEMPLATE


METHODS = {
    "a": ("base/untuned", "m2pt/prompts-connector", "m2pt/image", "prefix_tuning/ten", "prompt_tuning/ten"),
    "b": ("base/untuned", "m2pt/prompts-connector", "m2pt/textual-connector", "full/connector", "lora/equal-size"),
}
TRAINING = {"num_steps": 2, "batch_size": 4, "rates": [1e-3], "search_seeds": [0], "seeds": [1, 2]}


class ToyHandwriting(Handwriting):
    """Base A without any training, and with fewer pictures."""

    recipe = tiny_llava.Recipe(num_images=100, vision_steps=1, steps=1, width=32)
    num_validation, num_test, num_known = 20, 30, 10


class ToyClothing(Clothing):
    """Base B with random towers, on digits, which are as many classes as there are of clothing."""

    num_bases = 2
    num_train, num_validation, num_test = 40, 20, 30

    def base(self, seed: int) -> Path:
        seed %= self.num_bases
        folder = self.cache_dir / f"toy-b-{seed}"
        if not folder.exists():
            texts = [f"{one.question} {one.answer(label)}" for one in INSTRUCTIONS for label in range(10)]
            tokenizer = tiny_llava.build_tokenizer([*texts, *TEMPLATE.__dict__.values(), PLAIN_TEXT])
            torch.manual_seed(seed)
            with appearing(folder) as new:
                _toy_llava(len(tokenizer)).save_pretrained(new)
                tokenizer.save_pretrained(new)
        return folder

    def photographs(self, split: str) -> Pictures:
        scans = load_digits()
        images = torch.from_numpy(scans.images)[:, None] * 255 / 16
        images = nn.functional.interpolate(images, (28, 28)).squeeze(1).to(torch.uint8)
        half = slice(None, 800) if split == "train" else slice(800, None)
        return Pictures(images[half], scans.target[half].tolist())

    def drawings(self) -> dict[str, Pictures]:
        images = torch.rand(12, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        labels = [label for label in (0, 1, 5, 8) for _ in range(3)]
        return {
            "drawings": Pictures(images, labels, num_views=3),
            "known": Pictures(images[:4], ["a", "b", "cd", "e"]),
        }


def _toy_llava(vocab_size: int) -> LlavaForConditionalGeneration:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text_config = LlamaConfig(**sizes, vocab_size=vocab_size, intermediate_size=64, num_key_value_heads=2)
    vision_config = Dinov2Config(**sizes, image_size=SIZE, patch_size=PATCH, mlp_ratio=2)
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=2,
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=-2,
    )
    return LlavaForConditionalGeneration(config)


def toy_study(folder: Path, base: str, device: str = "cpu") -> Study:
    """A study of one toy, with experiments of its own."""
    experiments = folder / "experiments"
    for method in METHODS[base]:
        own = experiments / base / method
        shutil.copytree(FOLDER / base / method, own)
        params = json.loads((own / "training_params.json").read_text())
        (own / "training_params.json").write_text(
            json.dumps({**params, "lr": None, "chosen": None, "search_seeds": TRAINING["search_seeds"]})
        )
    default = json.loads((FOLDER / base / "default_training_params.json").read_text())
    (experiments / base / "default_training_params.json").write_text(json.dumps({**default, **TRAINING}))
    task = {"a": ToyHandwriting, "b": ToyClothing}[base](folder / "cache")
    return Study({base: task}, folder / "results", experiments=experiments, device=device)


def run(folder: Path, device: str) -> None:
    """Every stage, with each toy."""
    for base in METHODS:
        study = toy_study(folder, base, device)
        study.search()
        study.choose()
        study.final()
        costs.measure(replace(study, methods=(DEFAULT,)), num_steps=2)
        print(report.write(study).read_text())
