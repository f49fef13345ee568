"""The data of the task for lm-eval beside this file: what `examples/quickstart.py` tests with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image


sys.path.append(str(Path(__file__).parents[2]))
import quickstart  # noqa: E402


def load(**kwargs: Any) -> dict[str, Dataset]:
    return {"test": quickstart.test_questions(quickstart.FULL.num_test_images)}


def image(row: dict[str, Any]) -> list[Image.Image]:
    return [row["image"]]
