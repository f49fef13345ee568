"""Folders that are complete or absent."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_taken(output: Path) -> bool:
    """Whether something is there already that a new folder must not replace."""
    return output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir())))


@contextmanager
def complete_or_absent(output: Path) -> Iterator[Path]:
    """Gives a folder to fill, which becomes `output` if nothing goes wrong, and is removed otherwise."""
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
