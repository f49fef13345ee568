"""
Does the runs that are missing: `python -m benchmarks.comparison --packages FOLDER --results FOLDER`.

With `--lr` and `--seeds`, these are runs of the given methods; `--final` looks at the test pictures.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from .base import build
from .methods import METHODS
from .run import Budget, Run, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison", description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="Where the unpacked packages are.")
    parser.add_argument("--base", type=Path, required=True, help="The base model, which is made if it is not there.")
    parser.add_argument("--results", type=Path, required=True, help="Where each run writes its file.")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["connector", "lora", "m2pt"])
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--final", action="store_true", help="Look at the test pictures.")
    parser.add_argument("--steps", type=int, default=Budget.num_steps)
    parser.add_argument("--batch-size", type=int, default=Budget.batch_size)
    arguments = parser.parse_args()

    if not (arguments.base / "config.json").exists():
        build(arguments.packages, arguments.base)
    arguments.results.mkdir(parents=True, exist_ok=True)
    budget = Budget(num_steps=arguments.steps, batch_size=arguments.batch_size)
    for seed in arguments.seeds:
        for lr in arguments.lr:
            for method in arguments.methods:
                _do(Run(method, lr, seed, arguments.final), budget, arguments)


def _do(settings: Run, budget: Budget, arguments: argparse.Namespace) -> None:
    file = arguments.results / f"{settings.name}.json"
    if file.exists():
        return
    result = run(settings, budget, arguments.packages, arguments.base)
    # A stop leaves nothing half.
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result))
    os.replace(unfinished, file)
    last = sum(result["losses"][-25:]) / len(result["losses"][-25:])
    print(
        f"{settings.name}: loss {last:.3f}, {result['tuned']}, {result['held out']}, text {result['plain text']:.2f}, "
        f"{result['seconds']} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
