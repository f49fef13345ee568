"""`python -m benchmarks`: measures M2PT against other methods. See README.md beside this file."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from . import report
from .models import DIMS
from .run import run, say


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Measures M2PT against other methods.")
    parser.add_argument("--dims", choices=DIMS, default="medium", help="Dimensions of the model (default: medium).")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: float32. cuda: bfloat16.")
    parser.add_argument("--repeats", type=int, default=5, help="Measurements of each time (default: 5).")
    parser.add_argument("--threads", type=int, help="Threads of the CPU (default: as torch chooses).")
    parser.add_argument(
        "--loading",
        choices=DIMS,
        nargs="*",
        default=["llava-1.5-7b", "qwen2.5-vl-7b"],
        help="Dimensions with which adapters are saved and loaded, on the CPU (default: those of the 7B models).",
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", help="Folder for the results."
    )
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats} measures nothing. Choose at least 1.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU on this machine. Choose --device cpu.")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = run(arguments.dims, arguments.device, arguments.repeats, arguments.loading)
    results = {
        "dims": arguments.dims,
        "date": date.today().isoformat(),
        "dtype": "bfloat16" if arguments.device == "cuda" else "float32",
        "repeats": arguments.repeats,
        "machine": report.describe_machine(arguments.device),
        **measured,
    }
    table = report.write(results, arguments.output)
    say(f"written: {table}")
    print()
    print(table.read_text())


if __name__ == "__main__":
    main()
