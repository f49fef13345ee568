"""
A comparison of methods on vision-language models. Does what is missing: `python -m benchmarks.comparison STAGE`, where
`search` tries learning rates, `choose` writes the best ones into the experiments, `final` tests each method with all
seeds, `costs` measures time and memory, and `report` makes tables and pictures of it. See `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from . import check, costs, report
from .clothing import Clothing
from .handwriting import Handwriting, quickstart
from .refusals import StudyError
from .study import Study


TASKS = {task.name: task for task in (Handwriting, Clothing)}
STAGES = ("search", "choose", "final", "costs", "report")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison", description=__doc__)
    parser.add_argument("stages", nargs="*", type=_stage, help=f"{', '.join(STAGES)} (default: search and final).")
    parser.add_argument("--base", nargs="+", choices=list(TASKS), default=list(TASKS), help="Which base models.")
    parser.add_argument("--methods", nargs="+", default=[], help="METHOD, or METHOD/VARIANT (default: all).")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=Path.home() / ".cache" / "peft_m2pt",
        help="Where packages and base models are kept (default: %(default)s).",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path(__file__).parents[1] / "results" / "study",
        help="Where each run writes its file (default: %(default)s).",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="Where models compute.")
    parser.add_argument("--check", action="store_true", help="All of it in a minute, on toys: it says nothing.")
    options = parser.parse_args(arguments)
    quickstart.quiet()
    # A stop by `kill` leaves nothing half, as one by Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.check:
            with tempfile.TemporaryDirectory() as folder:
                check.run(Path(folder), options.device)
            return
        study = Study(
            {name: TASKS[name](options.cache_dir) for name in options.base},
            options.results,
            tuple(options.methods),
            device=options.device,
        )
        for stage in options.stages or ("search", "final"):
            do(stage, study)
    except StudyError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nerror: interrupted. What was done is kept, and the same command goes on.")


def _stage(name: str) -> str:
    if name not in STAGES:
        raise argparse.ArgumentTypeError(f"there is no stage {name!r}, only {', '.join(STAGES)}")
    return name


def do(stage: str, study: Study) -> None:
    """Does a stage of a study."""
    if stage == "costs":
        costs.measure(study)
    elif stage == "report":
        report.write(study)
    else:
        getattr(study, stage)()


if __name__ == "__main__":
    main()
