"""The figure of the quickstart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from datasets import Dataset
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure


matplotlib.use("Agg")

BEFORE, AFTER = "#80868b", "#1a5fb4"
RIGHT, WRONG = "#1e7b34", "#c01c28"
NUM_IMAGES = 10


def plot(
    results: dict[str, Any], questions: Dataset, before: list[str], after: list[str], held_out: str, path: Path
) -> None:
    """
    Draws the first test images with the answers before and after tuning, the accuracies, and the loss.

    Args:
        results (`dict[str, Any]`):
            With the `accuracy` for each instruction, before and after, and the `loss` at each step.
        questions (`Dataset`):
            The questions.
        before (`list[str]`):
            Answers of the base model.
        after (`list[str]`):
            Answers of the tuned model.
        held_out (`str`):
            The held-out instruction.
        path (`Path`):
            The file to write.
    """
    rows = questions.add_column("before", before).add_column("after", after)
    figure = plt.figure(figsize=(10, 5.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[5, 6], hspace=0.06)
    plot_answers(top, rows, [rows[0]["instruction"], held_out])
    left, right = bottom.subplots(1, 2, width_ratios=[3, 2])
    plot_accuracy(left, results["accuracy"], held_out)
    plot_loss(right, results["loss"])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_answers(figure: SubFigure, rows: Dataset, instructions: list[str]) -> None:
    """Draws the first images and, below each, the answers to some instructions."""
    axes = figure.subplots(1, NUM_IMAGES)
    y = 1.15  # In heights of an image, below its upper edge.
    for instruction in instructions:
        asked = [row for row in rows if row["instruction"] == instruction][:NUM_IMAGES]
        for when, style in (("before", "normal"), ("after", "bold")):
            title = f"{instruction}   {when}" if when == "before" else when
            axes[0].text(-0.15, 1 - y, title, transform=axes[0].transAxes, ha="right", va="center", weight=style)
            for axis, row in zip(axes, asked):
                mark, color = ("✓", RIGHT) if row[when] == row["answer"] else ("✗", WRONG)
                answer = {"x": 0.5, "y": 1 - y, "s": f"{row[when]} {mark}", "color": color, "weight": style}
                axis.text(**answer, transform=axis.transAxes, ha="center", va="center", fontsize=9)
            y += 0.2
        y += 0.1
    for axis, row in zip(axes, asked):
        axis.imshow(row["image"], cmap="gray")
        axis.set_axis_off()
        axis.set_anchor("N")


def plot_accuracy(axis: Axes, accuracy: dict[str, dict[str, float]], held_out: str) -> None:
    """Draws a line from the accuracy before to that after tuning, for each instruction."""
    instructions = list(accuracy["before"])
    before, after = (
        [100 * accuracy[when][instruction] for instruction in instructions] for when in ("before", "after")
    )
    lines = range(len(instructions))
    axis.hlines(lines, before, after, color=BEFORE, linewidth=2, zorder=1)
    for values, color, name, offset in ((before, BEFORE, "before", -8), (after, AFTER, "after", 8)):
        axis.scatter(values, lines, color=color, s=45, label=name)
        for value, line in zip(values, lines):
            axis.annotate(
                f"{value:.0f}",
                (value, line),
                (offset, 0),
                textcoords="offset points",
                color=color,
                ha="right" if offset < 0 else "left",
                va="center",
            )
    labels = [f"{i}\n(zero-shot)" if i == held_out else i for i in instructions]
    axis.set_yticks(lines, labels)
    axis.set(xlim=(0, 108), title="Right answers on held-out images (%)")
    axis.invert_yaxis()
    axis.legend(loc="lower left", frameon=False)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.3)


def plot_loss(axis: Axes, loss: list[dict[str, float]]) -> None:
    axis.plot([entry["step"] for entry in loss], [entry["loss"] for entry in loss], color=AFTER)
    axis.set(title="Loss of the tuning", xlabel="step", ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
