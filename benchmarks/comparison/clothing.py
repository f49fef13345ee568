"""Base B, the pretrained towers, on photographs of clothing (Fashion-MNIST): six instructions are tuned."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from . import alignment
from .folders import appearing
from .packages import fetch
from .tasks import Instruction, Pictures, Task
from .towers import SIZE, TEMPLATE, normalize


CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CATEGORIES = ("top", "bottoms", "top", "dress", "top", "shoe", "top", "shoe", "bag", "shoe")


def _is(*labels: int):
    return lambda label: "yes" if label in labels else "no"


FEET, UPPER_BODY, SLEEVES, FASTENERS = (5, 7, 9), (0, 2, 3, 4, 6), (2, 4, 6), (4, 6, 7, 9)
NOT_FEET = tuple(label for label in range(10) if label not in FEET)

INSTRUCTIONS = (
    Instruction("name", "tuned", "What is this?", CLASSES.__getitem__, num_pictures=500),
    Instruction("category", "tuned", "What kind of thing is it?", CATEGORIES.__getitem__),
    Instruction("feet", "tuned", "Is it worn on the feet?", _is(*FEET)),
    Instruction("upper body", "tuned", "Is it worn on the upper body?", _is(*UPPER_BODY)),
    Instruction("sleeves", "tuned", "Does it have long sleeves?", _is(*SLEEVES)),
    Instruction("fasteners", "tuned", "Does it have buttons or laces?", _is(*FASTENERS)),
    Instruction("name, again", "L1", "Name the item in the picture.", CLASSES.__getitem__),
    Instruction("category, again", "L1", "Which category does the item belong to?", CATEGORIES.__getitem__),
    Instruction("feet, again", "L1", "Is this some kind of footwear?", _is(*FEET)),
    Instruction("sleeves, again", "L1", "Are its sleeves long?", _is(*SLEEVES)),
    Instruction("legs", "L2", "Does it cover the legs?", _is(1, 3)),
    Instruction("cold", "L2", "Is it made for cold weather?", _is(2, 4, 9)),
    Instruction(
        "feet, by letter",
        "L3",
        "Answer with a letter: A if it is worn on the feet, B if it is not.",
        lambda label: "A" if label in FEET else "B",
    ),
    Instruction("feet, negated", "L3", "Is it true that it is not worn on the feet?", _is(*NOT_FEET)),
    Instruction("name of a drawing", "L4", "What is this?", CLASSES.__getitem__, "drawings"),
    Instruction("category of a drawing", "L4", "What kind of thing is it?", CATEGORIES.__getitem__, "drawings"),
    Instruction("feet in a drawing", "L4", "Is it worn on the feet?", _is(*FEET), "drawings"),
    Instruction("upper body in a drawing", "L4", "Is it worn on the upper body?", _is(*UPPER_BODY), "drawings"),
)

# English that has nothing to do with pictures, to see how much of it a model forgets.
PLAIN_TEXT = (
    "The river rises in the hills north of the town and flows past old mills before it reaches the sea. In winter "
    "the water is high and the ferry does not run, so people who live on the other side have to walk to the "
    "bridge. Many of them have asked the council for a second bridge, but there has never been enough money to "
    "build one. Last year a group of students measured how long it takes to cross the valley on foot, and they "
    "found that it is faster to wait for the boat than to walk, even when the boat is late. The council has "
    "promised to look at their results."
)


class Clothing(Task):
    """
    Args:
        cache_dir (`Path`):
            Where packages and base models are kept.
    """

    name = "b"
    instructions = INSTRUCTIONS
    template = TEMPLATE
    dtype = torch.bfloat16
    known_question = alignment.QUESTIONS[0]
    plain_text = PLAIN_TEXT
    fixed_test = True

    num_bases = 3
    num_train, num_validation, num_test, num_known = 2000, 200, 500, 200

    def __init__(self, cache_dir: Path) -> None:
        self.cache_dir = cache_dir

    @property
    def packages(self) -> Path:
        return fetch(self.cache_dir / "packages")

    def base(self, seed: int) -> Path:
        seed %= self.num_bases
        folder = self.cache_dir / f"base-b-{seed}"
        if not folder.exists():
            print(f"Base b, seed {seed}: its connector is aligned, which takes some minutes.", flush=True)
            learner = alignment.build(self.packages, seed)
            with appearing(folder) as new:
                learner.model.save_pretrained(new)
                learner.tokenizer.save_pretrained(new)
        return folder

    def split(self, seed: int) -> dict[str, Pictures]:
        train, test = self.photographs("train"), self.photographs("t10k")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        test_order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
        validation = order[self.num_train : self.num_train + self.num_validation]
        return {
            "train": _prepare(train.take(order[: self.num_train])),
            "validation": _prepare(train.take(validation)),
            "test": _prepare(test.take(test_order[: self.num_test])),
            **self.drawings(),
        }

    def drawings(self) -> dict[str, Pictures]:
        return _drawings(self.packages, self.num_known)

    def photographs(self, split: str) -> Pictures:
        """The raw pictures `(number, 28, 28)` of a split ("train" or "t10k")."""
        return _photographs(self.packages, split)


@cache
def _drawings(packages: Path, num_known: int) -> dict[str, Pictures]:
    return {"drawings": alignment.clothing(packages), "known": alignment.known(packages, num_known)}


@cache
def _photographs(packages: Path, split: str) -> Pictures:
    folder = next(packages.rglob(f"{split}-images-idx3-ubyte.gz")).parent

    def read(name: str, offset: int) -> torch.Tensor:
        return torch.from_numpy(
            np.frombuffer(gzip.open(folder / f"{split}-{name}").read(), np.uint8, offset=offset).copy()
        )

    return Pictures(read("images-idx3-ubyte.gz", 16).view(-1, 28, 28), read("labels-idx1-ubyte.gz", 8).tolist())


def _prepare(pictures: Pictures) -> Pictures:
    # On white, like the pictures that the connector was aligned on.
    images = 1 - pictures.images.float()[:, None].expand(-1, 3, -1, -1) / 255
    images = nn.functional.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=False).clamp(0, 1)
    return Pictures(normalize(images), pictures.labels)
