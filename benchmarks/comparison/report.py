"""Puts the runs of a folder into tables: `python -m benchmarks.comparison.report RESULTS`."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any


Result = dict[str, Any]

COLUMNS: dict[str, Callable[[Result], float]] = {
    "loss": lambda result: mean(result["losses"][-25:]),
    "tuned: right": lambda result: result["tuned"]["exact"],
    "entropy": lambda result: result["tuned"]["entropy"],
    "held out: right": lambda result: result["held out"]["exact"],
    "entropy ": lambda result: result["held out"]["entropy"],
    "plain text": lambda result: result["plain text"],
}


def read(folder: Path) -> list[Result]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def search_table(results: list[Result]) -> str:
    """A row for each method and rate, from validation pictures."""
    names = list(COLUMNS)[:3] + list(COLUMNS)[5:]
    rows = sorted(
        ((result["run"]["method"], result["run"]["lr"], result) for result in results), key=lambda row: row[:2]
    )
    lines = [f"| {method} | {lr:g} | " + _cells(result, names) + " |" for method, lr, result in rows]
    return "\n".join([f"| method | rate | {' | '.join(names)} |", f"|{'---|' * (2 + len(names))}", *lines])


def _cells(result: Result, names: list[str]) -> str:
    return " | ".join(f"{COLUMNS[name](result):.3f}" for name in names)


def final_table(results: list[Result]) -> str:
    """A row for each method: the mean over seeds (lowest to highest), from test pictures."""
    groups: dict[tuple[str, float], list[Result]] = defaultdict(list)
    for result in results:
        groups[result["run"]["method"], result["run"]["lr"]].append(result)
    lines = []
    for (method, lr), runs in sorted(groups.items()):
        cells = [_spread([column(run) for run in runs]) for column in COLUMNS.values()]
        lines.append(f"| {method} | {lr:g} | {len(runs)} | {runs[0]['parameters']:,} | {' | '.join(cells)} |")
    head = ["method", "rate", "seeds", "parameters", *COLUMNS]
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines])


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    results = read(Path(sys.argv[1]))
    print(search_table([result for result in results if not result["run"]["final"]]))
    print()
    print(final_table([result for result in results if result["run"]["final"]]))


if __name__ == "__main__":
    main()
