"""
Continuous batching (`generate_batch`, `transformers serve --continuous-batching`) of a model with textual prompts.

What is not supported is refused before the worker starts, or for the affected requests only. By itself, the worker
would stop at the first error, and fail all later requests.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import transformers
from torch import nn
from transformers import ContinuousBatchingConfig

from ..attention.paged import prompts_in_cache
from ..errors import M2PTError, UnsupportedModelError
from ..layers.attention import M2PTAttention
from ..upstream import (
    BATCHING_CONFIG,
    BATCHING_LOOP,
    BATCHING_PROCESSOR,
    BATCHING_STEP,
    CONTINUOUS_BATCHING,
    LOWEST_CONTINUOUS_BATCHING,
    has_known_continuous_batching,
)
from .refused_methods import ReplacedMethod


# Options under which prompts, or a change of them, could be ignored: the value to use instead, and the reason.
REFUSED_OPTIONS: dict[str, tuple[Any, str]] = {
    "use_cuda_graph": (False, "a captured graph would not see a change of prompts"),
    "varlen_compile_config": (None, "a compiled step would not see a change of prompts"),
    "decode_compile_config": (None, "a compiled step would not see a change of prompts"),
    "default_compile_level": (0, "a compiled step would not see a change of prompts"),
    "max_blocks_per_request": (0, "the decode fast path reads keys from pages in which no prompts are"),
    "use_async_batching": (False, "the next batch would already hold a request that is then refused"),
}


# Fields of configs with the ids of placeholder tokens.
IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def supervise_continuous_batching(model: nn.Module) -> list[ReplacedMethod]:
    """
    Makes continuous batching use the textual prompts of a model.

    Args:
        model (`nn.Module`):
            The model.

    Returns:
        `list[ReplacedMethod]`: The replaced method. Empty if the model has none, or if it is replaced already.
    """
    is_needed = hasattr(type(model), CONTINUOUS_BATCHING) and CONTINUOUS_BATCHING not in vars(model)
    function = partial(_init_continuous_batching, model)
    return [ReplacedMethod(model, CONTINUOUS_BATCHING, function)] if is_needed else []


def _init_continuous_batching(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    method = getattr(type(model), CONTINUOUS_BATCHING)
    path = _path_in_use(model)
    if not has_known_continuous_batching():
        if path is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has M2PT prompts in use at '{path}', for which continuous batching needs "
                f"transformers {LOWEST_CONTINUOUS_BATCHING} or later, but {transformers.__version__} is installed. "
                f"Use generate(...), or disable the adapter."
            )
        return method(model, *args, **kwargs)
    call = inspect.signature(method).bind(model, *args, **kwargs)
    config = call.arguments.get(BATCHING_CONFIG)
    if config is None:
        generation_config = call.arguments.get("generation_config") or model.generation_config
        config = getattr(generation_config, BATCHING_CONFIG, None) or ContinuousBatchingConfig()
    call.arguments[BATCHING_CONFIG] = _without_refused_options(model, config)
    manager = method(*call.args, **call.kwargs)
    _supervise(manager, model, path)
    return manager


def _layers(model: nn.Module) -> Sequence[M2PTAttention]:
    """The adapted attention modules of the language model."""
    return [
        module for module in model.modules() if isinstance(module, M2PTAttention) and module.site.kind == "textual"
    ]


def _path_in_use(model: nn.Module) -> str | None:
    return next((layer.site.path for layer in _layers(model) if layer.is_active), None)


def _without_refused_options(model: nn.Module, config: ContinuousBatchingConfig) -> ContinuousBatchingConfig:
    """Turns off options that transformers would turn on by default, and refuses those that the user has turned on."""
    config = copy.copy(config)
    for name, (value, reason) in REFUSED_OPTIONS.items():
        given = getattr(config, name, None)
        if any(given) if isinstance(given, tuple) else given:
            raise UnsupportedModelError(
                f"ContinuousBatchingConfig has {name}={given!r}, but {type(model).__name__} has M2PT prompts at "
                f"'{_layers(model)[0].site.path}': {reason}. Leave {name} out, or call unload() first."
            )
        setattr(config, name, value)
    return config


def _supervise(manager: Any, model: nn.Module, path: str | None) -> None:
    """Makes the requests of a manager use prompts, and refusals fail requests instead of stopping the worker."""
    if BATCHING_LOOP in vars(manager):
        return
    if manager.batch_processor is not None:
        if path is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps a manager of continuous batching that is older than its M2PT prompts "
                f"at '{path}'. Call model.destroy_cached_continuous_batching_manager() first."
            )
        return
    setattr(manager, BATCHING_LOOP, partial(_run_loop, getattr(manager, BATCHING_LOOP), model))
    setattr(manager, BATCHING_STEP, partial(_run_step, getattr(manager, BATCHING_STEP), manager, model))
    setattr(manager, BATCHING_PROCESSOR, partial(_make_processor, getattr(manager, BATCHING_PROCESSOR)))
    manager.input_queue.put = partial(_take_request, manager.input_queue.put, manager, model)


def _make_processor(make: Callable[[], Any]) -> Any:
    processor = make()
    prompts_in_cache(processor.cache, make=True)
    return processor


def _run_loop(run: Callable[..., bool], model: nn.Module, processor: Any, *args: Any, **kwargs: Any) -> bool:
    cache = processor.cache
    if prompts_in_cache(cache) and not processor.has_pending_requests():
        if not all(layer.are_requests_as_before(cache) for layer in _layers(model)):
            _forget(cache)
    try:
        return run(processor, *args, **kwargs)
    except M2PTError as error:
        processor.fail_all_requests(error)
        processor.reset()
        _forget(cache)
        return True


def _run_step(run: Callable[[], None], manager: Any, model: nn.Module) -> None:
    cache = manager.batch_processor.cache
    num_known = len(prompts_in_cache(cache))
    run()
    if len(prompts_in_cache(cache)) == num_known:
        # Each layer has compared its prompts with those before.
        return
    for layer in _layers(model):
        if not layer.are_requests_as_before(cache):
            raise layer.change_of_prompts()


def _forget(cache: Any) -> None:
    """Empties a paged cache that serves no request, including the blocks that it keeps for requests to share."""
    cache.evict_cached_blocks()
    prompts_in_cache(cache).clear()


def _take_request(put: Callable, manager: Any, model: nn.Module, state: Any, *args: Any, **kwargs: Any) -> None:
    ids = {getattr(model.config, name, None) for name in IMAGE_TOKENS}
    found = next((token for token in state.initial_tokens if token in ids), None)
    path = None if found is None else _path_in_use(model)
    if path is None:
        return put(state, *args, **kwargs)
    error = UnsupportedModelError(
        f"The request {state.request_id!r} has the image token {found}, but continuous batching takes no images, so "
        f"the M2PT prompts of {type(model).__name__} at '{path}' would see none. Use generate(...)."
    )
    manager.output_router.fail_and_deliver(state, error)
