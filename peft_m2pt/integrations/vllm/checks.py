"""Refuses, when a server starts, what would not be served exactly."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import vllm
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.model_executor.models.transformers.base import Base
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.metrics.stats import PrefillStats

from ...bundles.textual_rows import textual_rows
from ...config import M2PTConfig
from ...errors import UnsupportedModelError
from ...layers.attention import M2PTAttention
from ...saving.checkpoints import find_files
from ...upstream import local_reach
from .parts import make_tuned_model
from .settings import Settings


logger = init_logger(__name__)


# The versions of vLLM that the tests ran with.
TRIED = ("0.32.0",)


# What is used of vLLM beyond its documented interfaces.
PRIVATE: dict[Callable, tuple[str, ...]] = {
    Base._create_hf_to_vllm_mapper: ("self",),
    Base.init_parameters: ("self", "module", "dtype"),
    EngineCore.preprocess_add_request: ("self", "request"),
    InputProcessor._validate_prompt_len: ("self", "prompt_len", "prompt_type"),
    PrefillStats.set: ("self", "num_prompt_tokens", "num_local_cached_tokens", "num_external_cached_tokens"),
    Scheduler.update_from_output: ("self", "scheduler_output", "model_runner_output"),
}


# The models that the tests serve, by the types of the model, its vision encoder and its language model.
MODELS = {
    "llava": (("clip_vision_model", "siglip_vision_model"), ("llama", "mistral", "qwen2")),
    "qwen2_vl": (("qwen2_vl_vision",), ("qwen2_vl_text",)),
}
TEXT_MODELS = ("llama", "mistral", "qwen2")


# Options of vLLM by their paths in its config: the values that were tried, and the flag or variable that sets them.
OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "compilation_config.compile_mm_encoder": ((False,), "--compilation-config compile_mm_encoder"),
    "ec_transfer_config": ((None,), "--ec-transfer-config"),
    "kv_transfer_config": ((None,), "--kv-transfer-config"),
    "load_config.load_format": (("auto", "hf", "safetensors"), "--load-format"),
    "lora_config": ((None,), "--enable-lora"),
    "model_config.enable_prompt_embeds": ((False,), "--enable-prompt-embeds"),
    "model_config.enable_sleep_mode": ((False,), "--enable-sleep-mode"),
    "model_config.quantization": ((None,), "--quantization"),
    "model_config.runner_type": (("generate",), "--runner"),
    "parallel_config.decode_context_parallel_size": ((1,), "--decode-context-parallel-size"),
    "parallel_config.enable_dbo": ((False,), "--enable-dbo"),
    "parallel_config.pipeline_parallel_size": ((1,), "--pipeline-parallel-size"),
    "parallel_config.prefill_context_parallel_size": ((1,), "--prefill-context-parallel-size"),
    "speculative_config": ((None,), "--speculative-config"),
    "use_v2_model_runner": ((False,), "VLLM_USE_V2_MODEL_RUNNER"),
    "weight_transfer_config": ((None,), "--weight-transfer-config"),
}


class CheckBundle(VerifyAndUpdateConfig):
    """What vLLM calls with its config before it starts an engine for a bundle."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        folder = Path(vllm_config.model_config.model).absolute()
        check_version(vllm.__version__)
        _check_options(vllm_config)
        _check_adapter(M2PTConfig.from_pretrained(str(folder)))
        _check_model_types(vllm_config.model_config.hf_config)
        _check_media(vllm_config.model_config)
        _check_files(folder)
        tuned = make_tuned_model(vllm_config.model_config, folder)
        num_prompts = _check_textual_prompts(tuned, vllm_config.model_config)
        Settings(str(folder), num_prompts, _digest(folder)).store(vllm_config)


def check_when_started(*architectures: str) -> None:
    """Makes vLLM check the config when it starts one of these models."""
    MODELS_CONFIG_MAP.update(dict.fromkeys(architectures, CheckBundle))


def check_version(version: str) -> None:
    """
    Warns of versions of vLLM that were not tried.

    Raises:
        UnsupportedModelError: If something has changed in them that is used beyond the documented interfaces.
    """
    if version.partition("+")[0] in TRIED:
        return
    tried = f"vLLM {version} was not tried with M2PT, but {', '.join(TRIED)}"
    for function, parameters in PRIVATE.items():
        found = tuple(inspect.signature(function).parameters)
        if found != parameters:
            raise UnsupportedModelError(
                f"{tried}. In this version {function.__qualname__} takes {found}, and not {parameters}. Install a "
                f"version that was tried, or try a newer peft-m2pt."
            )
    logger.warning("%s. What it uses of it has not changed. Compare some answers with `generate`.", tried)


