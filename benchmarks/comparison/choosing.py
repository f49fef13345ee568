"""Learning rates: which are tried, which is chosen, and that no test picture is looked at before."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from statistics import mean
from typing import Any

from .experiments import Experiment
from .folders import write_json
from .refusals import StudyError
from .run import FINAL, SEARCH, Run
from .scores import balanced_accuracy, chance


CRITERION = "mean cross-entropy of right answers to the tuned instructions, on validation pictures"
UNTUNED = "base/untuned"

# An instruction is no evidence of generalisation if the base, choosing the likeliest of the possible answers, already
# goes so far from chance to perfection.
KNOWN_BEFORE = 0.25


def next_runs(base: str, experiment: Experiment, results: Path) -> list[Run]:
    """The runs that a search still needs before a rate can be chosen."""
    losses = losses_by_rate(base, experiment, results)
    return [
        run
        for rate in [*experiment.training.rates, *losses]
        for run in _runs(base, experiment, rate)
        if not run.file(results).exists()
    ] or [run for rate in _beyond(losses) for run in _runs(base, experiment, rate) if not run.file(results).exists()]


def _runs(base: str, experiment: Experiment, rate: float) -> list[Run]:
    return [Run(base, experiment.name, SEARCH, rate, seed) for seed in experiment.training.search_seeds]


def losses_by_rate(base: str, experiment: Experiment, results: Path) -> dict[float, float]:
    """What the rates are chosen by, for those that have been tried with every seed."""
    found: dict[float, list[float]] = {}
    for file in sorted((results / base / SEARCH).glob(f"{experiment.name.replace('/', '--')}--*.json")):
        result = json.loads(file.read_text())
        found.setdefault(result["run_info"]["lr"], []).append(validation_loss(result))
    wanted = len(experiment.training.search_seeds)
    return {rate: mean(losses) for rate, losses in sorted(found.items()) if len(losses) >= wanted}


def validation_loss(result: dict[str, Any]) -> float:
    tuned = [one for one in result["train_info"]["metrics"]["instructions"].values() if one["level"] == "tuned"]
    return mean(math.inf if one["entropy"] is None else one["entropy"] for one in tuned)


def best_rate(losses: dict[float, float]) -> float:
    """The rate of the lowest loss, the lower one of two."""
    return min(losses, key=lambda rate: (losses[rate], rate))


def _beyond(losses: dict[float, float]) -> list[float]:
    """The next rate, if the best one lies at an end of those that were tried. The steps are half a power of ten."""
    best = best_rate(losses)
    if len(losses) == 1 or best not in (min(losses), max(losses)):
        return []
    return [neighbour(best, up=best == max(losses))]


def neighbour(rate: float, up: bool) -> float:
    """The next rate of ..., 1e-3, 3e-3, 1e-2, 3e-2, ..."""
    return float(f"{10 ** (round(2 * math.log10(rate)) / 2 + (0.5 if up else -0.5)):.0e}")


def choose(base: str, experiments: list[Experiment], results: Path) -> None:
    """
    Writes the rates into the experiments, and beside them what the untuned base knew before.

    Raises:
        StudyError: If a search is not done, or test pictures have been looked at.
    """
    if any((results / base / FINAL).glob("*.json")):
        raise StudyError(
            f"The rates of base {base} have been chosen: {results / base / FINAL} has results by them. For another "
            "study, choose another --results."
        )
    for experiment in experiments:
        if missing := next_runs(base, experiment, results):
            raise StudyError(f"No rate can be chosen for {experiment.name}: a run is missing ({missing[0]}).")
    for experiment in experiments:
        losses = losses_by_rate(base, experiment, results)
        if experiment.name == UNTUNED:
            experiment.choose(0.0, {"by": "nothing is trained"})
            write_json(_known_file(experiment.folder.parents[1]), known_before(base, results))
        else:
            by = {f"{rate:g}": loss if math.isfinite(loss) else "diverged" for rate, loss in losses.items()}
            experiment.choose(best_rate(losses), {"by": CRITERION, "losses": by})


def known_before(base: str, results: Path) -> dict[str, dict[str, Any]]:
    """For each instruction: what the untuned base gets on validation pictures, chance, whether it knew it before."""
    searches = [
        json.loads(file.read_text())["train_info"]["metrics"]["instructions"]
        for file in sorted((results / base / SEARCH).glob(f"{UNTUNED.replace('/', '--')}--*.json"))
    ]
    known = {}
    for name, answers in searches[0].items():
        accuracy = mean(balanced_accuracy(search[name], "likeliest") for search in searches)
        by_chance = chance(answers)
        limit = by_chance + KNOWN_BEFORE * (1 - by_chance)
        known[name] = {"untuned": round(accuracy, 4), "chance": by_chance, "known_before": accuracy > limit}
    return known


def read_known(folder: Path) -> dict[str, dict[str, Any]]:
    """What [`choose`] has written beside the experiments of a base."""
    return json.loads(_known_file(folder).read_text())


def _known_file(folder: Path) -> Path:
    return folder / "known_before.json"


def refuse_unless_chosen(experiments: list[Experiment]) -> None:
    """
    Raises:
        StudyError: If a test picture would be looked at before all rates are chosen and committed.
    """
    unchosen = [experiment.name for experiment in experiments if experiment.training.chosen is None]
    if unchosen:
        raise StudyError(
            f"Test pictures are not looked at before rates are chosen: {', '.join(unchosen)} in "
            f"{experiments[0].folder.parents[1]} say nothing of how theirs was. Do `choose` and commit it."
        )
    folder = experiments[0].folder.parents[1]
    status = subprocess.run(
        ["git", "-C", str(folder), "status", "--porcelain", "--", "."], capture_output=True, text=True
    )
    if status.returncode == 0 and status.stdout.strip():
        raise StudyError(
            f"Test pictures are not looked at before rates are committed: {folder} has changes that are not:\n"
            f"{status.stdout.rstrip()}"
        )
