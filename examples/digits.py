"""The data of the quickstart: handwritten digits, digits drawn with fonts, and instructions about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from PIL import Image, ImageDraw, ImageFont, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional as F


IMAGE_SIZE = 32
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

# Matplotlib's fonts, except those with symbols or only a few letters.
FONTS = ["DejaVuSans", "DejaVuSans[-M]*", "DejaVuSerif", "DejaVuSerif-*", "STIXGeneral*", "cm[brt]*10", "cmss10"]


def yes_no(condition: bool) -> str:
    return "yes" if condition else "no"


# Each instruction, and its answer as a function of the digit in the image.
INSTRUCTIONS: dict[str, Callable[[int], str]] = {
    "Which digit is this?": str,
    "Which digit comes next?": lambda digit: str((digit + 1) % 10),
    "Is the digit even?": lambda digit: yes_no(digit % 2 == 0),
    "Is it larger than four?": lambda digit: yes_no(digit > 4),
    "Is it a multiple of three?": lambda digit: yes_no(digit % 3 == 0),
    "Write it as a word.": lambda digit: WORDS[digit],
}


def texts() -> list[str]:
    """Returns all instructions with all their answers."""
    return [f"{instruction} {answer(digit)}" for instruction, answer in INSTRUCTIONS.items() for digit in range(10)]


def ask(images: Dataset, instructions: list[str]) -> Dataset:
    """Pairs every instruction with every image: rows of `image`, `digit`, `instruction` and `answer`."""
    return concatenate_datasets(
        [
            images.add_column("instruction", [instruction] * len(images)).add_column(
                "answer", [INSTRUCTIONS[instruction](digit) for digit in images["digit"]]
            )
            for instruction in instructions
        ]
    )


def handwritten_digits(test_size: int, seed: int) -> tuple[Dataset, Dataset]:
    """Returns scikit-learn's 1,797 scans of real handwriting as a training and a test dataset."""
    scans = load_digits()
    images = [
        Image.fromarray(np.uint8(scan * 255 / 16)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        for scan in scans.images
    ]
    train_images, test_images, train_digits, test_digits = train_test_split(
        images, scans.target, test_size=test_size, random_state=seed, stratify=scans.target
    )
    train = Dataset.from_dict({"image": train_images, "digit": train_digits})
    test = Dataset.from_dict({"image": test_images, "digit": test_digits})
    return train, test


def font_digits(num_images: int, seed: int) -> Dataset:
    """Draws digits in many fonts and strokes, each rotated, slanted, stretched and shifted at random."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(num_images, generator=generator)

    glyphs, digits = draw_glyphs()
    chosen = torch.randint(len(glyphs), (num_images,), generator=generator)

    # One affine map per image, from its pixels to those of the glyph, so that a single call draws all images.
    angle, slant, width, height = uniform(-0.3, 0.3), uniform(-0.3, 0.3), uniform(0.7, 1.1), uniform(0.75, 1.0)
    sin, cos = angle.sin(), angle.cos()
    to_x = torch.stack([cos / width, (slant * cos - sin) / width, uniform(-0.15, 0.15)], dim=1)
    to_y = torch.stack([sin / height, (slant * sin + cos) / height, uniform(-0.15, 0.15)], dim=1)
    grid = F.affine_grid(
        torch.stack([to_x, to_y], dim=1), (num_images, 1, IMAGE_SIZE, IMAGE_SIZE), align_corners=False
    )
    pixels = F.grid_sample(glyphs[chosen, None], grid, align_corners=False).squeeze(1)

    noise = 8 * torch.randn(pixels.shape, generator=generator)
    images = [Image.fromarray(image) for image in (pixels + noise).clamp(0, 255).byte().numpy()]
    return Dataset.from_dict({"image": images, "digit": digits[chosen].tolist()})


def draw_glyphs() -> tuple[torch.Tensor, torch.Tensor]:
    """Draws every digit in every font with thin to thick strokes. Returns the images and the digits."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    paths = sorted(path for pattern in FONTS for path in folder.glob(f"{pattern}.ttf"))
    fonts = [ImageFont.truetype(path, size=48) for path in paths]
    drawn = [(draw_glyph(digit, font, stroke), digit) for font in fonts for digit in range(10) for stroke in range(4)]
    glyphs, digits = zip(*drawn)
    return torch.tensor(np.stack(glyphs), dtype=torch.float32), torch.tensor(digits)


def draw_glyph(digit: int, font: ImageFont.FreeTypeFont, stroke_width: int, size: int = 48) -> np.ndarray:
    """Draws a digit, white on black, so that it fills a square image."""
    canvas = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(canvas).text((size, size), str(digit), fill=255, font=font, anchor="mm", stroke_width=stroke_width)
    return np.asarray(ImageOps.pad(canvas.crop(canvas.getbbox()), (size, size)))
