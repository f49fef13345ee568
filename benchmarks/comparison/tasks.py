"""What a base model is tuned on and asked: a task, its pictures and its instructions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Pictures:
    """
    Pictures and what they show.

    Args:
        images (`torch.Tensor`):
            What the model reads of each.
        labels (`list`):
            What each shows.
        num_views (`int`, defaults to 1):
            How many neighbours are one picture, seen in other ways. They are no independent evidence.
    """

    images: torch.Tensor
    labels: list
    num_views: int = 1

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, order: list[int] | range | torch.Tensor) -> Pictures:
        """Some of them, in the order of their indices."""
        order = torch.as_tensor(order, dtype=torch.long)
        return Pictures(self.images[order], [self.labels[index] for index in order], self.num_views)


@dataclass(frozen=True)
class Instruction:
    """
    A question about a picture, and the answers that it asks for.

    Args:
        name (`str`):
            Its name in results.
        level (`str`):
            "tuned", or how it differs from those: "L1" (a paraphrase), "L2" (something that was never asked), "L3"
            (another form of answer), "L4" (other pictures), "other" (as a task says).
        question (`str`):
            What the model is asked.
        answer (`Callable`):
            The answer, by the label of a picture.
        part (`str`, defaults to `"test"`):
            The pictures that it is asked about.
        num_pictures (`int`, defaults to 200):
            How many of them, at most.
    """

    name: str
    level: str
    question: str
    answer: Callable[[int], str]
    part: str = "test"
    num_pictures: int = 200


@dataclass(frozen=True)
class Template:
    """
    How a conversation is written.

    Args:
        opening (`str`):
            What stands before an image.
        question (`str`):
            What stands between an image and an answer, with the place of the question.
        answer (`str`):
            What comes then, with the place of the answer.
    """

    opening: str
    question: str
    answer: str


class Task(ABC):
    """
    A base model and what it is tuned on.

    Attributes:
        name (`str`):
            Its name among arguments, and the folder of its experiments and results.
        instructions (`tuple[Instruction, ...]`):
            All that is asked. Those of level "tuned" are learned.
        template (`Template`):
            How the base model writes conversations.
        dtype (`torch.dtype`):
            In which frozen towers compute.
        known_question (`str`):
            What was asked about the pictures that the base model learned from.
        plain_text (`str`, *optional*):
            English that has nothing to do with pictures, if the language model knows any.
        fixed_test (`bool`):
            Whether all seeds have the same test pictures.
    """

    name: str
    instructions: tuple[Instruction, ...]
    template: Template
    dtype: torch.dtype
    known_question: str
    plain_text: str | None
    fixed_test: bool

    @abstractmethod
    def base(self, seed: int) -> Path:
        """The folder of the base model for a seed, which is made if it is not there."""

    @abstractmethod
    def split(self, seed: int) -> dict[str, Pictures]:
        """
        Pictures to train on, to choose rates by ("validation"), and to test with ("test" and those that other
        instructions name). Those of "known" are of what the base model learned, and labelled with the answer itself.
        """

    @property
    def tuned(self) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.level == "tuned"]
