"""
Conversations about images and videos, in the layout of LLaVA and Vision-Flan, from JSON, JSON Lines, parquet or the
Hub:

    {"id": "1", "image": "shapes/1.png", "task_name": "colour", "conversations": [
        {"from": "human", "value": "<image>\\nWhich colour is it?"}, {"from": "gpt", "value": "Red."}]}

"task_name" (or "task") is only for the scores. "image" is a path in the image folder, an image in the file itself, or
a list of them (also as "images"), one for each "<image>", in whichever turn. "video" is the path of a video, or a list
of images, its frames; "videos" is a list of videos, one for each "<video>". Without any, the sample is text only.
Images are read when their sample is needed.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from transformers import ProcessorMixin


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
BAD_IMAGES = ("error", "skip")
MARKERS = {"<image>": "image", "<video>": "video"}
# So many bad images in a row are no accident.
MAX_BAD_IN_A_ROW = 100
TOO_MANY_BAD = "No image of many samples in a row can be read. Is image_folder right? See {report}."

logger = logging.getLogger(__name__)


def is_file(source: str) -> bool:
    """Whether a source is a file or a pattern for files. Others are on the Hub."""
    return Path(source).suffix in BUILDERS


def load(source: str, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    """
    Loads rows, with images as they are stored.

    Args:
        source (`str`):
            A JSON, JSON Lines or parquet file, a pattern for several such as "data/*.parquet", or the id of a dataset
            on the Hub.
        split (`str`):
            The split of a dataset on the Hub. Files are one split.
        streaming (`bool`):
            Read rows one after the other instead of all at the start.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be streamed.
    """
    suffix = Path(source).suffix
    if not is_file(source):
        dataset = datasets.load_dataset(source, split=split, streaming=streaming)
    else:
        files = sorted(glob(source))
        if not files:
            raise FileNotFoundError(f"There is no file {source}.")
        if suffix == ".json" and streaming:
            raise ValueError(
                f"{source} is one JSON array, which is only read as a whole. For streaming=True, write one sample on "
                f"each line of a .jsonl file, or make it parquet."
            )
        dataset = datasets.load_dataset(BUILDERS[suffix], data_files=files, split="train", streaming=streaming)
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return dataset


def images_of(row: dict[str, Any]) -> list[Any]:
    """Returns the images of a row as they are stored."""
    images = row["image"] if row.get("image") is not None else row.get("images")
    return images if isinstance(images, list) else [] if images is None else [images]


def videos_of(row: dict[str, Any]) -> list[Any]:
    """Returns the videos of a row, each of which is a path or a list of frames."""
    return row.get("videos") or [] if row.get("video") is None else [row["video"]]


def kinds_of(processor: ProcessorMixin) -> list[str]:
    """Returns what a processor takes beside text: "image", "video" or both."""
    return [kind for kind in MARKERS.values() if getattr(processor, f"{kind}_processor", None) is not None]


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Returns the conversation of a row as chat templates take it.

    Raises:
        ValueError: If it is no conversation in the layout above. The message names the sample.
    """
    name = f"sample {row.get('id')!r}"
    turns = row.get("conversations")
    if not turns:
        raise ValueError(f"{name} has no 'conversations'; its fields are {sorted(row)}.")
    messages = []
    for turn in turns:
        if turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
            raise ValueError(f"{name} has the turn {turn}: it needs a 'from', one of {list(ROLES)}, and a 'value'.")
        role = ROLES[turn["from"]]
        content = [
            {"type": MARKERS[part]} if part in MARKERS else {"type": "text", "text": part.strip()}
            for part in re.split("(" + "|".join(MARKERS) + ")", turn["value"])
            if part in MARKERS or part.strip()
        ]
        shown = {part["type"] for part in content} - {"text"}
        if shown and role != "user":
            raise ValueError(
                f"{name} has <{shown.pop()}> in a turn of {turn['from']!r}, but only users show images and videos."
            )
        messages.append({"role": role, "content": content})
    return checked(messages, {"image": len(images_of(row)), "video": len(videos_of(row))}, name)


