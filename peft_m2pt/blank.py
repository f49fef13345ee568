"""How an encoder of images (or sounds) is called for a blank one, by the names of its arguments."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


Arguments = dict[str, torch.Tensor]


def blank_arguments(tower: nn.Module, num_tokens: int, num_images: int) -> Iterator[Arguments]:
    """
    Guesses the arguments of an encoder for images of zeros, which are the mean of all images.

    Args:
        tower (`nn.Module`):
            The encoder.
        num_tokens (`int`):
            How many tokens an image is to have, where its size is free.
        num_images (`int`):
            How many images there are to be, where it is not. Those behind the first are noise.

    Returns:
        `Iterator[dict[str, torch.Tensor]]`: Guesses, on the CPU and in float32. None if the encoder takes something
        else.
    """
    names = list(inspect.signature(type(tower).forward).parameters)[1:]
    read = _Settings(tower)
    if names[:1] == ["input_features"] and read.num_mel_bins is not None:
        # Some read windows of a hundred or two hundred frames.
        length = 2 * read.max_source_positions if read.max_source_positions else 200 * math.ceil(num_tokens / 25)
        masks = {name: torch.ones(1, length).long() for name in names if name == "input_features_mask"}
        yield {"input_features": torch.zeros(1, read.num_mel_bins, length), **masks}
    elif "pixel_values" in names:
        for pixel_values, others in _pixels(names, read, num_tokens, num_images):
            yield {"pixel_values": pixel_values, **others}
    elif names[1:2] and names[1].endswith("grid_thw"):
        for patches, others in _in_one_row(names[1], read, num_tokens):
            yield {names[0]: patches, **others}


class _Settings:
    """The settings of an encoder, by the names that they have in most configs. What is not there is `None`."""

    def __init__(self, tower: nn.Module) -> None:
        self.tower = tower
        self.config = getattr(tower, "config", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name, None)

    @property
    def channels(self) -> int:
        return self.num_channels or self.in_channels or 3

    @property
    def size(self) -> tuple[int, int] | None:
        size = self.image_size
        return None if size is None else tuple(size) if isinstance(size, (list, tuple)) else (size, size)

    @property
    def patch_length(self) -> int:
        """Numbers in a patch, which may be of several frames."""
        of_frame = self.channels * self.patch_size**2
        readers = [module for module in self.tower.modules() if isinstance(module, (nn.Conv3d, nn.Linear))]
        lengths = (reader.weight[0].numel() for reader in readers)
        return next((length for length in lengths if length % of_frame == 0), of_frame)

    def side(self, num_tokens: int) -> int:
        """Patches on a side of a square image with this many tokens, for encoders that merge patches too."""
        merge = self.spatial_merge_size or 2
        return merge * max(2, math.ceil(math.sqrt(num_tokens) / merge))


Guess = tuple[torch.Tensor, Arguments]


def _pixels(names: list[str], read: _Settings, num_tokens: int, num_images: int) -> Iterator[Guess]:
    grid_name = next((name for name in names if name.endswith("grid_thw")), None)
    if grid_name is not None:
        more = {"merge_sizes": torch.ones(1).long()} if "merge_sizes" in names else {}
        for patches, others in _in_one_row(grid_name, read, num_tokens * num_images):
            yield patches, {**others, **more}
    elif "aspect_ratio_ids" in names:
        # Tiles of an image, of which a small one has one.
        tiles = torch.zeros(1, 1, read.max_num_tiles, read.channels, *read.size)
        mask = torch.zeros(1, 1, read.max_num_tiles).long()
        mask[..., 0] = 1
        yield tiles, {"aspect_ratio_ids": torch.ones(1, 1).long(), "aspect_ratio_mask": mask}
    elif read.patch_size is not None and {"spatial_shapes", "pixel_position_ids", "target_sizes"} & set(names):
        yield from _of_any_size(names, read, read.side(num_tokens * num_images))
    elif read.size is not None:
        images = torch.randn(num_images, read.channels, *read.size, generator=torch.Generator().manual_seed(0))
        images[0] = 0
        yield images, {}
        if read.patch_size is not None:
            num_patches = math.prod(length // read.patch_size for length in read.size)
            yield torch.zeros(1, num_patches, read.patch_length), {}


def _in_one_row(grid_name: str, read: _Settings, num_tokens: int) -> Iterator[Guess]:
    """Patches of all images one after the other, flattened or not."""
    if read.patch_size is None:
        return
    side = read.side(num_tokens)
    grid = {grid_name: torch.tensor([[1, side, side]])}
    patches = torch.zeros(side**2, read.patch_length)
    yield patches, grid
    if read.patch_length == read.channels * read.patch_size**2:
        patches = patches.view(-1, read.channels, read.patch_size, read.patch_size)
        yield patches, grid
        yield patches[None], grid


def _of_any_size(names: list[str], read: _Settings, side: int) -> Iterator[Guess]:
    """One image of side x side patches, of whose size an argument tells."""
    patches = torch.zeros(1, side**2, read.patch_length)
    if "spatial_shapes" in names:
        mask = torch.ones(1, side**2).long()
        yield patches, {"spatial_shapes": torch.tensor([[side, side]]), "pixel_attention_mask": mask}
    elif "pixel_position_ids" in names:
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        yield patches, {"pixel_position_ids": places[None].flip(-1)}
    else:
        pixels = torch.zeros(1, read.channels, read.patch_size, side**2 * read.patch_size)
        yield pixels, {"target_sizes": torch.tensor([[side, side]])}
