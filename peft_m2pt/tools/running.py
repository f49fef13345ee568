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
from transformers import AutoConfig
from transformers.utils.import_utils import is_serve_available

from ..bundles.loading import is_bundle
from ..upstream import let_server_load


def find_program(program: str, arguments: Sequence[str]) -> Callable[[], Any]:
    """
    Finds a program to run in this process, in which M2PT is registered with PEFT, and sets `sys.argv` for it.

    Args:
        program (`str`):
            A file ending in ".py", the name of an installed console script, or a module, as in `python -m MODULE`.
        arguments (`Sequence[str]`):
            Its arguments.

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
    Finds the server of transformers, to run it in this process with a bundle.

    Returns:
        `Callable`: Runs the server.

    Raises:
        ValueError: If the folder is not a bundle, or if packages that the server needs are missing.
    """
    if not is_bundle(bundle):
        raise ValueError(f"{bundle} is not a bundle. Make one with `peft-m2pt bundle BASE ADAPTER --output DIR`.")
    if not is_serve_available():
        raise ValueError("Packages for the server are missing. Install them: `pip install 'transformers[serving]'`.")
    let_server_load(AutoConfig.from_pretrained(bundle))
    # Up to transformers 5.23, the server lists the models in the cache, and fails if that does not exist.
    Path(constants.HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    return find_program("transformers", ["serve", str(bundle), *arguments])


def _find(program: str) -> Callable[[], Any]:
    if program.endswith(".py"):
        if not Path(program).is_file():
            raise ValueError(f"{program!r} is not a file.")
        sys.path[0] = str(Path(program).resolve().parent)
        return partial(runpy.run_path, program, run_name="__main__")
    if scripts := entry_points(group="console_scripts", name=program):
        script = next(iter(scripts))
        return lambda: sys.exit(script.load()())
    if not _is_module(program):
        raise ValueError(
            f"{program!r} is neither an installed console script, nor a module, nor a file ending in '.py'."
        )
    return partial(runpy.run_module, program, run_name="__main__", alter_sys=True)


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
