"""Reads the files of saved adapters, which may be damaged or untrusted."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError

from .errors import AdapterFileError


@dataclass(frozen=True)
class AdapterSource:
    """
    Where a saved adapter is.

    Args:
        path (`str`):
            A folder, or the id of a repository on the Hub.
        hub_arguments (`dict[str, Any]`):
            `revision`, `subfolder`, `token`, ...
    """

    path: str
    hub_arguments: dict[str, Any]

    def load_weights(self, key_mapping: dict[str, str] | None) -> dict[str, torch.Tensor]:
        """
        Reads the weights into memory.

        Args:
            key_mapping (`dict[str, str]`, *optional*):
                How transformers renames the weights of older checkpoints.

        Raises:
            AdapterFileError: If the file is missing or damaged.
            OSError: If it cannot be downloaded.
        """
        try:
            with name_damaged_file(self.path, SAFETENSORS_WEIGHTS_NAME):
                return load_peft_weights(self.path, device="cpu", key_mapping=key_mapping, **self.hub_arguments)
        except AdapterFileError:
            raise
        except Exception as error:
            # Raised by huggingface_hub, httpx, ...
            raise OSError(
                f"The weights of the adapter in '{self.path}' cannot be loaded: {error}\nNo model has been changed. "
                f"Try again."
            ) from error


# Raised by the parsers of JSON and weights, and by code that relies on the types of what they return.
DAMAGE = (
    AttributeError,
    EOFError,
    KeyError,
    RecursionError,
    SafetensorError,
    TypeError,
    UnpicklingError,
    ValueError,
)


@contextmanager
def name_damaged_file(path: str, file_name: str, unless: type[Exception] | tuple[()] = ()) -> Generator[None]:
    """Turns errors about the content of an adapter's file into an `AdapterFileError` that names the file."""
    try:
        yield
    except unless:
        raise
    except DAMAGE as error:
        what = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise AdapterFileError(f"'{file_name}' of the adapter '{path}' is wrong or damaged. {what}") from error