def checked(messages: list[dict[str, Any]], numbers: dict[str, int], name: str) -> list[dict[str, Any]]:
    """Checks that users and assistants take turns, and that each image and video has its place."""
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"{name} has turns of {roles}, but questions and answers must alternate, the answer last.")
    for kind, number in numbers.items():
        num_markers = sum(part["type"] == kind for message in messages for part in message["content"])
        if num_markers == 0:
            question = next(message for message in messages if message["role"] == "user")
            question["content"][:0] = [{"type": kind}] * number
        elif num_markers != number:
            raise ValueError(f"{name} has {num_markers} <{kind}> in its text, but {number} {kind}s.")
    return messages


def open_image(place: Path | io.BytesIO) -> Image.Image:
    return Image.open(place).convert("RGB")


def open_video(place: Path | list[Path | io.BytesIO]) -> str | list[Image.Image]:
    """Returns a video as processors take it: frames, or a path, of which the processor chooses frames itself."""
    if isinstance(place, list):
        return [open_image(frame) for frame in place]
    place.open("rb").close()  # It is read later, but should be found now.
    return str(place)


class ImageReader:
    """
    Reads the images of rows, and finds their videos.

    Args:
        folder (`Path`, *optional*):
            Where paths lead. Nothing outside of it is read.
        bad_images (`str`):
            What happens to a sample with an image that cannot be read: "error" stops, "skip" takes the next one.
        report (`Path`):
            A file for a line of JSON about each image that was skipped, by this process or another.
        kinds (`list[str]`, *optional*):
            What the model takes, see [`kinds_of`]. By default, images and videos.
    """

    def __init__(self, folder: Path | None, bad_images: str, report: Path, kinds: list[str] | None = None) -> None:
        self.folder = None if folder is None else folder.absolute()
        self.bad_images = bad_images
        self.report = report
        self.kinds = list(MARKERS.values()) if kinds is None else kinds
        self.reported: set[str] = set()

    def locate(self, image: Any, row: dict[str, Any]) -> Path | io.BytesIO:
        """Returns what to open for an image. Raises `ValueError` for paths that lead out of the folder."""
        if isinstance(image, dict) and image["bytes"] is not None:
            return io.BytesIO(image["bytes"])
        path = image["path"] if isinstance(image, dict) else image
        if self.folder is None:
            raise ValueError(f"sample {row.get('id')!r} has its image in the file {path!r}. Set image_folder.")
        # By its text alone, so that links in the folder may lead elsewhere: those are not made by the data.
        place = Path(os.path.normpath(self.folder / path))
        if not place.is_relative_to(self.folder):
            raise ValueError(f"sample {row.get('id')!r} has the image {path!r}, which is outside of {self.folder}.")
        return place

    def locate_all(self, row: dict[str, Any]) -> dict[str, list[Any]]:
        """
        Returns what to open for the images and the videos of a row.

        Raises:
            ValueError: If a path leads out of the folder, or if the model does not take such samples.
        """
        videos = videos_of(row)
        for video in videos:
            if not isinstance(video, str | list):
                raise ValueError(
                    f"sample {row.get('id')!r} has a video that is neither a path nor a list of frames, but a "
                    f"{type(video).__name__}."
                )
        places = {
            "image": [self.locate(image, row) for image in images_of(row)],
            "video": [
                [self.locate(frame, row) for frame in video] if isinstance(video, list) else self.locate(video, row)
                for video in videos
            ],
        }
        for kind, found in places.items():
            if found and kind not in self.kinds:
                raise ValueError(
                    f"sample {row.get('id')!r} has {kind}s, which the processor of this model does not take. Leave "
                    f"such samples out, or choose another model."
                )
        return places

    def read(self, row: dict[str, Any]) -> dict[str, list[Any]] | None:
        """
        Returns the images and videos of a row, or `None` if one of them is bad and such samples are to be skipped.
        Videos in files stay paths, for the processor to choose frames of them.
        """
        media = {}
        for kind, places in self.locate_all(row).items():
            media[f"{kind}s"] = []
            for place in places:
                try:
                    media[f"{kind}s"].append(open_image(place) if kind == "image" else open_video(place))
                except Exception as error:  # Broken files make Pillow raise almost anything.
                    self.report_bad(row, kind, place, error)
                    return None
        return media

    def report_bad(self, row: dict[str, Any], kind: str, place: Any, error: Exception) -> None:
        names = place if isinstance(place, list) else [place]
        name = ", ".join("in the row itself" if isinstance(name, io.BytesIO) else str(name) for name in names)
        reason = f"{type(error).__name__}: {error}"
        if self.bad_images == "error":
            what = "an image" if kind == "image" else "a video"
            raise ValueError(
                f"sample {row.get('id')!r} has {what} that cannot be read, {name} ({reason}). Mend it, or set "
                f"bad_images=skip to go on without such samples."
            ) from error
        line = json.dumps({"id": row.get("id"), kind: name, "reason": reason})
        if line not in self.reported:
            self.reported.add(line)
            logger.warning("Skipped sample %r: its %s cannot be read, %s (%s).", row.get("id"), kind, name, reason)
            with self.report.open("a") as file:
                file.write(line + "\n")

    def reports(self) -> list[dict[str, Any]]:
        """Returns what is known of all images that were skipped."""
        lines = self.report.read_text().splitlines() if self.report.exists() else []
        return [json.loads(line) for line in dict.fromkeys(lines)]


