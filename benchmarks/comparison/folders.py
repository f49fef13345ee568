"""Files and folders that are whole or absent, whenever a program is stopped."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to write to, which gets its name when all is written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent) as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        yield new
        new.rename(folder)


@contextmanager
def locked(file: Path) -> Iterator[bool]:
    """Keeps a file to this process, or says that another one has it. The file is there no longer than needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            file.unlink(missing_ok=True)


def write_json(file: Path, value: Any) -> None:
    """Writes a file of JSON."""
    write_text(file, json.dumps(value, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Writes a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".unfinished-{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(file)
