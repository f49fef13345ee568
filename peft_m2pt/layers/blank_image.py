"""Builds the inputs of an image or audio encoder for a blank image or silence, from its argument names and config."""

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
    Guesses the arguments of an encoder for an image of zeros, the mean of normalized images.

    Args:
        tower (`nn.Module`):
            The encoder.
        num_tokens (`int`):
            Least number of tokens of the image, if the encoder takes images of any size.
        num_images (`int`):
            Number of images, if it does not. All but the first are noise.

    Returns:
        `Iterator[dict[str, torch.Tensor]]`: Candidates to try in order, on the CPU and in float32. Empty if the
        encoder takes something else.
    """
    names = list(inspect.signature(type(tower).forward).parameters)[1:]
    config = _EncoderConfig(tower)
    if names[:1] == ["input_features"] and config.num_mel_bins is not None:
        # Qwen2.5-Omni, for example, reads windows of 200 frames.
        length = 2 * config.max_source_positions if config.max_source_positions else 200 * math.ceil(num_tokens / 25)
        masks = {name: torch.ones(1, length).long() for name in names if name == "input_features_mask"}
        yield {"input_features": torch.zeros(1, config.num_mel_bins, length), **masks}
    elif "pixel_values" in names:
        for pixel_values, others in _pixel_values(names, config, num_tokens, num_images):
            yield {"pixel_values": pixel_values, **others}
    elif names[1:2] and names[1].endswith("grid_thw"):
        for patches, others in _packed_patches(names[1], config, num_tokens):
            yield {names[0]: patches, **others}


class _EncoderConfig:
    """The config of an encoder, by the field names of most configs. Missing fields are `None`."""

    def __init__(self, tower: nn.Module) -> None:
        self.tower = tower
        self.fields = getattr(tower, "config", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fields, name, None)

    @property
    def channels(self) -> int:
        return self.num_channels or self.in_channels or 3

    @property
    def size(self) -> tuple[int, int] | None:
        size = self.image_size
        return None if size is None else tuple(size) if isinstance(size, (list, tuple)) else (size, size)

    @property
    def patch_length(self) -> int:
        """Number of values in a flattened patch, which may span several frames."""
        of_frame = self.channels * self.patch_size**2
        embeddings = [module for module in self.tower.modules() if isinstance(module, (nn.Conv3d, nn.Linear))]
        lengths = (embedding.weight[0].numel() for embedding in embeddings)
        return next((length for length in lengths if length % of_frame == 0), of_frame)

    def side(self, num_tokens: int) -> int:
        """Side length, in patches, of a square image with at least this many tokens, also if patches are merged."""
        merge = self.spatial_merge_size or 2
        return merge * max(2, math.ceil(math.sqrt(num_tokens) / merge))


Candidate = tuple[torch.Tensor, Arguments]


def _pixel_values(names: list[str], config: _EncoderConfig, num_tokens: int, num_images: int) -> Iterator[Candidate]:
    grid_name = next((name for name in names if name.endswith("grid_thw")), None)
    if grid_name is not None:
        more = {"merge_sizes": torch.ones(1).long()} if "merge_sizes" in names else {}
        for patches, others in _packed_patches(grid_name, config, num_tokens * num_images):
            yield patches, {**others, **more}
    elif "aspect_ratio_ids" in names:
        # Mllama: tiles of an image, of which a small image needs one.
        tiles = torch.zeros(1, 1, config.max_num_tiles, config.channels, *config.size)
        mask = torch.zeros(1, 1, config.max_num_tiles).long()
        mask[..., 0] = 1
        yield tiles, {"aspect_ratio_ids": torch.ones(1, 1).long(), "aspect_ratio_mask": mask}
    elif config.patch_size is not None and {"spatial_shapes", "pixel_position_ids", "target_sizes"} & set(names):
        yield from _patches_of_any_size(names, config, config.side(num_tokens * num_images))
    elif config.size is not None:
        images = torch.randn(num_images, config.channels, *config.size, generator=torch.Generator().manual_seed(0))
        images[0] = 0
        yield images, {}
        if config.patch_size is not None:
            num_patches = math.prod(length // config.patch_size for length in config.size)
            yield torch.zeros(1, num_patches, config.patch_length), {}


def _packed_patches(grid_name: str, config: _EncoderConfig, num_tokens: int) -> Iterator[Candidate]:
    """Patches of all images in one sequence, flattened or not."""
    if config.patch_size is None:
        return
    side = config.side(num_tokens)
    grid = {grid_name: torch.tensor([[1, side, side]])}
    patches = torch.zeros(side**2, config.patch_length)
    yield patches, grid
    if config.patch_length == config.channels * config.patch_size**2:
        patches = patches.view(-1, config.channels, config.patch_size, config.patch_size)
        yield patches, grid
        yield patches[None], grid


def _patches_of_any_size(names: list[str], config: _EncoderConfig, side: int) -> Iterator[Candidate]:
    """One image of side x side patches whose size is given by an argument."""
    patches = torch.zeros(1, side**2, config.patch_length)
    if "spatial_shapes" in names:
        mask = torch.ones(1, side**2).long()
        yield patches, {"spatial_shapes": torch.tensor([[side, side]]), "pixel_attention_mask": mask}
    elif "pixel_position_ids" in names:
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        yield patches, {"pixel_position_ids": places[None].flip(-1)}
    else:
        pixels = torch.zeros(1, config.channels, config.patch_size, side**2 * config.patch_size)
        yield pixels, {"target_sizes": torch.tensor([[side, side]])}
