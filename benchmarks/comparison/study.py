"""A study: which runs are missing, and doing them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from tqdm.auto import tqdm

from .choosing import choose, next_runs, refuse_unless_chosen
from .experiments import FOLDER, Experiment, experiments_of
from .folders import locked, write_json
from .run import FINAL, Run, run
from .tasks import Task


@dataclass(frozen=True)
class Study:
    """
    A study.

    Args:
        tasks (`dict[str, Task]`):
            The base models with their tasks, by name.
        results (`Path`):
            Where each run writes a file. It is not done again where that is.
        methods (`list[str]`, *optional*):
            Only these, "METHOD" or "METHOD/VARIANT".
        experiments (`Path`, *optional*):
            Where the experiments of all bases are.
        device (`str`, defaults to `"cpu"`):
            Where models compute: "cpu" or "cuda".
    """

    tasks: dict[str, Task]
    results: Path
    methods: tuple[str, ...] = ()
    experiments: Path = FOLDER
    device: str = "cpu"

    def search(self) -> None:
        """Tries learning rates, more of them where the best one lies at an end."""
        self._do(lambda: [run for base in self.tasks for one in self.of(base) for run in self._next(base, one)])

    def _next(self, base: str, experiment: Experiment) -> list[Run]:
        return next_runs(base, experiment, self.results)

    def choose(self) -> None:
        """Writes down the learning rates."""
        for base in self.tasks:
            choose(base, self.of(base), self.results)

    def final(self) -> None:
        """Tests each method at its learning rate, all of them with a seed before the next."""
        for base in self.tasks:
            # All of them, whichever are run: what is not chosen could be chosen by what the others got.
            refuse_unless_chosen(experiments_of(base, folder=self.experiments))
        self._do(lambda: [run for run in self.finals() if not run.file(self.results).exists()])

    def finals(self) -> list[Run]:
        runs = [
            Run(base, one.name, FINAL, one.training.lr, seed)
            for base in self.tasks
            for one in self.of(base)
            for seed in one.training.seeds
        ]
        return sorted(runs, key=lambda run: (run.base, run.seed))

    def of(self, base: str) -> list[Experiment]:
        """The experiments of a base that were asked for."""
        return experiments_of(base, self.methods, self.experiments)

    def _do(self, missing: Callable[[], list[Run]]) -> None:
        with tqdm(unit="run", dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 60) as bar:
            while runs := missing():
                with self._claimed(runs) as one:
                    if one is None:
                        return
                    bar.total = bar.n + len(runs)
                    bar.set_postfix_str(f"{self._estimate(runs)}: {one}")
                    self._do_one(one, bar)
                    bar.update()

    @contextmanager
    def _claimed(self, runs: list[Run]) -> Iterator[Run | None]:
        """The first of the runs that no other process is doing, kept from others meanwhile. `None`: there is none."""
        for one in runs:
            with locked(one.file(self.results).with_suffix(".lock")) as is_mine:
                # Another process may have done it since these were listed.
                if is_mine and not one.file(self.results).exists():
                    yield one
                    return
        yield None

    def _do_one(self, settings: Run, bar: tqdm) -> None:
        [experiment] = experiments_of(settings.base, [settings.method], self.experiments)

        def say(how_far: str) -> None:
            bar.set_description_str(how_far, refresh=False)
            # Shows it, if the last time was long enough ago.
            bar.update(0)

        result = run(settings, self.tasks[settings.base], experiment, self.device, say)
        write_json(settings.file(self.results), result)
        losses = result["train_info"]["losses"][-25:]
        tqdm.write(
            f"{settings}: {result['run_info']['total_time']:.0f} s"
            + (f", last loss {mean(losses):.3f}" if losses else ""),
        )

    def _estimate(self, runs: list[Run]) -> str:
        """What is left, by the runs of the same method, or else of the same kind, that were done."""
        times = list(self._times())
        seconds = 0.0
        for one in runs:
            same_kind = [(done, time) for done, time in times if (done.base, done.kind) == (one.base, one.kind)]
            same = [time for done, time in same_kind if done.method == one.method]
            if not same_kind:
                return "time unknown so far"
            seconds += mean(same or [time for _, time in same_kind])
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min left"

    def _times(self) -> Iterator[tuple[Run, float]]:
        for file in self.results.glob("*/*/*.json"):
            info = json.loads(file.read_text())["run_info"]
            fields = {name: info[name] for name in Run.__dataclass_fields__}
            yield Run(**fields), info["total_time"]
