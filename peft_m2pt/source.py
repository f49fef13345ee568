"""Saved adapters, which may come from anybody: reads them, and says what is wrong with their files."""

from __future__ import annotations

from collections.abc import Iterator
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
            A folder, or a repository of the Hub.
        hub_arguments (`dict[str, Any]`):
            What says where in the repository, and who asks: `revision`, `subfolder`, `token`, ...
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
            AdapterFileError: If there is no such file, or if it is not one of weights.
            OSError: If it cannot be downloaded.
        """
        try:
            with naming_the_file(self.path, SAFETENSORS_WEIGHTS_NAME):
                return load_peft_weights(self.path, device="cpu", key_mapping=key_mapping, **self.hub_arguments)
        except AdapterFileError:
            raise
        except Exception as error:
            # Of the Hub's client and of what it is built on.
            raise OSError(
                f"The weights of the adapter in '{self.path}' cannot be loaded: {error}\nNo model has been changed. "
                f"Try again."
            ) from error


# What the parsers of json and weights raise, and code that trusts in the types of what it reads.
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
def naming_the_file(path: str, file_name: str, unless: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Makes errors about the content of a file of an adapter name it, unless they do so themselves."""
    try:
        yield
    except unless:
        raise
    except DAMAGE as error:
        what = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise AdapterFileError(f"'{file_name}' of the adapter '{path}' is wrong or damaged. {what}") from error
