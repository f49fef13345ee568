"""
An attention module run the long way: on [prompts ; tokens], with the mask and the positions of the longer sequence.

What the package derives from code is found here in another way: from what a model did. The norm in front of an
attention is the module whose output was its input; where a rotation comes from, the module whose output it was.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import Cache

from peft_m2pt import M2PTAttention
from peft_m2pt.layers.connector import project


Call = tuple[nn.Module, tuple, dict[str, Any], Any]


def lengthened_output(
    model: nn.Module,
    module: M2PTAttention,
    args: tuple,
    kwargs: dict[str, Any],
    trace: list[Call],
    first: torch.Tensor | None,
) -> torch.Tensor:
    """
    The output that an adapted attention should have, given its arguments, all calls of modules before it, and which
    token of the text is the first of each sample.
    """
    attention = module.base_layer
    names = list(inspect.signature(type(attention).forward).parameters)[1:]
    arguments = {**dict(zip(names, args)), **kwargs}
    if "position_ids" not in names:
        # Where positions are not declared, they say where the keys are, or nothing.
        arguments.pop("position_ids", None)
    tokens = arguments[names[0]]
    prompts = _prompts(model, module, tokens, trace)
    is_textual = module.site.kind == "textual"
    num_tokens, n = tokens.shape[-2], len(prompts)
    if not is_textual or first is None:
        first = torch.zeros(len(tokens), dtype=torch.long)

    starts = [0]
    if arguments.get("cu_seqlens") is not None:
        # Several images in one sequence, of which each sees itself and the prompts.
        boundaries = arguments["cu_seqlens"].tolist()
        starts = boundaries[:-1]
        arguments["cu_seqlens"] = torch.tensor([b + n * i for i, b in enumerate(boundaries)], dtype=torch.int32)
        if isinstance(arguments.get("max_seqlen"), (int, torch.Tensor)):
            arguments["max_seqlen"] = arguments["max_seqlen"] + n
    insertion = _Insertion(starts, num_tokens, n)

    arguments[names[0]] = insertion(tokens, tokens.dim() - 2, prompts)
    for name in ("position_embeddings", "freqs_ci", "rotary_pos_emb"):
        if arguments.get(name) is not None:
            arguments[name] = _lengthened_rotation(arguments[name], insertion, tokens, trace, is_textual, first)
    if arguments.get("position_ids") is not None:
        arguments["position_ids"] = _lengthened_positions(arguments["position_ids"], insertion, is_textual, first)
    for name in ("attention_mask", "mask"):
        if name in names:
            arguments[name] = _lengthened_mask(arguments.get(name), insertion, attention, tokens)
    if arguments.get("prev_topk_indices") is not None:
        # All keys that are not behind the query, some of them several times.
        keys = torch.arange(num_tokens + n)
        selected = torch.minimum(keys[None], keys[:, None])
        arguments["prev_topk_indices"] = selected.expand(len(tokens), -1, -1)
    if "shared_kv_states" in arguments:
        arguments["shared_kv_states"] = {}
    for name, value in arguments.items():
        if isinstance(value, Cache):
            arguments[name] = None
    output = attention.forward(**arguments)
    output = output[0] if isinstance(output, tuple) else output
    return insertion.removed(output, output.dim() - 2)


class _Insertion:
    """Puts rows in front of each of several sequences, which lie one after the other."""

    def __init__(self, starts: list[int], num_tokens: int, num_rows: int) -> None:
        self.starts = starts
        self.ends = [*starts[1:], num_tokens]
        self.num_tokens = num_tokens
        self.num_rows = num_rows

    def __call__(self, tensor: torch.Tensor, axis: int, rows: torch.Tensor) -> torch.Tensor:
        shape = list(tensor.shape)
        shape[axis] = self.num_rows
        rows = rows.to(tensor.dtype).expand(shape)
        parts = []
        for start, end in zip(self.starts, self.ends):
            parts += [rows, tensor.narrow(axis, start, end - start)]
        return torch.cat(parts, dim=axis)

    def removed(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        parts = []
        for i, (start, end) in enumerate(zip(self.starts, self.ends)):
            parts.append(tensor.narrow(axis, start + (i + 1) * self.num_rows, end - start))
        return torch.cat(parts, dim=axis)

    def axis(self, tensor: torch.Tensor) -> int:
        """The axis of a tensor along which the tokens lie."""
        candidates = [tensor.dim() - 2, *range(tensor.dim())]
        return next((axis for axis in candidates if tensor.shape[axis] == self.num_tokens), candidates[0])


def _prompts(model: nn.Module, module: M2PTAttention, tokens: torch.Tensor, trace: list[Call]) -> torch.Tensor:
    """What the attention sees of the prompts, `(n, D)`."""
    rows = []
    if "default" in module.m2pt_prompt:
        rows.append(module.m2pt_prompt["default"].weight)
    if "default" in module.m2pt_interaction:
        # Interaction prompts go through the adapter's own connector, which the tests of the connector look into.
        rows.append(project(module.site.connector, module.m2pt_interaction["default"].weight, "default"))
    norm = _norm_in_front(_layer(model, module.site.path), tokens, trace)
    return norm(torch.cat(rows)) if norm is not None else torch.cat(rows)


def _layer(model: nn.Module, path: str) -> nn.Module:
    """The layer around an attention: an element of a list of modules."""
    parts = path.split(".")
    last_index = max(i for i, part in enumerate(parts) if part.isdigit())
    return model.get_submodule(".".join(parts[: last_index + 1]))


def _norm_in_front(layer: nn.Module, tokens: torch.Tensor, trace: list[Call]) -> nn.Module | None:
    """The norm in a layer which made the attention's input."""
    inside = {id(module) for module in layer.modules()}
    for caller, args, kwargs, output in reversed(trace):
        is_input = isinstance(output, torch.Tensor) and output.data_ptr() == tokens.data_ptr()
        if is_input and id(caller) in inside and "norm" in type(caller).__name__.lower():
            return caller
    return None


