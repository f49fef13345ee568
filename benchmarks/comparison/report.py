"""Puts a study into tables and pictures: `REPORT.md` in the folder of a base's results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import numpy as np

from . import plots
from .choosing import UNTUNED, losses_by_rate, read_known
from .contrasts import CONTRASTS, CONTROLLED
from .experiments import experiments_of
from .folders import write_text
from .intervals import holm, interval, p_value, resampled_means
from .measures import (
    KNOWN,
    KNOWN_ENTROPY,
    PLAIN_TEXT,
    Measure,
    Result,
    accuracy,
    instructions_of,
    one_instruction,
    paired,
    read,
    seed_of,
)
from .refusals import StudyError
from .scores import balanced_accuracy, blind_accuracy, chance, shuffled_accuracy
from .study import Study


def write(study: Study) -> Path:
    """
    Writes the reports of the bases of a study. Returns the last one.

    Raises:
        StudyError: If there is nothing to report.
    """
    for base in study.tasks:
        results = read(study.results, base)
        if UNTUNED not in results:
            raise StudyError(f"There is nothing to report of base {base}: {study.results} has no run of {UNTUNED}.")
        file = study.results / base / "REPORT.md"
        write_text(file, Report(study, base, results).text())
    return file


class Report:
    """
    The report of a base.

    Args:
        study ([`Study`]):
            The study.
        base (`str`):
            The base.
        results (`dict[str, list]`):
            Results of final runs, by method.
    """

    def __init__(self, study: Study, base: str, results: dict[str, list[Result]]) -> None:
        self.study, self.base, self.results = study, base, results
        self.task = study.tasks[base]
        self.experiments = experiments_of(base, folder=study.experiments)
        known = read_known(study.experiments / base)
        held_out = {one.name for one in self.task.instructions if one.level in ("L1", "L2", "L3")}
        self.left_out = frozenset(name for name in held_out if known[name]["known_before"])
        self.known_before = known
        self.learned = accuracy("tuned", "tuned")
        levels = sorted({one.level for one in self.task.instructions if one.name not in self.left_out} - {"tuned"})
        self.levels = [accuracy(level, level, leave_out=self.left_out) for level in levels]
        counted = [level for level in levels if level != "L4"]
        self.held_out = [accuracy("held out", *counted, leave_out=self.left_out)] if counted else []
        self.forgotten = PLAIN_TEXT if self.task.plain_text else KNOWN_ENTROPY

    def text(self) -> str:
        folder = self.study.results / self.base
        learned = {method: self._estimate(self.learned, runs) for method, runs in self.results.items()}
        forgotten = {method: self._estimate(self.forgotten, runs) for method, runs in self.results.items()}
        sizes = {method: runs[0]["train_info"]["num_trainable_params"] for method, runs in self.results.items()}
        plots.accuracies(learned, folder / "accuracy.png")
        plots.trade_off(learned, forgotten, self.forgotten.name, folder / "forgetting.png")
        plots.sizes(learned, sizes, folder / "parameters.png")
        sections = {
            "Results": self._results(),
            "Contrasts": self._contrasts(),
            "Every seed": self._seeds(),
            "Instructions": self._instructions(),
            "Controls": self._controls(),
            "Rates": self._rates(),
            "Costs": self._costs(),
        }
        pictures = "\n".join(f"![]({name}.png)" for name in ("accuracy", "forgetting", "parameters"))
        return f"# Base {self.base}\n\n{pictures}\n" + "".join(f"\n## {t}\n\n{x}\n" for t, x in sections.items())

    def _measures(self) -> list[Measure]:
        first = self.task.tuned[0].name
        names = [one_instruction(first, by) for by in ("said", "likeliest")]
        text = [PLAIN_TEXT] if self.task.plain_text else []
        return [self.learned, *names, *self.held_out, *self.levels, KNOWN, KNOWN_ENTROPY, *text]

    def _means(self, values: np.ndarray) -> np.ndarray:
        return resampled_means(values, self.task.fixed_test)

    def _estimate(self, measure: Measure, runs: list[Result]) -> tuple[float, float, float]:
        values = measure.values(runs)
        return float(values.mean()), *interval(self._means(values))

    def _results(self) -> str:
        measures = self._measures()
        rows = []
        for method, runs in self.results.items():
            info = runs[0]["train_info"]
            cells = [_with_half_width(*self._estimate(measure, runs)) for measure in measures]
            size = f"{info['num_trainable_params']:,}"
            rows.append([method, f"{runs[0]['run_info']['lr']:g}", str(len(runs)), size, *cells])
        rows.sort(key=lambda row: float(row[4].split()[0]), reverse=True)
        note = "Means and half of the width of 95% intervals. Shares are of right answers word for word, balanced."
        return f"{note}\n\n" + table(["method", "rate", "seeds", "parameters", *(one.name for one in measures)], rows)

    def _contrasts(self) -> str:
        found = []
        for contrast in CONTRASTS[self.base]:
            if contrast.method in self.results and contrast.reference in self.results:
                one, other = paired(self.results[contrast.method], self.results[contrast.reference])
                for measure in (self.learned, *self.held_out, self.forgotten):
                    difference = measure.values(one) - measure.values(other)
                    found.append((contrast, measure, len(one), difference.mean(), self._means(difference)))
        corrected = holm([p_value(means) for *_, means in found])
        rows = [
            [
                contrast.question,
                f"{contrast.method} less {contrast.reference}",
                measure.name,
                str(number),
                f"{value:+.3f}",
                "{:+.3f} to {:+.3f}".format(*interval(means)),
                f"{p:.4f}",
            ]
            for (contrast, measure, number, value, means), p in zip(found, corrected)
        ]
        return table(["question", "difference", "measure", "seeds", "mean", "95% interval", "p (Holm)"], rows)

    def _seeds(self) -> str:
        seeds = sorted({seed_of(run) for runs in self.results.values() for run in runs})
        rows = []
        for method, runs in self.results.items():
            for measure in (self.learned, *self.held_out, self.forgotten):
                by_seed = {seed_of(run): f"{measure.of(run).mean():.3f}" for run in runs}
                rows.append([method, measure.name, *(by_seed.get(seed, "") for seed in seeds)])
        return table(["method", "measure", *map(str, seeds)], rows)

    def _instructions(self) -> str:
        methods = list(self.results)
        rows = []
        for one in self.task.instructions:
            answers = [
                [instructions_of(run, (one.level,))[one.name] for run in runs] for runs in self.results.values()
            ]
            known = self.known_before.get(one.name)
            before = (
                ""
                if known is None
                else f"{known['untuned']:.2f}" + (" (left out)" if one.name in self.left_out else "")
            )
            cells = [f"{mean(balanced_accuracy(each) for each in every):.3f}" for every in answers]
            rows.append([one.name, one.level, f"{chance(answers[0][0]):.2f}", before, *cells])
        return table(["instruction", "level", "chance", "base, likeliest, validation", *methods], rows)

    def _controls(self) -> str:
        kinds = {"its picture": balanced_accuracy, "another picture": shuffled_accuracy, "no picture": blind_accuracy}
        rows = []
        for method in (method for method in CONTROLLED if method in self.results):
            every = [one for run in self.results[method] for one in instructions_of(run, ("tuned",)).values()]
            rows.append([method, *(f"{mean(score(one) for one in every):.3f}" for score in kinds.values())])
        tuned = instructions_of(self.results[UNTUNED][0], ("tuned",)).values()
        rows.append(["chance", *[f"{mean(map(chance, tuned)):.3f}"] * 3])
        return table(["method, tuned instructions", *kinds], rows)

    def _rates(self) -> str:
        rows = []
        every = {one.name: losses_by_rate(self.base, one, self.study.results) for one in self.experiments}
        rates = sorted({rate for losses in every.values() for rate in losses if rate})
        for experiment in self.experiments:
            losses, lr = every[experiment.name], experiment.training.lr
            if experiment.name != UNTUNED:
                cells = [f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates]
                rows.append([experiment.name, *(f"**{c}**" if rate == lr else c for rate, c in zip(rates, cells))])
        note = "Cross-entropy of right answers on validation pictures, by rate. Those of chosen rates are bold."
        return f"{note}\n\n" + table(["method", *(f"{rate:g}" for rate in rates)], rows)

    def _costs(self) -> str:
        files = sorted((self.study.results / self.base / "costs").glob("*.json"))
        measured = [json.loads(file.read_text()) for file in files]
        rows = [
            [c["method"], f"{c['seconds']:.2f}", f"{c['peak_bytes'] / 1e6:,.0f}", f"{c['file_bytes'] / 1e6:,.2f}"]
            for c in measured
        ]
        return table(["method", "seconds of a step", "memory that training adds, MB", "file, MB"], rows)


def _with_half_width(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ± {(high - low) / 2:.3f}"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
