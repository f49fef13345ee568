"""Writes folders atomically."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


def is_taken(output: Path) -> bool:
    """Whether something exists that a new folder must not replace."""
    return output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir())))


@contextmanager
def atomic_folder(output: Path) -> Generator[Path]:
    """Yields a temporary folder, which is renamed to `output` on success and removed on failure."""
    output = output.absolute()
    folder = output.with_name(f"{output.name}.incomplete-{secrets.token_hex(4)}")
    folder.mkdir(parents=True)
    try:
        yield folder
        if output.exists():
            output.rmdir()
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
