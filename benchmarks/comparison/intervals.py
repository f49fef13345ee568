"""Intervals and p-values of means over seeds and pictures."""

from __future__ import annotations

import numpy as np


NUM_RESAMPLES = 10_000


def resampled_means(
    values: np.ndarray, fixed_pictures: bool, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """
    Means of resampled seeds, and of resampled pictures within them: the hierarchical bootstrap.

    One seed fewer is drawn than there are, without which the variance would be too small: with five seeds, by a fifth.

    Args:
        values (`np.ndarray` of shape `(num_seeds, num_pictures)`):
            What each picture adds, for example the difference between two methods. Questions about a picture have
            been averaged, since they are not independent. With one column, seeds alone are resampled.
        fixed_pictures (`bool`):
            Whether a column is the same picture for all seeds. Then it is drawn for all of them or for none.
        num_resamples (`int`, *optional*), seed (`int`, defaults to 0):
            How often, and from which seed.
    """
    generator = np.random.default_rng(seed)
    num_seeds, num_pictures = values.shape
    num_drawn = max(1, num_seeds - 1)
    if fixed_pictures:
        seeds = _counts(generator, num_resamples, num_drawn, num_seeds)
        pictures = _counts(generator, num_resamples, num_pictures, num_pictures)
        return np.einsum("rs,sp,rp->r", seeds, values, pictures) / (num_drawn * num_pictures)
    means = np.zeros(num_resamples)
    for _ in range(num_drawn):
        chosen = generator.integers(num_seeds, size=(num_resamples, 1))
        pictures = generator.integers(num_pictures, size=(num_resamples, num_pictures))
        means += values[chosen, pictures].mean(axis=1) / num_drawn
    return means


def _counts(generator: np.random.Generator, num_resamples: int, num_drawn: int, number: int) -> np.ndarray:
    """How often each of a number is drawn, in each resample."""
    return generator.multinomial(num_drawn, np.full(number, 1 / number), size=num_resamples)


def interval(means: np.ndarray, share: float = 0.95) -> tuple[float, float]:
    """The share in the middle."""
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def p_value(means: np.ndarray) -> float:
    """Of no difference, two-sided: how rarely resampling gives another sign. Never 0, since resamples are finite."""
    tail = min((means <= 0).sum(), (means >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(means) + 1)))


def holm(p_values: list[float]) -> list[float]:
    """p-values that may be compared with one level for all of a family, in the same order."""
    order = np.argsort(p_values)
    corrected = np.empty(len(p_values))
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected.tolist()
