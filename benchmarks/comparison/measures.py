"""What is said of a method: measures of its results, as one value for each seed and picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .run import FINAL
from .scores import weighted_hits


Result = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """
    A measure.

    Args:
        name (`str`):
            What it is called.
        of (`Callable`):
            The values of a result, one for each picture.
        is_share (`bool`, defaults to `True`):
            Whether it is a share, which is better if it is higher. Otherwise it is an entropy.
    """

    name: str
    of: Callable[[Result], np.ndarray]
    is_share: bool = True

    def values(self, results: list[Result]) -> np.ndarray:
        """One row for each result."""
        return np.stack([self.of(result) for result in results])


def instructions_of(result: Result, levels: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    every = result["train_info"]["metrics"]["instructions"]
    return {name: answers for name, answers in every.items() if answers["level"] in levels}


def accuracy(name: str, *levels: str, leave_out: frozenset[str] = frozenset()) -> Measure:
    """The mean over instructions of some levels, for the pictures that all of them were asked about."""

    def of(result: Result) -> np.ndarray:
        asked = [one for title, one in instructions_of(result, levels).items() if title not in leave_out]
        number = min(len(one["right"]) for one in asked)
        return np.mean([weighted_hits(_first(one, number)) for one in asked], axis=0)

    return Measure(name, of)


def one_instruction(title: str, by: str) -> Measure:
    """A single instruction, for all pictures that it was asked about."""
    name = title if by == "said" else f"{title} (likeliest)"
    return Measure(name, lambda result: weighted_hits(result["train_info"]["metrics"]["instructions"][title], by))


def _first(answers: dict[str, Any], number: int) -> dict[str, Any]:
    return {**answers, **{key: answers[key][:number] for key in ("right", "said", "likeliest")}}


KNOWN = Measure(
    "known", lambda result: np.array([int(hit) for hit in result["train_info"]["metrics"]["known"]["right"]])
)
KNOWN_ENTROPY = Measure(
    "known (entropy)", lambda result: np.array([_number(result["train_info"]["metrics"]["known"]["entropy"])]), False
)
PLAIN_TEXT = Measure(
    "plain text (entropy)", lambda result: np.array([_number(result["train_info"]["metrics"]["plain_text"])]), False
)


def _number(value: float | None) -> float:
    return np.inf if value is None else value


def read(results: Path, base: str) -> dict[str, list[Result]]:
    """The results of final runs, by method, in the order of seeds."""
    found: dict[str, list[Result]] = {}
    for file in sorted((results / base / FINAL).glob("*.json")):
        result = json.loads(file.read_text())
        found.setdefault(result["run_info"]["method"], []).append(result)
    return {method: sorted(runs, key=seed_of) for method, runs in found.items()}


def seed_of(result: Result) -> int:
    return result["run_info"]["seed"]


def paired(one: list[Result], other: list[Result]) -> tuple[list[Result], list[Result]]:
    """Those of the seeds that both have."""
    seeds = {seed_of(result) for result in one} & {seed_of(result) for result in other}
    return tuple([result for result in results if seed_of(result) in seeds] for results in (one, other))
