"""
What the tasks for lmms-eval in this folder have in common: questions and scoring.

An answer is right or wrong, and nobody but this file judges it. What is compared is the answer in lower case, without
punctuation at its ends and without an article in front.
"""

from __future__ import annotations

import io
import string
from typing import Any
from urllib.request import urlopen

from datasets import Dataset
from PIL import Image


Row = dict[str, Any]

ARTICLES = ("a ", "an ", "the ")
# How the data set spells a class of CIFAR-100.
MISSPELLED = {"cra": "crab"}


def normalise(answer: str) -> str:
    """What of an answer is compared."""
    answer = answer.strip(string.punctuation + string.whitespace).lower()
    return next((answer.removeprefix(article) for article in ARTICLES if answer.startswith(article)), answer)


def score(row: Row, results: list[str]) -> dict[str, float]:
    """1 if the answer is the one that is asked for, and nothing else."""
    return {"accuracy": float(normalise(results[0]) == row["answer"])}


def score_first_word(row: Row, results: list[str]) -> dict[str, float]:
    """1 if the first word of the answer is the one that is asked for, whatever follows."""
    word = next(iter(normalise(results[0]).split()), "")
    return {"accuracy": float(normalise(word) == row["answer"])}


def to_image(row: Row) -> list[Image.Image]:
    return [row["image"].convert("RGB")]


# VSR. The data set has addresses of images instead of images.


def load_vsr(rows: Dataset) -> Dataset:
    return rows.add_column("answer", ["yes" if label else "no" for label in rows["label"]])


def download_image(row: Row) -> list[Image.Image]:
    with urlopen(row["image_link"]) as file:
        return [Image.open(io.BytesIO(file.read())).convert("RGB")]


def ask_vsr(row: Row, kwargs: Any = None) -> str:
    return f"Is this statement about the image true? {row['caption']}\nAnswer with yes or no."


# SNLI-VE.


def load_snli_ve(rows: Dataset) -> Dataset:
    names = rows.features["label"].names
    return rows.add_column("answer", [names[label] for label in rows["label"]])


def ask_snli_ve(row: Row, kwargs: Any = None) -> str:
    return (
        f"Is this statement entailed by the image, contradicted by it, or neither of the two? {row['hypothesis']}\n"
        f"Answer with one word: entailment, contradiction or neutral."
    )


# Classes of images.


def load_cifar_10(rows: Dataset) -> Dataset:
    return name_classes(rows.rename_column("img", "image"), "label")


def load_cifar_100(rows: Dataset) -> Dataset:
    return name_classes(rows.rename_column("img", "image"), "fine_label")


def load_mnist(rows: Dataset) -> Dataset:
    return name_classes(rows, "label")


def name_classes(rows: Dataset, column: str) -> Dataset:
    """Adds the name of each image's class, and those of all classes."""
    names = [MISSPELLED.get(name, name).replace("_", " ") for name in rows.features[column].names]
    return rows.add_column("answer", [names[label] for label in rows[column]]).add_column(
        "choices", [", ".join(names)] * len(rows)
    )


def ask_class(row: Row, kwargs: Any = None) -> str:
    return f"What is in the image? Answer with one of these: {row['choices']}."


def ask_mnist(row: Row, kwargs: Any = None) -> str:
    return f"Which digit is in the image? Answer with one of these: {row['choices']}."
