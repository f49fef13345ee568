"""What the measurements say: ratios, aims, a table and a plot."""

from __future__ import annotations

import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt

from .methods import NUMBERS


matplotlib.use("Agg")

LORA = "LoRA r=8"
BLUE, GREY, RED, GREEN = "#1a5fb4", "#80868b", "#c01c28", "#1e7b34"


def describe_machine(device: str) -> dict[str, str]:
    """Hardware and versions."""
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"hardware": _hardware(device), "python": platform.python_version(), **versions}


def _hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.machine()
    return f"{torch.get_num_threads()} threads of {name}"


def ratios(times: list[float], reference: list[float]) -> tuple[float, float, float]:
    """Lowest, median and highest ratio to what was measured in the same round."""
    return _spread([time / other for time, other in zip(times, reference, strict=True)])


def _spread(values: list[float]) -> tuple[float, float, float]:
    return min(values), median(values), max(values)


def compare(methods: dict[str, dict[str, Any]], name: str, quantity: str, reference: str) -> Any:
    """Ratios of times as lowest, median and highest, those of sizes as a number, `None` for what was not measured."""
    value, other = methods[name].get(quantity), methods[reference].get(quantity)
    if value is None or other is None:
        return None
    return ratios(value, other) if isinstance(value, list) else value / other


TITLES = {
    "forward": "forward",
    "decode": "decoding",
    "decode_compiled": "compiled decoding",
    "decode_padded": "decoding four padded samples",
    "train": "training step",
    "peak_bytes": "peak memory",
    "saved_bytes": "activations",
}

# Quantity, what it is compared with, and the title of its column.
COLUMNS = (
    ("forward", "base", "forward / base"),
    ("flops", "base", "operations / base"),
    ("decode", "base", "decoding / base"),
    ("decode_compiled", "base", "compiled decoding / base"),
    ("train", LORA, "training step / LoRA"),
    ("peak_bytes", LORA, "peak memory / LoRA"),
    ("saved_bytes", LORA, "activations / LoRA"),
)


