"""Puts placeholders for textual prompts in front of requests, and takes them out of what the engine reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import msgspec
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.metrics.stats import PrefillStats

from ...errors import UnsupportedModelError
from .settings import Settings


def moved(features: Sequence[MultiModalFeatureSpec], distance: int) -> list[MultiModalFeatureSpec]:
    """Moves images by a number of tokens."""
    return [
        replace(feature, mm_position=replace(feature.mm_position, offset=feature.mm_position.offset + distance))
        for feature in features
    ]


def lengthened(request: EngineCoreRequest, settings: Settings) -> EngineCoreRequest:
    """Puts placeholders in front of a request."""
    if request.resumable:
        raise UnsupportedModelError(
            f"Request {request.request_id!r} sends its prompt in parts, and textual prompts would stand in front of "
            f"each. Send it as a whole."
        )
    tokens = request.prompt_token_ids
    return msgspec.structs.replace(
        request,
        # Copies of its first token, so that penalties for tokens of the prompt are as without placeholders.
        prompt_token_ids=[*tokens[:1] * settings.num_prompts, *tokens],
        mm_features=request.mm_features and moved(request.mm_features, settings.num_prompts),
        # Hashes of cached blocks start with it, so that those of other adapters differ in caches that servers share.
        cache_salt=settings.salt + (request.cache_salt or ""),
    )


class _StatsOfTokens(PrefillStats):
    """Counts the tokens of a request without its placeholders."""

    def __init__(self, num_prompts: int) -> None:
        super().__init__()
        self._num_prompts = num_prompts

    def set(self, num_prompt_tokens: int, num_local_cached_tokens: int, num_external_cached_tokens: int) -> None:
        super().set(
            num_prompt_tokens - self._num_prompts,
            max(num_local_cached_tokens - self._num_prompts, 0),
            num_external_cached_tokens,
        )


def lengthen_requests() -> None:
    """Makes engines put placeholders in front of requests, if they serve a bundle."""
    _wrap(InputProcessor, "_validate_prompt_len", _validate_prompt_len)
    _wrap(EngineCore, "preprocess_add_request", _preprocess_add_request)
    _wrap(Scheduler, "update_from_output", _update_from_output)


def _wrap(owner: type, name: str, wrapper: Any) -> None:
    function = getattr(owner, name)
    if getattr(function, "is_of_m2pt", False):
        # vLLM may load plugins several times.
        return

    @wraps(function)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = Settings.of(self.vllm_config)
        if settings is None:
            return function(self, *args, **kwargs)
        return wrapper(function.__get__(self), settings, *args, **kwargs)

    wrapped.is_of_m2pt = True
    setattr(owner, name, wrapped)


def _validate_prompt_len(validate: Any, settings: Settings, prompt_len: int, prompt_type: Any) -> None:
    validate(prompt_len, prompt_type)
    longest = validate.__self__.model_config.max_model_len
    if prompt_len + settings.num_prompts >= longest:
        raise VLLMValidationError(
            f"The prompt has {prompt_len} tokens, and the {settings.num_prompts} textual prompts of the adapter take "
            f"as much room as tokens, so max_model_len={longest} leaves none for an answer. Shorten the prompt, or "
            f"serve the bundle with a higher --max-model-len."
        )


def _preprocess_add_request(preprocess: Any, settings: Settings, request: EngineCoreRequest) -> Any:
    added, wave = preprocess(lengthened(request, settings))
    added.prefill_stats = _StatsOfTokens(settings.num_prompts)
    return added, wave


def _update_from_output(update: Any, settings: Settings, scheduler_output: Any, output: Any) -> Any:
    for request, logprobs in output.prompt_logprobs_dict.items():
        if logprobs is not None:
            of_tokens = (tensor[settings.num_prompts :] for tensor in logprobs[:3])
            output.prompt_logprobs_dict[request] = logprobs._replace(**dict(zip(logprobs._fields, of_tokens)))
    return update(scheduler_output, output)
