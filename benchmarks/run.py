"""Runs all measurements of one set of dimensions."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from . import measure
from .methods import (
    Method,
    all_methods,
    base_model,
    copy_sharing_weights,
    growing_methods,
    lora,
    m2pt,
    prompts_only,
)
from .models import DIMS, Llava, QwenVL, make_hollow_model, make_inputs, make_model, pad


NUM_DECODED = 32

# Samples, and how many times as many text tokens as otherwise.
GROWTH = ((1, 1), (2, 1), (4, 1), (1, 8))


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def interleaved(calls: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """
    Takes measurements in turn, each time in another order, so that whatever disturbs the machine disturbs all alike.

    Args:
        calls (`dict[str, Callable[[], float]]`):
            What measures each method once.
        repeats (`int`):
            How often, besides a first time that does not count.

    Returns:
        `dict[str, list[float]]`: The measurements of each method, one for each repeat.
    """
    order = list(calls)
    shuffle = random.Random(0).shuffle
    for name in order:
        calls[name]()
    times: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            times[name].append(calls[name]())
    return times


def run(dims_name: str, device: str, repeats: int, loaded_dims: list[str]) -> dict[str, Any]:
    """
    Measures everything.

    Args:
        dims_name (`str`):
            Which of `DIMS`.
        device (`str`):
            "cpu", in float32, or "cuda", in bfloat16.
        repeats (`int`):
            Number of measurements of each time.
        loaded_dims (`list[str]`):
            The `DIMS` with which adapters are saved and loaded, on the CPU.

    Returns:
        `dict[str, Any]`: By name of the method: times in seconds, sizes in bytes, and operations.
    """
    dims = DIMS[dims_name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = make_model(dims, device, dtype)
    say(f"{dims_name}: {sum(parameter.numel() for parameter in base.parameters()) / 1e6:,.0f} million parameters")
    return {
        "sizes": {"batch_size": dims.batch_size, "length": dims.num_image_tokens + dims.num_text_tokens},
        "methods": measure_methods(dims, base, repeats),
        "growth": [
            measure_growth(dims, base, batch_size, factor * dims.num_text_tokens, repeats)
            for batch_size, factor in GROWTH
        ],
        "launch_bound": measure_launch_bound(device, dtype, repeats),
        "loading": {name: measure_loading(DIMS[name], name, repeats) for name in loaded_dims},
    }


def inputs_of(method: Method, dims: Llava | QwenVL, base: PreTrainedModel, *size: int) -> dict[str, torch.Tensor]:
    """The inputs of a method, for a base model. All methods see the same text and images."""
    return make_inputs(
        dims, *size, num_more_image_tokens=method.num_more_image_tokens, device=base.device.type, dtype=base.dtype
    )


def measure_methods(dims: Llava | QwenVL, base: PreTrainedModel, repeats: int) -> dict[str, dict[str, Any]]:
    """Times, memory and operations of every method."""
    methods, device = all_methods(dims), base.device.type
    results: dict[str, dict[str, Any]] = {method.name: {} for method in methods}
    models = {method.name: method.apply(base) for method in methods}
    inputs = {method.name: inputs_of(method, dims, base) for method in methods}
    steps = {
        method.name: measure.make_training_step(models[method.name], inputs[method.name])
        for method in methods
        if method.trains
    }
    timed = {
        "forward": {
            name: lambda name=name, model=model: measure.seconds(lambda: measure.forward(model, inputs[name]), device)
            for name, model in models.items()
        },
        "train": {name: lambda step=step: measure.seconds(step, device) for name, step in steps.items()},
        "decode": {
            name: lambda name=name, model=model: measure.decoding_seconds(model, inputs[name], NUM_DECODED)
            for name, model in models.items()
        },
        # Of few methods, since torch compiles the code of a model for a limited number of variants.
        "decode_compiled": {
            name: lambda name=name: measure.compiled_decoding_seconds(models[name], inputs[name], NUM_DECODED)
            for name in (method.name for method in (base_model(), lora(dims), m2pt(20, 10)))
        },
    }
    for quantity, calls in timed.items():
        say(quantity)
        for name, times in interleaved(calls, repeats).items():
            results[name][quantity] = times
    say("memory")
    for name, step in steps.items():
        results[name]["peak_bytes"] = measure.peak_bytes(step, device)
        results[name]["saved_bytes"] = measure.saved_bytes(models[name], inputs[name])
    if isinstance(dims, Llava):
        say("operations")
        on_meta = make_model(dims, "meta")
        for method in methods:
            flops = measure.forward_flops(method.apply(on_meta), dims, dims.batch_size)
            results[method.name]["flops"] = flops["Global"]
    return results


def measure_growth(
    dims: Llava | QwenVL, base: PreTrainedModel, batch_size: int, num_text_tokens: int, repeats: int
) -> dict[str, Any]:
    """The training step with more samples or longer sequences, of some methods."""
    device, length = base.device.type, dims.num_image_tokens + num_text_tokens
    say(f"{batch_size} samples of length {length}")
    steps = {
        method.name: measure.make_training_step(
            method.apply(base), inputs_of(method, dims, base, batch_size, num_text_tokens)
        )
        for method in growing_methods(dims)
    }
    calls = {name: lambda step=step: measure.seconds(step, device) for name, step in steps.items()}
    times = interleaved(calls, max(1, repeats // 2))
    methods = {
        name: {"train": times[name], "peak_bytes": measure.peak_bytes(step, device)} for name, step in steps.items()
    }
    return {"batch_size": batch_size, "length": length, "methods": methods}


def measure_launch_bound(device: str, dtype: torch.dtype, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Decoding where small operations and Python take most of a step: one sample, and a padded batch of four."""
    dims = DIMS["launch-bound"]
    say(f"decoding with {dims.text['num_hidden_layers']} narrow layers")
    base = make_model(dims, device, dtype)
    inputs = pad(make_inputs(dims, device=device, dtype=dtype))
    models = {method.name: method.apply(base) for method in (base_model(), lora(dims), m2pt(20, 10))}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = {
            quantity: interleaved(
                {
                    name: lambda model=model: measure.decoding_seconds(model, inputs, NUM_DECODED, num_samples)
                    for name, model in models.items()
                },
                repeats,
            )
            for quantity, num_samples in (("decode", 1), ("decode_padded", dims.batch_size))
        }
    finally:
        torch.set_num_threads(num_threads)
    return {name: {quantity: of_methods[name] for quantity, of_methods in times.items()} for name in models}


def measure_loading(dims: Llava | QwenVL, dims_name: str, repeats: int) -> dict[str, dict[str, Any]]:
    """Size of adapters, and how long it takes to load one onto a model that is there already."""
    say(f"adapters of {dims_name}")
    methods = [lora(dims), m2pt(20, 10), prompts_only(20, 10), m2pt(100, 100)]
    base = make_hollow_model(dims)
    with tempfile.TemporaryDirectory() as root:
        folders = {method.name: Path(root, str(i)) for i, method in enumerate(methods)}
        for method in methods:
            method.apply(base).save_pretrained(folders[method.name])
        calls = {
            name: lambda folder=folder: measure.loading_seconds(copy_sharing_weights(base), folder)
            for name, folder in folders.items()
        }
        times = interleaved(calls, repeats)
        return {
            name: {"adapter_bytes": measure.adapter_bytes(folder), "load": times[name]}
            for name, folder in folders.items()
        }