def list_aims(results: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What is aimed at, the ratio or the seconds measured (of times the median), and the limit."""
    methods = results["methods"]
    aims = []
    for kind in ("", ", prompts only"):
        few, many = (f"M2PT {numbers}{kind}" for numbers in NUMBERS[:2])
        wanted = [
            (few, "forward", "base", 1.03),
            (few, "decode", "base", 1.015),
            (few, "decode_compiled", "base", 1.02),
            (few, "train", LORA, 1.03),
            (few, "peak_bytes", LORA, 1.0),
            (few, "saved_bytes", LORA, 1.0),
            (many, "train", f"lengthening {NUMBERS[1]}{kind}", 0.75),
        ]
        for name, quantity, reference, limit in wanted:
            if reference in methods:
                value = compare(methods, name, quantity, reference)
                if value is None:
                    continue
                value = value[1] if isinstance(value, tuple) else value
                aims.append((f"{name}: {TITLES[quantity]} / {reference}", value, limit))
    few, narrow = f"M2PT {NUMBERS[0]}", results["launch_bound"]
    for quantity, limit in (("decode", 1.12), ("decode_padded", 1.15)):
        _, middle, _ = compare(narrow, few, quantity, "base")
        _, _, highest = compare(narrow, few, quantity, LORA)
        aims.append((f"launch-bound, {few}: {TITLES[quantity]} / base", middle, limit))
        aims.append((f"launch-bound, {few}: {TITLES[quantity]} / {LORA}, highest", highest, 1.0))
    for dims, adapters in results["loading"].items():
        for name, adapter in adapters.items():
            if name.startswith("M2PT"):
                aims.append((f"{name}: seconds to load with the dimensions of {dims}", median(adapter["load"]), 2.0))
    return aims


def make_markdown(results: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    machine, methods, sizes = results["machine"], results["methods"], results["sizes"]
    base, lora = methods["base"], methods[LORA]
    lines = [
        f"# {results['dims']}, {results['date']}",
        "",
        f"{machine['hardware']}, {results['dtype']}; Python {machine['python']}, "
        + ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft"))
        + ".",
        "",
        f"{sizes['batch_size']} samples of length {sizes['length']} in a batch; {results['repeats']} repeats. "
        "Ratios to what was measured in the same round: median (lowest to highest).",
        "",
        f"The base model: forward {median(base['forward']):.3f} s, decoding {1e3 * median(base['decode']):.1f} ms for "
        f"each token. LoRA: training step {median(lora['train']):.3f} s, peak memory beyond weights and optimiser "
        f"{lora['peak_bytes'] / 1e6:,.0f} MB, activations {lora['saved_bytes'] / 1e6:,.0f} MB.",
        "",
    ]
    rows = [
        [name, *(_format(compare(methods, name, quantity, reference)) for quantity, reference, _ in COLUMNS)]
        for name in methods
    ]
    lines += _table(["", *(title for _, _, title in COLUMNS)], rows)
    lines += ["", "## Aims", ""]
    rows = [
        [aim, f"{value:.3f}", f"at most {limit:g}", "yes" if value <= limit else "**no**"]
        for aim, value, limit in list_aims(results)
    ]
    lines += _table(["aim", "measured", "limit", "met"], rows)
    narrow = results["launch_bound"]
    lines += [
        "",
        "## Launch-bound",
        "",
        "Decoding with 24 narrow layers and one thread, where small operations and Python take most of a step: "
        f"{1e6 * median(narrow['base']['decode']) / 24:.0f} us for a layer of the base model. Ratios to the latter.",
        "",
    ]
    quantities = ("decode", "decode_padded")
    rows = [[name, *(_format(compare(narrow, name, quantity, "base")) for quantity in quantities)] for name in narrow]
    lines += _table(["launch-bound", *(TITLES[quantity] for quantity in quantities)], rows)
    lines += ["", "## Growth", "", "Seconds of a training step (median), and peak memory in MB.", ""]
    names = list(results["growth"][0]["methods"])
    rows = [
        [
            f"{size['batch_size']} x {size['length']}",
            *(
                f"{median(size['methods'][name]['train']):.3f} s, {size['methods'][name]['peak_bytes'] / 1e6:,.0f} MB"
                for name in names
            ),
        ]
        for size in results["growth"]
    ]
    lines += _table(["samples x length", *names], rows)
    lines += [
        "",
        "## Adapters",
        "",
        "Size of the file, and seconds to load it onto a model that is there already.",
        "",
    ]
    rows = [
        [dims, name, f"{adapter['adapter_bytes'] / 1e6:,.1f} MB", f"{_format(_spread(adapter['load']))} s"]
        for dims, adapters in results["loading"].items()
        for name, adapter in adapters.items()
    ]
    lines += _table(["dimensions", "adapter", "size", "load"], rows)
    return "\n".join(lines) + "\n"


def _format(value: float | tuple[float, float, float] | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return f"{value[1]:.2f} ({value[0]:.2f} to {value[2]:.2f})"
    return f"{value:.3f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws the ratios, and how the training step grows with samples and length."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 5.2), layout="constrained")
    methods = results["methods"]
    _bars(left, methods, "forward", "base", "Forward / base model")
    _bars(middle, methods, "train", LORA, "Training step / LoRA")
    sizes = [f"{size['batch_size']} x {size['length']}" for size in results["growth"]]
    for name, colour in zip(results["growth"][0]["methods"], (GREY, BLUE, GREEN, RED)):
        times = [median(size["methods"][name]["train"]) for size in results["growth"]]
        right.plot(sizes, times, "o--", color=colour, label=name)
    right.set_title("Training step, seconds")
    right.set_xlabel("samples x length")
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axes: plt.Axes, methods: dict[str, dict[str, Any]], quantity: str, reference: str, title: str) -> None:
    names = [name for name in methods if quantity in methods[name]][::-1]
    values = [compare(methods, name, quantity, reference) for name in names]
    errors = [[middle - low for low, middle, _ in values], [high - middle for _, middle, high in values]]
    colours = [BLUE if name.startswith("M2PT") else GREY for name in names]
    axes.barh(names, [middle for _, middle, _ in values], xerr=errors, color=colours, ecolor="black", capsize=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_title(title)


def write(results: dict[str, Any], folder: Path) -> Path:
    """
    Writes the measurements, the table and the plot.

    Args:
        results (`dict[str, Any]`):
            What was measured.
        folder (`Path`):
            Where to.

    Returns:
        `Path`: The table. The other files have its name, with other suffixes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = re.findall(r"[a-z0-9]+", results["machine"]["hardware"].lower())
    table = folder / f"{results['date']}-{results['dims']}-{'-'.join(words)}.md"
    table.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, table.with_suffix(".png"))
    table.write_text(f"{make_markdown(results)}\n![Ratios, and growth]({table.with_suffix('.png').name})\n")
    return table