class Conversations(torch.utils.data.Dataset):
    """
    Samples with `messages`, their `images` and `videos`. One that cannot be read is replaced by the next one that can,
    so that batches and their number stay as they are.

    Args:
        rows (`datasets.Dataset` or `list[dict]`):
            The rows.
        reader ([`ImageReader`]):
            Reads their images.
        ask (`bool`, defaults to `False`):
            Leave the last answer away, for evaluation.

    Raises:
        ValueError: If a row is no conversation, or if its image is outside of the folder.
    """

    def __init__(self, rows: datasets.Dataset | list[dict[str, Any]], reader: ImageReader, ask: bool = False) -> None:
        self.rows = rows
        self.reader = reader
        self.ask = ask
        if len(rows) == 0:
            raise ValueError("There are no samples in the data.")
        # Mistakes are better found now than after hours. Rows that hold their images would take long to read.
        hold_images = any(isinstance(image, dict) for image in images_of(rows[0]))
        for row in [] if hold_images else rows:
            messages_of(row)
            reader.locate_all(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for i in range(index, index + min(len(self), MAX_BAD_IN_A_ROW)):
            index = i % len(self)
            row = self.rows[index]
            media = self.reader.read(row)
            if media is not None:
                messages = messages_of(row)
                return {"index": index, "messages": messages[:-1] if self.ask else messages, **media}
        raise ValueError(TOO_MANY_BAD.format(report=self.reader.report))

    def answer(self, index: int) -> str:
        """Returns the last answer of a row."""
        return "".join(part["text"] for part in messages_of(self.rows[index])[-1]["content"])

    def task(self, index: int) -> str | None:
        row = self.rows[index]
        return row.get("task_name") or row.get("task")


class StreamedConversations(torch.utils.data.IterableDataset):
    """
    The same for rows that are streamed. Samples that cannot be read are left out.

    Args:
        rows (`datasets.IterableDataset`):
            The rows.
        reader ([`ImageReader`]):
            Reads their images.
    """

    def __init__(self, rows: datasets.IterableDataset, reader: ImageReader) -> None:
        self.rows = rows
        self.reader = reader

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        bad_in_a_row = 0
        for row in self.rows:
            messages, media = messages_of(row), self.reader.read(row)
            bad_in_a_row = 0 if media is not None else bad_in_a_row + 1
            if media is not None:
                yield {"messages": messages, **media}
            elif bad_in_a_row == MAX_BAD_IN_A_ROW:
                raise ValueError(TOO_MANY_BAD.format(report=self.reader.report))
