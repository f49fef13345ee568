"""Mixed batches: which adapter each sample uses, given `adapter_names`."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..per_thread import PerThread


BASE = "__base__"


@dataclass(frozen=True)
class SampleAdapters:
    """
    The adapters of a batch.

    Args:
        names (`tuple[str, ...]`):
            The adapter of each sample. "__base__" stands for none.
        num_images (`int`, *optional*):
            Number of images of each sample. `None` if it is unknown or not the same for all samples.
        have_equal_images (`bool`):
            Whether all samples have the same number of images with the same number of tokens.
    """

    names: tuple[str, ...]
    num_images: int | None
    have_equal_images: bool

    def for_rows(self, num_rows: int) -> list[str]:
        """
        The adapter of each row of the language model's batch. A sample has several rows with beams or
        `num_return_sequences`.

        Raises:
            ValueError: If the number of rows is not a multiple of the number of names.
        """
        per_sample, rest = divmod(num_rows, len(self.names))
        if rest or not per_sample:
            raise ValueError(
                f"adapter_names={list(self.names)} has {len(self.names)} names, but the batch has {num_rows} samples."
            )
        return self._repeated(per_sample)

    def for_images(self, num_rows: int, path: str) -> list[str]:
        """
        The adapter of each image, or of each row of image features.

        Args:
            num_rows (`int`):
                The number of images or rows.
            path (`str`):
                Path of the module that gets them, for the error message.

        Raises:
            ValueError: If it is not known which sample they belong to.
        """
        per_sample, rest = divmod(num_rows, len(self.names))
        is_known = self.have_equal_images or self.num_images == per_sample
        if rest or not is_known:
            raise ValueError(
                f"adapter_names={list(self.names)}: '{path}' gets {num_rows} images or rows of image features, and it "
                f"is not known which of the {len(self.names)} samples they belong to. Use the same number of images, "
                f"of the same size, in each sample, or run the samples of each adapter separately."
            )
        return self._repeated(per_sample)

    def _repeated(self, times: int) -> list[str]:
        return [name for name in self.names for _ in range(times)]


_samples = PerThread()


def sample_adapters() -> SampleAdapters | None:
    """The adapters of the samples in the current call of the model. `None` if all use the active adapters."""
    return _samples.value


@contextmanager
def use_adapters(samples: SampleAdapters) -> Generator[None]:
    """Within this context, each sample uses its own adapter."""
    before, _samples.value = _samples.value, samples
    try:
        yield
    finally:
        _samples.value = before


# Arguments of models and of `generate` whose first dimension is the batch. `pixel_values` is last: LLaVA, for example,
# takes the images of all samples in one dimension.
BATCHED_INPUTS = ("input_ids", "inputs", "inputs_embeds", "input_features", "input_values", "pixel_values")


def check_adapter_names(model: nn.Module, adapter_names: Sequence[str], known: Collection[str]) -> None:
    """
    Checks that each sample of a batch can use its own adapter.

    Raises:
        TypeError: If the names are not strings.
        ValueError: If there is no such adapter, or if the model cannot use several at once.
    """
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names={adapter_names!r} is not a list of names, one for each sample.")
    unknown = sorted(set(adapter_names) - {*known, BASE})
    if unknown or not adapter_names:
        raise ValueError(
            f"adapter_names={list(adapter_names)}: {unknown or 'nothing'} is not the name of an adapter. Choose from "
            f"{sorted(known)}, or {BASE!r} for none."
        )
    if model.training:
        raise ValueError(
            "adapter_names is not supported in training mode. Call model.eval(), or train the adapters one after the "
            "other."
        )
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and any(name in module.modules_to_save for name in known):
            raise ValueError(
                f"adapter_names={list(adapter_names)}: '{path}' was trained with an adapter (modules_to_save) and "
                f"cannot differ between samples. Run the samples of each adapter separately."
            )


def check_batch_size(names: Sequence[str], arguments: dict[str, Any]) -> None:
    """
    Checks that there is one adapter for each sample, before `generate` repeats the batch for beams.

    Args:
        names (`Sequence[str]`):
            The adapter of each sample.
        arguments (`dict[str, Any]`):
            The arguments of the model or of its `generate`.

    Raises:
        ValueError: If the number of names is not the batch size.
    """
    batches = (arguments.get(name) for name in BATCHED_INPUTS)
    batch = next((batch for batch in batches if isinstance(batch, torch.Tensor)), None)
    # Qwen2-VL, for example, packs the patches of all images into one row.
    if batch is None or (batch is arguments.get("pixel_values") and batch.dim() < 4):
        return
    if len(batch) != len(names):
        count = "1 name" if len(names) == 1 else f"{len(names)} names"
        raise ValueError(
            f"adapter_names={list(names)} has {count}, but the batch has {len(batch)} samples. Length of "
            f"`adapter_names` should be the same as the number of inputs, but got {len(names)} and {len(batch)} "
            f"respectively."
        )


def make_sample_adapters(
    names: Sequence[str], input_ids: torch.Tensor | None, image_token_id: int | None
) -> SampleAdapters:
    """
    Counts the images of each sample.

    Args:
        names (`Sequence[str]`):
            The adapter of each sample.
        input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            The tokens.
        image_token_id (`int`, *optional*):
            The placeholder token of image features. A run of these counts as one image.

    Returns:
        [`SampleAdapters`]
    """
    if input_ids is None or image_token_id is None:
        # An encoder alone: one image, or audio clip, for each sample.
        return SampleAdapters(tuple(names), 1, False)
    run_lengths = [
        [len(list(run)) for is_image, run in groupby(row) if is_image]
        for row in (input_ids == image_token_id).tolist()
    ]
    counts = set(map(len, run_lengths))
    num_images = counts.pop() if len(counts) == 1 else None
    return SampleAdapters(tuple(names), num_images, all(lengths == run_lengths[0] for lengths in run_lengths))
