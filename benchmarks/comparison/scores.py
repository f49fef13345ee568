"""Scores of what a model has answered."""

from __future__ import annotations

import random
from typing import Any

import numpy as np


def weighted_hits(answers: dict[str, Any], by: str = "said") -> np.ndarray:
    """
    For each picture what it adds to the balanced accuracy, which is the mean: every right answer counts the same,
    however often it is asked for, so that who does not look at pictures has no more than chance. Views of a picture
    are one picture.

    Args:
        answers (`dict`):
            Those to an instruction, as [`~evaluation.examine`] returns them.
        by (`str`, defaults to `"said"`):
            "said", what the model says word for word, or "likeliest", the likeliest of the candidates.
    """
    return _weigh(answers, np.array(list(answers["right"])), np.array(list(answers[by])))


def _weigh(answers: dict[str, Any], right: np.ndarray, given: np.ndarray) -> np.ndarray:
    kinds, inverse, counts = np.unique(right, return_inverse=True, return_counts=True)
    weights = len(right) / (len(kinds) * counts[inverse])
    return (weights * (right == given)).reshape(-1, answers["num_views"]).mean(axis=1)


def balanced_accuracy(answers: dict[str, Any], by: str = "said") -> float:
    """The mean, over right answers, of the share that is got."""
    return float(weighted_hits(answers, by).mean())


def shuffled_accuracy(answers: dict[str, Any]) -> float:
    """The same with answers to other pictures in the place of those to the right ones: a control."""
    order = random.Random(0).sample(range(len(answers["right"])), len(answers["right"]))
    right, said = np.array(list(answers["right"])), np.array(list(answers["said"]))
    return float(_weigh(answers, right, said[order]).mean())


def blind_accuracy(answers: dict[str, Any]) -> float:
    """The same with what the model says without a picture: a control."""
    right = np.array(list(answers["right"]))
    return float(_weigh(answers, right, np.array([answers["blind"]] * len(right))).mean())


def chance(answers: dict[str, Any]) -> float:
    """What an answer has that is always the same."""
    return 1 / len(set(answers["right"]))
