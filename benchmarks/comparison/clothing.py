"""Fashion-MNIST as questions about pictures: three instructions are tuned, two are held out."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .base import SIZE, normalize


CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
TUNED: dict[str, Callable[[int], str]] = {
    "What is this?": lambda label: CLASSES[label],
    "Is it worn on the feet?": lambda label: "yes" if label in (5, 7, 9) else "no",
    "Does it cover the arms?": lambda label: "yes" if label in (2, 4, 6) else "no",
}
HELD_OUT: dict[str, Callable[[int], str]] = {
    "Name the item in the picture.": lambda label: CLASSES[label],
    "Is it a bag?": lambda label: "yes" if label == 8 else "no",
}
INSTRUCTIONS = {**TUNED, **HELD_OUT}

# English that has nothing to do with pictures, to see how much of it a model forgets.
PLAIN_TEXT = (
    "The river rises in the hills north of the town and flows past old mills before it reaches the sea. In winter "
    "the water is high and the ferry does not run, so people who live on the other side have to walk to the "
    "bridge. Many of them have asked the council for a second bridge, but there has never been enough money to "
    "build one. Last year a group of students measured how long it takes to cross the valley on foot, and they "
    "found that it is faster to wait for the boat than to walk, even when the boat is late. The council has "
    "promised to look at their results."
)


@dataclass
class Pictures:
    """
    Pictures and what they show.

    Args:
        images (`torch.Tensor`):
            What the model reads of each.
        labels (`list[int]`):
            Their classes.
    """

    images: torch.Tensor
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, order: list[int] | range | torch.Tensor) -> Pictures:
        """Some of them, in the order of their indices."""
        order = torch.as_tensor(order)
        return Pictures(self.images[order], [self.labels[index] for index in order])


def load(packages: Path, split: str) -> Pictures:
    """The raw pictures `(number, 28, 28)` of a split ("train" or "t10k")."""
    folder = next(packages.rglob(f"{split}-images-idx3-ubyte.gz")).parent

    def read(name: str, offset: int) -> torch.Tensor:
        return torch.from_numpy(
            np.frombuffer(gzip.open(folder / f"{split}-{name}").read(), np.uint8, offset=offset).copy()
        )

    return Pictures(read("images-idx3-ubyte.gz", 16).view(-1, 28, 28), read("labels-idx1-ubyte.gz", 8).tolist())


def split(packages: Path, seed: int, num_train: int, num_validation: int, num_test: int) -> dict[str, Pictures]:
    """Pictures to train on and to validate with, which the seed chooses, and the same test pictures for all seeds."""
    train, test = load(packages, "train"), load(packages, "t10k")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    test_order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    parts = {
        "train": train.take(order[:num_train]),
        "validation": train.take(order[num_train : num_train + num_validation]),
        "test": test.take(test_order[:num_test]),
    }
    return {name: Pictures(_prepare(part.images), part.labels) for name, part in parts.items()}


def _prepare(images: torch.Tensor) -> torch.Tensor:
    # On white, like the pictures that the connector was aligned on.
    images = 1 - images.float()[:, None].expand(-1, 3, -1, -1) / 255
    return normalize(nn.functional.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=False).clamp(0, 1))
