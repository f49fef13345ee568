"""Runs another program with M2PT registered: `python -m peft_m2pt run` and `serve`."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers.utils.import_utils import is_serve_available

from .bundled import is_bundle


def find_program(program: str, arguments: Sequence[str]) -> Callable[[], Any]:
    """
    Finds a program that can run in this process, where M2PT is registered with PEFT.

    Args:
        program (`str`):
            A file that ends in ".py", the name of an installed console script, or that of a module, as in
            `python -m MODULE`.
        arguments (`Sequence[str]`):
            Its arguments, which are those of this process from now on.

    Returns:
        `Callable`: Runs the program.

    Raises:
        ValueError: If there is no such program.
    """
    start = _find(program)
    sys.argv = [program, *arguments]
    return start


def find_server(bundle: Path, arguments: Sequence[str]) -> Callable[[], Any]:
    """
    Finds the server of transformers, to serve a bundle in this process.

    Args:
        bundle (`Path`):
            The folder.
        arguments (`Sequence[str]`):
            Further arguments of `transformers serve`.

    Returns:
        `Callable`: Runs it.

    Raises:
        ValueError: If the folder is not a bundle, or if the server lacks packages.
    """
    if not is_bundle(bundle):
        raise ValueError(f"{bundle} is not a bundle. Make one with `peft-m2pt bundle BASE ADAPTER --output DIR`.")
    if not is_serve_available():
        raise ValueError("The server lacks packages. Install them with `pip install 'transformers[serving]'`.")
    # Up to transformers 5.23, the list of models is that of the cache, and an error of the server if there is none.
    Path(constants.HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    return find_program("transformers", ["serve", str(bundle), *arguments])


def _find(program: str) -> Callable[[], Any]:
    if program.endswith(".py"):
        if not Path(program).is_file():
            raise ValueError(f"{program!r} is no file.")
        sys.path[0] = str(Path(program).resolve().parent)
        return partial(runpy.run_path, program, run_name="__main__")
    if scripts := entry_points(group="console_scripts", name=program):
        script = next(iter(scripts))
        return lambda: sys.exit(script.load()())
    if not _is_module(program):
        raise ValueError(
            f"{program!r} is neither an installed console script, nor a module, nor a file that ends in '.py'."
        )
    return partial(runpy.run_module, program, run_name="__main__", alter_sys=True)


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
