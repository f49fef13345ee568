"""Reads untrusted checkpoint folders."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..errors import ConversionError


# File names of unsharded checkpoints. Sharded ones have an index "<name>.index.json".
FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class StoredTensor:
    """File, shape and dtype of a tensor on disk."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """
    The tensors of a checkpoint folder: one file or shards with an index, in safetensors or PyTorch format.

    Files are memory-mapped, one shard at a time. Read tensors in the order of their files to open each file once.

    Args:
        folder (`Path`):
            The folder.

    Raises:
        ConversionError: If the folder has no weights, lacks a shard, or has a file that is damaged, holds anything but
            tensors, or is outside of the folder. No code in a file is executed.

    **Attributes**:
        - **tensors** (`dict[str, StoredTensor]`) -- All tensors by name, in the order of their files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._open: tuple[Path, dict[str, torch.Tensor]] | None = None
        for file, expected in find_files(folder).items():
            tensors = load_tensors(file)
            for name, tensor in tensors.items():
                if name in self.tensors:
                    raise ConversionError(f"'{name}' is in both {self.tensors[name].file} and {file}.")
                self.tensors[name] = StoredTensor(file, tuple(tensor.shape), tensor.dtype)
            missing = sorted(expected - tensors.keys())
            if missing:
                raise ConversionError(f"{file} lacks '{missing[0]}', which is in it according to the index.")

    def read(self, name: str) -> torch.Tensor:
        """
        Reads a tensor.

        Returns:
            `torch.Tensor`

        Raises:
            ConversionError: If its file can no longer be read.
        """
        file = self.tensors[name].file
        if self._open is None or self._open[0] != file:
            # Close the previous shard first, so that there are never two in memory.
            self._open = None
            self._open = (file, load_tensors(file))
        return self._open[1][name]


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """
    Loads the tensors of one file without executing code in it, memory-mapped if its format allows that.

    Returns:
        `dict[str, torch.Tensor]`

    Raises:
        ConversionError: If the file is damaged or holds anything but tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Files from before torch 1.6 are not zip archives and cannot be memory-mapped.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        reference = re.search(r"GLOBAL (\S+)", str(error))
        raise ConversionError(
            f"{file} is refused: it "
            + (f"refers to '{reference[1]}'" if reference else "is damaged or holds something else")
            + " where only tensors are expected. No code in it was executed."
        ) from error
    except Exception as error:  # The readers raise errors of many types for damaged files.
        raise ConversionError(f"{file} cannot be read. Is it truncated or damaged? {error}") from error
    if not isinstance(tensors, dict) or not all(map(_is_plain, tensors.items())):
        raise ConversionError(f"{file} is refused: it holds something other than named tensors.")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _is_plain(item: tuple[Any, Any]) -> bool:
    name, tensor = item
    is_tensor = isinstance(name, str) and isinstance(tensor, torch.Tensor)
    return is_tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"


def read_json(file: Path) -> dict[str, Any]:
    """
    Reads a JSON file that holds a dictionary.

    Raises:
        ConversionError: If it does not exist, or holds anything else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file} does not hold a dictionary.")
    return content


def find_files(folder: Path) -> dict[Path, set[str]]:
    """
    Finds the files of a checkpoint, in the order in which transformers looks for them.

    Returns:
        `dict[Path, set[str]]`: The files, each with its tensors according to the index, if there is one.

    Raises:
        ConversionError: If there are no weights, or if a file named in the index is missing.
    """
    for name in FILES:
        if (folder / name).is_file():
            return {folder / name: set()}
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_index(index)
    raise ConversionError(
        f"{folder} has no weights. Expected one of the files "
        + ", ".join(f"{name}, {name}.index.json" for name in FILES)
        + "."
    )


def _read_index(index: Path) -> dict[Path, set[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index} has no 'weight_map'.")
    files = defaultdict(set)
    for name, file in weight_map.items():
        # The file may be a symlink, as in the cache of the Hub, but an index must not refer to other folders.
        if not isinstance(file, str) or Path(file).name != file:
            raise ConversionError(f"{index} is refused: {file!r} is not the name of a file in the same folder.")
        if not (index.parent / file).is_file():
            raise ConversionError(f"{index} names the shard '{file}', which does not exist. Is the folder complete?")
        files[index.parent / file].add(name)
    return dict(sorted(files.items()))
