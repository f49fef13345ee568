"""A table of what an adapter adds to a model, for people to read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .connector import M2PTConnector
from .layer import M2PTAttention


COLUMNS = ("adapter", "part", "module", "layers", "tokens", "parameters", "share", "gradient norm")
NUM_TEXT_COLUMNS = 4


def describe(model: nn.Module, active_adapters: Sequence[str]) -> str:
    """
    Describes the prompts of a model, and what else is trained with them.

    Args:
        model (`nn.Module`):
            A model with prompts.
        active_adapters (`Sequence[str]`):
            Names of the active adapters, which are marked with a star.

    Returns:
        `str`: A table with a row for each adapter and part of the model. The share is that of all parameters; the
        norm of the gradients is shown after a backward pass.
    """
    layers: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    parameters: dict[tuple[str, ...], list[nn.Parameter]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, M2PTAttention):
            for part, prompts in ((module.site.kind, module.m2pt_prompt), ("interaction", module.m2pt_interaction)):
                for adapter, prompt in prompts.items():
                    row = (adapter, part, _any_layer(name))
                    rows = 1 if part != "interaction" else module.site.connector.rows_per_token
                    layers.setdefault(row, []).append((module.site.layer, prompt.num_tokens // rows))
                    parameters[row] += prompt.parameters()
        elif isinstance(module, M2PTConnector):
            for layer_name in module.adapter_layer_names:
                part = "interaction" if layer_name == "m2pt_interaction" else "connector"
                for adapter, child in getattr(module, layer_name).items():
                    parameters[adapter, part, name] += child.parameters()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            for adapter, child in getattr(module, "modules_to_save", {}).items():
                parameters[adapter, "modules_to_save", name] += child.parameters()

    total = sum(map(_count, model.parameters()))
    table = [COLUMNS]
    for row, group in parameters.items():
        adapter, part, module_path = row
        indices = [layer for layer, _ in layers.get(row, [])]
        tokens = sorted({num_tokens for _, num_tokens in layers.get(row, [])})
        star = "*" if adapter in active_adapters else ""
        tokens = ", ".join(map(str, tokens))
        table.append((adapter + star, part, module_path, _ranges(indices), tokens, *_amounts(group, total)))
    everything = [parameter for group in parameters.values() for parameter in group]
    table.append(("", "total", "", "", "", *_amounts(everything, total)))
    return _format(table)


def _any_layer(path: str) -> str:
    """Puts a star for the layer: `layers.3.self_attn` becomes `layers.*.self_attn`."""
    parts = path.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join("*" if i == first else part for i, part in enumerate(parts))


def _ranges(numbers: Iterable[int]) -> str:
    """Writes `[0, 1, 2, 5]` as `0-2, 5`."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def _count(parameter: nn.Parameter) -> int:
    """The number of weights. bitsandbytes packs two of 4 bits into a byte."""
    is_packed = type(parameter).__name__ == "Params4bit"
    return 2 * parameter.numel() * parameter.element_size() if is_packed else parameter.numel()


def _amounts(parameters: list[nn.Parameter], total: int) -> tuple[str, str, str]:
    count = sum(parameter.numel() for parameter in parameters)
    gradients = [parameter.grad.float().norm() for parameter in parameters if parameter.grad is not None]
    norm = f"{torch.stack(gradients).norm().item():.3g}" if gradients else "-"
    return f"{count:,}", f"{count / total:.4%}", norm


def _format(table: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if i < NUM_TEXT_COLUMNS else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
