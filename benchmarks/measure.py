"""What is measured of one model."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import CompileConfig
from transformers.generation.streamers import BaseStreamer

from .models import Llava


def forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """A forward pass without gradients."""
    with torch.no_grad():
        model(**without_labels(inputs))


def make_training_step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Returns what a step of the training does: forward, backward, AdamW. No cache is made, as trainers have it."""
    optimiser = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)

    def step() -> None:
        model.train()
        model(**inputs, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        model.eval()

    return step


def without_labels(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if name != "labels"}


def seconds(function: Callable[[], None], device: str) -> float:
    """How long a call takes."""
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Stopwatch(BaseStreamer):
    """Records when `generate` hands over each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


# What compiles decoding.
BACKEND = "inductor"


def decoding_seconds(
    model: nn.Module, inputs: dict[str, torch.Tensor], num_tokens: int, num_samples: int = 1, **options: Any
) -> float:
    """Seconds for a token behind the first (median), with `generate`: greedy, by default with a dynamic cache."""
    size = len(inputs["input_ids"])
    inputs = {name: value[: num_samples * len(value) // size] for name, value in without_labels(inputs).items()}
    stopwatch = Stopwatch()
    number = {"min_new_tokens": num_tokens + 1, "max_new_tokens": num_tokens + 1}
    model.generate(**inputs, **number, do_sample=False, streamer=stopwatch, **options)
    # The first entry is the prompt, the second the token that comes from the forward pass on it.
    return median(after - before for before, after in pairwise(stopwatch.times[1:]))


def compiled_decoding_seconds(model: nn.Module, inputs: dict[str, torch.Tensor], num_tokens: int) -> float:
    """As `decoding_seconds`, but compiled, with a static cache."""
    config = CompileConfig(backend=BACKEND)
    # On GPUs alone by default.
    config._compile_all_devices = True
    return decoding_seconds(model, inputs, num_tokens, cache_implementation="static", compile_config=config)


def peak_bytes(function: Callable[[], None], device: str) -> int:
    """The most memory that is in use at one time during a call, beyond what is in use before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak


def saved_bytes(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass: each storage once, those of weights left out."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        # Detached, since an operation that keeps its own output would keep itself alive.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model(**inputs)
    return sum(storage.nbytes() for storage in storages.values())


def forward_flops(model: nn.Module, dims: Llava, batch_size: int) -> dict[str, int]:
    """
    Counts the operations of a forward pass of a LLaVA on the device "meta", where nothing is computed, by module.

    Its two halves are called one after the other, since what is between them looks at values: where images are placed.
    Attention counts as what it is, matrix products, of which a causal mask hides none.
    """
    text = torch.zeros(batch_size, dims.num_text_tokens, dims.text["hidden_size"], device="meta")
    size = dims.vision["image_size"]
    images = torch.zeros(batch_size, 3, size, size, device="meta")
    with FlopCounterMode(display=False, depth=None) as counter:
        features = model.get_image_features(pixel_values=images).pooler_output
        features = torch.stack(list(features))
        model(inputs_embeds=torch.cat([features.to(text.dtype), text], dim=1))
    return {path: sum(counts.values()) for path, counts in counter.get_flop_counts().items()}


def adapter_bytes(folder: Path) -> int:
    """Size of the weights of a saved adapter."""
    return (folder / "adapter_model.safetensors").stat().st_size


def loading_seconds(base: nn.Module, folder: Path) -> float:
    """How long it takes to load a saved adapter onto a model that is there already."""
    return seconds(lambda: PeftModel.from_pretrained(base, folder), "cpu")
