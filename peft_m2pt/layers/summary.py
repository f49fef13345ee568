"""The table of what adapters add to a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..anatomy.compiled import plain
from .attention import M2PTAttention
from .connector import M2PTConnector


COLUMNS = ("adapter", "part", "module", "layers", "tokens", "parameters", "share", "gradient norm")


def describe(model: nn.Module, active_adapters: Sequence[str]) -> str:
    """
    Describes the prompts of a model, and what else is trained with them.

    Args:
        model (`nn.Module`):
            A model with prompts.
        active_adapters (`Sequence[str]`):
            Names of the active adapters, which are marked with a star.

    Returns:
        `str`: A table with a row for each adapter and part of the model. The gradient norm is shown after a backward
        pass.
    """
    parts = list_trained(model)
    total = count_parameters(model.parameters())
    table = [COLUMNS]
    for part in parts:
        star = "*" if part.adapter in active_adapters else ""
        amounts = (f"{part.size:,}", f"{part.size / total:.4%}", _gradient_norm(part.parameters))
        table.append((part.adapter + star, part.name, part.module, part.layers, part.tokens, *amounts))
    size = sum(part.size for part in parts)
    norm = _gradient_norm([parameter for part in parts for parameter in part.parameters])
    table.append(("", "total", "", "", "", f"{size:,}", f"{size / total:.4%}", norm))
    return format_table(table, num_text_columns=4)


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """
    Counts parameters, which may be partitioned by DeepSpeed or packed by bitsandbytes.

    Returns:
        `int`: The number of elements.
    """
    return sum(map(_num_elements, parameters))


def _num_elements(parameter: nn.Parameter) -> int:
    # bitsandbytes packs two 4-bit weights into a byte.
    is_packed = type(parameter).__name__ == "Params4bit"
    num_elements = 2 * parameter.numel() * parameter.element_size() if is_packed else parameter.numel()
    return getattr(parameter, "ds_numel", num_elements)


@dataclass(frozen=True)
class TrainedPart:
    """What an adapter trains in one part of a model. Layers and prompts per layer are formatted, and may be empty."""

    adapter: str
    name: str
    module: str
    layers: str
    tokens: str
    parameters: list[nn.Parameter]

    @property
    def size(self) -> int:
        return count_parameters(self.parameters)


def list_trained(model: nn.Module) -> list[TrainedPart]:
    """
    Lists what the adapters of a model train.

    Returns:
        `list[TrainedPart]`: One entry for each adapter and part of the model.
    """
    layers: dict[tuple[str, ...], list[int]] = defaultdict(list)
    tokens: dict[tuple[str, ...], set[int]] = defaultdict(set)
    parameters: dict[tuple[str, ...], list[nn.Parameter]] = defaultdict(list)
    for name, module in model.named_modules():
        name = plain(name)
        if isinstance(module, M2PTAttention):
            for part, prompts in ((module.site.kind, module.m2pt_prompt), ("interaction", module.m2pt_interaction)):
                for adapter, prompt in prompts.items():
                    row = (adapter, part, star_layer(name))
                    rows = 1 if part != "interaction" else module.site.connector.rows_per_token
                    layers[row].append(module.site.layer)
                    tokens[row].add(prompt.num_tokens // rows)
                    parameters[row] += prompt.parameters()
        elif isinstance(module, M2PTConnector):
            for layer_name in module.adapter_layer_names:
                part = "interaction" if layer_name == "m2pt_interaction" else "connector"
                for adapter, child in getattr(module, layer_name).items():
                    if part == "interaction":
                        tokens[adapter, part, name].add(child.num_tokens // (module.site.rows_per_token or 1))
                    parameters[adapter, part, name] += child.parameters()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            for adapter, child in getattr(module, "modules_to_save", {}).items():
                parameters[adapter, "modules_to_save", name] += child.parameters()
    return [
        TrainedPart(*row, format_ranges(layers[row]), ", ".join(map(str, sorted(tokens[row]))), group)
        for row, group in parameters.items()
    ]


def star_layer(path: str) -> str:
    """Replaces the index of the layer: `layers.3.self_attn` becomes `layers.*.self_attn`."""
    parts = path.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join("*" if i == first else part for i, part in enumerate(parts))


def format_ranges(numbers: Iterable[int]) -> str:
    """Formats `[0, 1, 2, 5]` as `0-2, 5`."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def _gradient_norm(parameters: list[nn.Parameter]) -> str:
    norms = [parameter.grad.float().norm() for parameter in parameters if parameter.grad is not None]
    return f"{torch.stack([norm.to(norms[0].device) for norm in norms]).norm().item():.3g}" if norms else "-"


def format_table(table: Sequence[tuple[str, ...]], num_text_columns: int) -> str:
    """
    Aligns the columns of a table.

    Args:
        table (`Sequence[tuple[str, ...]]`):
            Its rows, the header first.
        num_text_columns (`int`):
            Number of left-aligned columns. The rest are numbers, and right-aligned.
    """
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if i < num_text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
