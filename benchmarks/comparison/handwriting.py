"""Base A, the quickstart's small LLaVA, which knows digits in print, on handwriting."""

from __future__ import annotations

import random
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from .tasks import Instruction, Pictures, Task, Template


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import digits  # noqa: E402
import quickstart  # noqa: E402
import tiny_llava  # noqa: E402
import vqa  # noqa: E402, F401


NAMES = {
    "Which digit is this?": "digit",
    "Which digit comes next?": "next",
    "Is the digit even?": "even",
    "Is it larger than four?": "large",
    "Is it a multiple of three?": "three",
    "Write it as a word.": "word",
}


class Handwriting(Task):
    """
    Args:
        cache_dir (`Path`):
            Where the base model is kept.
    """

    name = "a"
    # The one that is held out was learned in print, so that it shows what becomes of it, not what is new.
    instructions = tuple(
        Instruction(
            NAMES[question],
            "other" if question == quickstart.HELD_OUT else "tuned",
            question,
            answer,
            num_pictures=360,
        )
        for question, answer in digits.INSTRUCTIONS.items()
    )
    template = Template("USER: ", "\n{} ASSISTANT:", " {}</s>")
    dtype = torch.float32
    known_question = next(iter(digits.INSTRUCTIONS))
    plain_text = None
    fixed_test = False

    recipe = tiny_llava.Recipe()
    num_validation, num_test, num_known = 297, 360, 200

    def __init__(self, cache_dir: Path) -> None:
        self.cache_dir = cache_dir

    def base(self, seed: int) -> Path:
        return tiny_llava.pretrained(self.cache_dir, self.recipe, quickstart.SEED)

    def split(self, seed: int) -> dict[str, Pictures]:
        # Rates are not to be chosen by pictures that another seed is tested with.
        rest, validation = _handwriting(self.num_validation)
        order = random.Random(seed).sample(range(len(rest)), len(rest))
        known = _print(self.num_known)
        return {
            "train": rest.take(order[self.num_test :]),
            "validation": validation,
            "test": rest.take(order[: self.num_test]),
            "known": Pictures(known.images, [str(label) for label in known.labels]),
        }


@cache
def _handwriting(num_validation: int) -> list[Pictures]:
    return [_pictures(part) for part in digits.handwritten_digits(num_validation, quickstart.SEED)]


@cache
def _print(number: int) -> Pictures:
    return _pictures(digits.font_digits(number, seed=1))


def _pictures(dataset: Dataset) -> Pictures:
    # As the image processor of the base model makes them.
    images = np.stack([np.asarray(image.convert("RGB")) for image in dataset["image"]])
    return Pictures(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, list(dataset["digit"]))