def _lengthened_rotation(
    rotation, insertion: _Insertion, tokens: torch.Tensor, trace: list[Call], is_textual: bool, first: torch.Tensor
):
    parts = rotation if isinstance(rotation, tuple) else (rotation,)
    if is_textual:
        of_rows = _rotation_of_rows(parts, insertion.num_rows, tokens, trace, first)
        parts = [part.expand(*part.shape[:-3], len(tokens), *part.shape[-2:]) for part in parts]
    else:
        values = (1, 0) if len(parts) == 2 else (1 if parts[0].is_complex() else 0,)
        of_rows = [torch.full((1,), value, dtype=part.dtype) for value, part in zip(values, parts)]
    lengthened = []
    for part, rows in zip(parts, of_rows):
        axis = insertion.axis(part)
        if part.shape[axis] != insertion.num_tokens:
            # It speaks of the patches alone, and so leaves all that stands in front of them as it is.
            lengthened.append(part)
            continue
        if not is_textual:
            rows = rows.reshape([1] * part.dim())
        lengthened.append(insertion(part, axis, rows))
    return tuple(lengthened) if isinstance(rotation, tuple) else lengthened[0]


def _rotation_of_rows(
    parts: tuple[torch.Tensor, ...], num_rows: int, tokens: torch.Tensor, trace: list[Call], first: torch.Tensor
):
    """Asks the module that made a rotation for that of the positions in front of the first tokens."""
    for caller, args, kwargs, output in reversed(trace):
        outputs = output if isinstance(output, tuple) else (output,)
        if "rot" in type(caller).__name__.lower() and any(out is parts[0] for out in outputs):
            names = list(inspect.signature(type(caller).forward).parameters)[1:]
            arguments = {**dict(zip(names, args)), **kwargs}
            arguments["position_ids"] = _in_front(arguments["position_ids"], num_rows, first)
            arguments[names[0]] = tokens
            rotation = caller(**arguments)
            return rotation if isinstance(rotation, tuple) else (rotation,)
    raise AssertionError("no module made the rotation of the tokens")


def _in_front(position_ids: torch.Tensor, num_rows: int, first: torch.Tensor) -> torch.Tensor:
    """The positions in front of the first tokens, where `position_ids` are those of all tokens."""
    position_ids = position_ids.expand(*position_ids.shape[:-2], len(first), -1)
    of_first = position_ids[..., torch.arange(len(first)), first]
    return of_first[..., None] + torch.arange(-num_rows, 0)


def _lengthened_positions(
    position_ids: torch.Tensor, insertion: _Insertion, is_textual: bool, first: torch.Tensor
) -> torch.Tensor:
    if is_textual:
        rows = _in_front(position_ids, insertion.num_rows, first)
        position_ids = position_ids.expand(*rows.shape[:-1], -1)
        return insertion(position_ids, position_ids.dim() - 1, rows)
    axis = insertion.axis(position_ids)
    return insertion(position_ids, axis, torch.zeros([1] * position_ids.dim(), dtype=position_ids.dtype))


def _lengthened_mask(mask, insertion: _Insertion, attention: nn.Module, tokens: torch.Tensor):
    """Every token sees the prompts. What the prompts see does not matter."""
    n, num_tokens = insertion.num_rows, insertion.num_tokens
    if mask is None:
        if not getattr(attention, "is_causal", False) or len(insertion.starts) > 1:
            return None
        hidden = torch.ones(num_tokens + n, num_tokens + n, dtype=torch.bool).triu(1)
        return torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(tokens.dtype).min)[None, None]
    if mask.dim() == 2:
        return torch.cat([torch.ones_like(mask[:, :1]).expand(-1, n), mask], dim=1)
    mask = mask.expand(*mask.shape[:-2], num_tokens, num_tokens)
    visible = torch.full((), mask.dtype == torch.bool, dtype=mask.dtype)
    rows = visible.expand(*mask.shape[:-2], n, num_tokens)
    mask = torch.cat([rows, mask], dim=-2)
    return torch.cat([visible.expand(*mask.shape[:-2], num_tokens + n, n), mask], dim=-1)
