"""Pictures of a study: accuracy with intervals, learning against forgetting, parameters against accuracy."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


matplotlib.use("Agg")

# A mean with its interval.
Estimate = tuple[float, float, float]
MARKERS = "osD^v"
LEARNED = "right answers to tuned instructions (balanced)"


def accuracies(learned: dict[str, Estimate], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(learned)), layout="constrained")
    methods = sorted(learned, key=lambda method: learned[method][0])
    for row, method in enumerate(methods):
        value, low, high = learned[method]
        axes.plot([low, high], [row, row], color="#80868b")
        axes.plot(value, row, "o", color="#1a5fb4")
    axes.set_yticks(range(len(methods)), methods)
    axes.set_xlabel(f"{LEARNED}, with 95% intervals")
    _save(file)


def trade_off(learned: dict[str, Estimate], forgotten: dict[str, Estimate], name: str, file: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    points = {method: (forgotten[method][0], learned[method][0]) for method in learned}
    _scatter(axes, points)
    front = sorted(points[method] for method in pareto(points))
    axes.plot(*zip(*front), color="#1e7b34", drawstyle="steps-post", label="none is better in both", zorder=1)
    _name_points(axes)
    # Broken language models are far from all others.
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel(f"{name}: lower is less forgotten")
    axes.set_ylabel(LEARNED)
    _save(file)


def pareto(points: dict[str, tuple[float, float]]) -> list[str]:
    """Those of which no other has forgotten less and learned more."""

    def is_beaten(forgotten: float, learned: float) -> bool:
        return any(x <= forgotten and y >= learned and (x, y) != (forgotten, learned) for x, y in points.values())

    return [method for method, point in points.items() if not is_beaten(*point)]


def sizes(learned: dict[str, Estimate], parameters: dict[str, int], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    _scatter(axes, {method: (parameters[method], learned[method][0]) for method in learned if parameters[method]})
    _name_points(axes)
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel(LEARNED)
    _save(file)


def _scatter(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Names the points in a legend, from the one that learned most on, since many lie close together."""
    methods = sorted(points, key=lambda method: -points[method][1])
    for place, method in enumerate(methods):
        # There are ten colors.
        axes.plot(*points[method], MARKERS[place // 10], color=f"C{place % 10}", label=method)


def _name_points(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)


def _save(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(file, dpi=120)
    plt.close()
