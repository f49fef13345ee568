"""Which adapter each sample of a batch uses, when `adapter_names` are given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from .threads import PerThread


BASE = "__base__"


@dataclass(frozen=True)
class SampleAdapters:
    """
    The adapters of a batch.

    Args:
        names (`tuple[str, ...]`):
            The adapter of each sample. "__base__" stands for none.
        num_images (`int`, *optional*):
            How many images each sample has. `None` if they have different numbers, or if that is not known.
        have_equal_images (`bool`):
            Whether all samples have equally many images with equally many tokens.
    """

    names: tuple[str, ...]
    num_images: int | None
    have_equal_images: bool

    def of_tokens(self, num_rows: int) -> list[str]:
        """
        The adapter of each row of the language model's batch, in which every sample can have several rows: beams, or
        sequences to return.

        Raises:
            ValueError: If there are not as many names as samples.
        """
        of_one_sample, rest = divmod(num_rows, len(self.names))
        if rest or not of_one_sample:
            raise ValueError(
                f"adapter_names={list(self.names)} has {len(self.names)} names, but the batch has {num_rows} samples."
            )
        return self._repeated(of_one_sample)

    def of_images(self, num_rows: int, path: str) -> list[str]:
        """
        The adapter of each image, or of each row of image features.

        Args:
            num_rows (`int`):
                How many there are.
            path (`str`):
                Module path of who asks, for the error message.

        Raises:
            ValueError: If it is not known which sample they belong to.
        """
        of_one_sample, rest = divmod(num_rows, len(self.names))
        is_known = self.have_equal_images or self.num_images == of_one_sample
        if rest or not is_known:
            raise ValueError(
                f"adapter_names={list(self.names)}: '{path}' gets {num_rows} images or rows of image features, and it "
                f"is not known which of the {len(self.names)} samples they belong to. Give samples with equally many "
                f"images of the same size, or run the samples of each adapter apart."
            )
        return self._repeated(of_one_sample)

    def _repeated(self, times: int) -> list[str]:
        return [name for name in self.names for _ in range(times)]


# The adapters of the samples that the model is being called with.
_samples = PerThread()


def sample_adapters() -> SampleAdapters | None:
    """The adapters of the samples that the model is being called with. `None` if all use the active ones."""
    return _samples.value


@contextmanager
def using(samples: SampleAdapters) -> Iterator[None]:
    """While this context is open, each sample uses its own adapter."""
    before, _samples.value = _samples.value, samples
    try:
        yield
    finally:
        _samples.value = before


# What has one entry for each sample, in what models and their `generate` are given. Images come last, since some
# models take those of all samples one after the other, beside the text.
OF_SAMPLES = ("input_ids", "inputs", "inputs_embeds", "input_features", "input_values", "pixel_values")


def check_number(names: Sequence[str], arguments: dict[str, Any]) -> None:
    """
    Checks that there is an adapter for each sample, before a batch is repeated for beams or for several sequences.

    Args:
        names (`Sequence[str]`):
            The adapter of each sample.
        arguments (`dict[str, Any]`):
            What the model, or its `generate`, is called with.

    Raises:
        ValueError: If there are fewer names than samples, or more.
    """
    batches = (arguments.get(name) for name in OF_SAMPLES)
    batch = next((batch for batch in batches if isinstance(batch, torch.Tensor)), None)
    # Patches of all images may be packed into one row.
    if batch is None or (batch is arguments.get("pixel_values") and batch.dim() < 4):
        return
    if len(batch) != len(names):
        count = "1 name" if len(names) == 1 else f"{len(names)} names"
        raise ValueError(
            f"adapter_names={list(names)} has {count}, but the batch has {len(batch)} samples. Length of "
            f"`adapter_names` should be the same as the number of inputs, but got {len(names)} and {len(batch)} "
            f"respectively."
        )


def describe_samples(
    names: Sequence[str], input_ids: torch.Tensor | None, image_token_id: int | None
) -> SampleAdapters:
    """
    Finds out how many images each sample has.

    Args:
        names (`Sequence[str]`):
            The adapter of each sample.
        input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            The tokens.
        image_token_id (`int`, *optional*):
            The placeholder of image features among them. Neighbouring ones are taken for one image.

    Returns:
        [`SampleAdapters`]
    """
    if input_ids is None or image_token_id is None:
        # Nothing but one image, or sound, for each sample.
        return SampleAdapters(tuple(names), 1, False)
    runs = [
        [len(list(run)) for is_image, run in groupby(row) if is_image]
        for row in (input_ids == image_token_id).tolist()
    ]
    counts = {len(of_sample) for of_sample in runs}
    num_images = counts.pop() if len(counts) == 1 else None
    return SampleAdapters(tuple(names), num_images, all(of_sample == runs[0] for of_sample in runs))