def _check_options(config: VllmConfig) -> None:
    for path, (tried, flag) in OPTIONS.items():
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name)
        if value not in tried:
            is_variable = flag.isupper()
            remedy = f"Set {flag}=0 in the environment" if is_variable else f"Leave {flag} at its default"
            name = f"{path}={value!r}" if isinstance(value, (bool, int, str)) else path
            raise UnsupportedModelError(
                f"{name} was not tried with M2PT. {remedy}, or serve the bundle with `peft-m2pt serve`."
            )


def _check_adapter(config: M2PTConfig) -> None:
    if config.interaction_placement == "image" and config.wanted_interaction_tokens > 0:
        raise UnsupportedModelError(
            f"interaction_placement='image' with num_interaction_tokens={config.num_interaction_tokens}: vLLM would "
            f"have to make room for more tokens in each image. Serve the adapter with `peft-m2pt serve`, or train one "
            f"with interaction_placement='layers'."
        )
    if config.modules_to_save:
        raise UnsupportedModelError(
            f"modules_to_save={config.modules_to_save}: vLLM would take these weights from the base model. Serve the "
            f"adapter with `peft-m2pt serve`, or train one without modules_to_save."
        )


def _check_model_types(config: Any) -> None:
    text = config.get_text_config()
    if text is config:
        fits = config.model_type in TEXT_MODELS
        name = f"model_type={config.model_type!r}"
    else:
        vision, texts = MODELS.get(config.model_type, ((), ()))
        vision_type = getattr(getattr(config, "vision_config", None), "model_type", None)
        fits = vision_type in vision and text.model_type in texts
        name = (
            f"model_type={config.model_type!r} with vision_config {vision_type!r} and text_config {text.model_type!r}"
        )
    if not fits:
        raise UnsupportedModelError(
            f"{name} was not tried in vLLM with M2PT, and it is not known whether its answers would be exact. Tried "
            f"are {describe_models()}. Serve the bundle with `peft-m2pt serve`."
        )


def _check_media(model_config: Any) -> None:
    options, config = model_config.multimodal_config, model_config.hf_config
    if options is not None and options.get_limit_per_prompt("image") == 0:
        raise UnsupportedModelError(
            "--limit-mm-per-prompt or --language-model-only leave out the vision encoder, which the adapter tunes. "
            "Allow at least one image."
        )
    if getattr(config, "video_token_id", None) is not None and options.get_limit_per_prompt("video") > 0:
        raise UnsupportedModelError(
            f"videos were not tried in vLLM with M2PT, and model_type={config.model_type!r} takes them. Refuse them "
            f"with --limit-mm-per-prompt '{{\"video\": 0}}'."
        )


def _check_files(folder: Path) -> None:
    for file in find_files(folder):
        if file.suffix != ".safetensors":
            raise UnsupportedModelError(
                f"vLLM would leave out {file.name}, since it prefers safetensors files, which the adapter has. Load "
                f"the base model and save it again (save_pretrained), and bundle the adapter with that."
            )


def describe_models() -> str:
    """Lists the models that the tests serve."""
    described = [
        f"{model_type!r} with {' or '.join(visions)} and {' or '.join(texts)}"
        for model_type, (visions, texts) in MODELS.items()
    ]
    return "; ".join([*described, f"{' or '.join(TEXT_MODELS)} alone"])


def _check_textual_prompts(tuned: PreTrainedModel, model_config: Any) -> int:
    """Checks the layers of the language model. Returns how many prompts each has."""
    layers = [module for module in tuned.modules() if isinstance(module, M2PTAttention)]
    sites = [layer.site for layer in layers if layer.site.kind == "textual"]
    if not sites:
        return 0
    num_layers = tuned.config.get_text_config().num_hidden_layers
    if len(sites) < num_layers:
        raise UnsupportedModelError(
            f"textual_layers or exclude_modules leave {num_layers - len(sites)} of {num_layers} layers without "
            f"prompts, but in vLLM all layers see the tokens that stand for prompts. Serve the adapter with "
            f"`peft-m2pt serve`, or train one with prompts in all layers."
        )
    for site in sites:
        window, chunk = local_reach(site.attention)
        reach = window or chunk
        if reach is not None and reach < model_config.max_model_len:
            field = "sliding_window" if window else "attention_chunk_size"
            raise UnsupportedModelError(
                f"{field}={reach} of '{site.path}': in vLLM, tokens further from the start would not see the prompts. "
                f"Set --max-model-len {reach} or less, or serve the bundle with `peft-m2pt serve`."
            )
    return len(next(iter(textual_rows(tuned).values())))


def _digest(folder: Path) -> str:
    """Tells the adapter from others."""
    digest = sha256()
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
