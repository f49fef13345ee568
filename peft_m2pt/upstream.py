"""
Everything of transformers and accelerate that this package uses without documentation.

If a release changes any of it, `tests/test_upstream_ground.py` fails and says what has changed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import transformers.integrations.peft
from accelerate.hooks import AlignDevicesHook, SequentialHook
from packaging.version import Version
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, cache_utils
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.integrations.fsdp import is_fsdp_enabled
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as MULTIMODAL


# The method by which `generate_batch`, its context manager and the servers of transformers and TRL start continuous
# batching.
CONTINUOUS_BATCHING = "init_continuous_batching"

# Its argument for the options.
BATCHING_CONFIG = "continuous_batching_config"

# Methods of the manager that it returns: the body of the worker's loop, the forward pass in it, and the one that makes
# the cache.
BATCHING_LOOP = "_generation_loop_body"
BATCHING_STEP = "_generation_step"
BATCHING_PROCESSOR = "_create_batch_processor"

# Before, attention functions reach paged caches in other ways.
LOWEST_CONTINUOUS_BATCHING = "5.19"


# What continuous batching calls eager attention, whose function is one for all models.
PAGED_EAGER = "paged|eager"


# The classes that choose a model by the class of its config, in a table that can be extended.
AUTO_CLASSES = tuple(
    auto_class
    for name, auto_class in vars(modeling_auto).items()
    if name.startswith("AutoModel") and getattr(auto_class, "_model_mapping", None) is not None
)


# The field of a config that names the file with the weights. An error of transformers quotes any other value.
WEIGHTS_FIELD = "transformers_weights"


def attention_implementation(attention: nn.Module) -> str:
    """The name of the attention implementation that a module looks up, such as "sdpa"."""
    return attention.config._attn_implementation


def local_reach(attention: nn.Module) -> tuple[int | None, int | None]:
    """The length of the sliding window and of the attention chunks of an attention module."""
    config = attention.config
    kinds, layer = getattr(config, "layer_types", None), getattr(attention, "layer_idx", None)
    kind = "sliding_attention" if kinds is None or layer is None or layer >= len(kinds) else kinds[layer]
    window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
    chunk = getattr(config, "attention_chunk_size", None) if kind == "chunked_attention" else None
    return window, chunk


def chunk_length(config: PretrainedConfig) -> int | None:
    """The length of the attention chunks of a language model (Llama 4). `None` if no layer has any."""
    has_chunks = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    return config.attention_chunk_size if has_chunks else None


# Layers of caches that join the keys and values that they have with new ones.
JOINING = (DynamicLayer, DynamicSlidingWindowLayer)

# Methods and functions of transformers that call one of ours.
_intercepting: set[Callable] = set()


def intercept_updates(intercept: Callable[[Callable], Callable]) -> None:
    """
    Replaces the method `update` of layers of dynamic caches, if it is that of transformers.

    Args:
        intercept (`Callable`):
            Makes the method that takes the place of one.
    """
    for layer_class in JOINING:
        method = vars(layer_class)["update"]
        if method not in _intercepting and getattr(method, "__globals__", None) is vars(cache_utils):
            layer_class.update = functools.wraps(method)(intercept(method))
            _intercepting.add(layer_class.update)


def intercept_flattening(prepare: Callable[[Any], None]) -> None:
    """
    Lets a function prepare each dynamic cache that becomes a tree of tensors, as exporting does.

    Args:
        prepare (`Callable[[Cache], None]`):
            The function. Transformers takes layers of exactly its own classes.
    """
    # PEFT has not loaded it, so importing this package does not, either.
    from transformers.integrations import executorch

    function = executorch._get_cache_dict
    if function in _intercepting:
        return

    @functools.wraps(function)
    def flatten(cache: Any) -> dict[str, Any]:
        prepare(cache)
        return function(cache)

    executorch._get_cache_dict = flatten
    _intercepting.add(flatten)


def layer_in_cache(cache: Any, index: int) -> Any:
    """A layer of a cache. `None` if it is not there (yet)."""
    layers = getattr(cache, "layers", ())
    return layers[index] if index < len(layers) else None


def updates_layers(cache: Any) -> bool:
    """Whether `update` of a cache does nothing but call that of a layer."""
    # Offloaded caches change places behind each call.
    is_own = type(cache).update is Cache.update and "update" not in vars(cache)
    return is_own and not getattr(cache, "offloading", False)


def is_known_to_be_empty(cache: Any, layer: int) -> bool:
    """
    Whether a layer of a dynamic cache has no tokens, as after its own method `reset`. To find that out of a static one
    would wait for the device.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    if layers is None:
        return False
    if layer >= len(layers):
        return True
    return isinstance(layers[layer], DynamicLayer) and layers[layer].get_seq_length() == 0


def joins_tokens(layer: Any) -> bool:
    """
    Whether a layer of a cache has tokens, and `update` joins their keys and values with new ones, if its class has the
    methods and attributes of transformers.
    """
    return (
        type(layer).update in _intercepting
        and layer.is_initialized
        and layer.keys.dim() == 4
        and layer.keys.size(-2) > 0
        and not getattr(layer, "record_past", False)
    )


def count_token(layer: Any, num_tokens: int) -> int:
    """Counts a new token as `update` of a layer with a sliding window does. Returns how many of all it drops."""
    layer.cumulative_length += 1
    # As transformers slices: a window of 1 keeps all.
    return max(num_tokens - layer.sliding_window + 1, 0) if layer.sliding_window > 1 else 0


def has_known_continuous_batching() -> bool:
    """Whether paged caches of the installed transformers are reached in one of the ways that are known."""
    return Version(transformers.__version__).release >= Version(LOWEST_CONTINUOUS_BATCHING).release


def is_paged(cache: Any) -> bool:
    """Whether a cache is that of continuous batching."""
    return isinstance(cache, PagedAttentionCache)


def paged_lengths(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """
    How many tokens requests of continuous batching have, by the arguments of an attention module for these.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, bool]`: Where the tokens of each request begin and end in the row, how many
        tokens before these are in the cache, and whether the latter are all of them. Layers with a sliding window keep
        one less than it is long.
    """
    boundaries, of_keys = arguments["cu_seq_lens_q"], arguments["cu_seq_lens_k"]
    kind = "full_attention" if "full_attention" in of_keys else next(iter(of_keys))
    return boundaries, of_keys[kind].diff() - boundaries.diff(), kind == "full_attention"


class _Updated:
    """Takes the place of a paged cache that has been updated."""

    @staticmethod
    def update(key_states: torch.Tensor, value_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return key_states, value_states


def update_paged_cache(
    module: nn.Module, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Brings keys and values of tokens into a paged cache, where an attention module has left that to its attention
    function. Up to transformers 5.23 all do; later ones have done so themselves.

    Args:
        module (`nn.Module`):
            The attention module.
        key (`torch.Tensor`), value (`torch.Tensor`):
            Keys and values that the attention function got.
        kwargs (`dict[str, Any]`):
            What else it got. Changed in place: what is said of all layers is replaced by what is true for this one.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Keys and values of all tokens of all requests.
    """
    cache = kwargs.pop("cache", None)
    if cache is None:
        return key, value
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    if attention_implementation(module) == PAGED_EAGER:
        # It insists on a cache.
        kwargs["cache"] = _Updated
    return key, value


def recorded_attention_classes(tower: nn.Module) -> tuple[type, ...]:
    """The classes of modules whose attention weights transformers records for a tower, as far as it says."""
    classes: list[type] = []
    for module in tower.modules():
        specs = (getattr(module, "_can_record_outputs", None) or {}).get("attentions", [])
        for spec in specs if isinstance(specs, list) else [specs]:
            target = getattr(spec, "target_class", spec)
            if isinstance(target, type):
                classes.append(target)
    return tuple(classes)


def checkpoints_reentrantly(module: nn.Module) -> bool:
    """Whether a module runs its layers under reentrant gradient checkpointing."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    is_on = module.training and getattr(module, "gradient_checkpointing", False)
    return is_on and getattr(function, "keywords", {}).get("use_reentrant", False)


def renamed_weights(model: nn.Module) -> dict[str, str] | None:
    """How transformers renames weights of a model's older checkpoints: regular expressions and replacements."""
    return getattr(model, "_checkpoint_conversion_mapping", None)


def renamed_arguments(function: Callable) -> dict[str, str]:
    """
    The present names of deprecated arguments, by the old ones, from the closure of transformers' `deprecate_kwarg`.

    Returns:
        `dict[str, str]`
    """
    found = {}
    while hasattr(function, "__wrapped__"):
        known = inspect.getclosurevars(function).nonlocals
        if isinstance(known.get("old_name"), str) and isinstance(known.get("new_name"), str):
            found[known["old_name"]] = known["new_name"]
        function = function.__wrapped__
    return found


def make_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """
    Makes the model of a config on the meta device, of the class that it names or that the auto classes choose.

    Raises:
        ValueError: If the installed transformers has no such model.
    """
    with torch.device("meta"):
        return _model_class(config)._from_config(config)


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto_class in (transformers.AutoModelForMultimodalLM, transformers.AutoModelForImageTextToText, AutoModel):
        if type(config) in auto_class._model_mapping:
            return auto_class._model_mapping[type(config)]
    raise ValueError(f"transformers {transformers.__version__} has no model for {type(config).__name__}.")


def min_peft_version() -> str | None:
    """The lowest version of PEFT that `add_adapter` and `load_adapter` of transformers accept."""
    return getattr(transformers.integrations.peft, "MIN_PEFT_VERSION", None)


def let_server_load(config: PretrainedConfig) -> None:
    """
    Lets `transformers serve` load the model that a config is of by an auto class, in this process. It calls language
    models by the name of their class, so it does not ask who knows their model type.
    """
    if type(config) in AutoModelForCausalLM._model_mapping and config.model_type not in MULTIMODAL:
        setattr(transformers, config.architectures[0], AutoModelForCausalLM)


def with_loader(model_class: type[PreTrainedModel], load_adapter: Callable) -> type[PreTrainedModel]:
    """
    Makes a class whose `from_pretrained` loads an adapter beside the model by another function than transformers does,
    which may ask for a newer PEFT.

    Args:
        model_class (`type[PreTrainedModel]`):
            The class of the model.
        load_adapter (`Callable`):
            Loads an adapter, given the model, the folder and the name of the adapter.

    Returns:
        `type[PreTrainedModel]`
    """

    def load(self: PreTrainedModel, path: str, adapter_name: str = "default", **kwargs: Any) -> SimpleNamespace:
        self.__class__ = model_class
        load_adapter(self, path, adapter_name)
        return SimpleNamespace(to_dict=lambda: {"missing_keys": set(), "unexpected_keys": set()})

    return type(model_class.__name__, (model_class,), {"__module__": model_class.__module__, "load_adapter": load})


def mark_as_adapted(model: PreTrainedModel) -> None:
    """Makes the adapter methods of a transformers model aware of an adapter that PEFT has added."""
    model._hf_peft_config_loaded = True


def is_adapted(model: PreTrainedModel) -> bool:
    """Whether the adapter methods of a transformers model are aware of an adapter."""
    return model._hf_peft_config_loaded


def names_in_model(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """
    Maps the tensors of a model to those of a checkpoint from which transformers loads them.

    Returns:
        `dict[str, str]`: Names in the checkpoint by names in the model, without tensors that loading converts.
    """
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    weights, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for name in names:
        new_name, source = rename_source_key(name, renamings, converters, prefix, weights)
        if new_name not in weights and name in weights:
            new_name, source = name, None
        if source is None:
            found[new_name] = name
    return found


def offloaded_to(module: nn.Module) -> torch.device | None:
    """The device on which accelerate runs a module with offloaded weights. `None` if they are not offloaded."""
    hook = getattr(module, "_hf_hook", None)
    for hook in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(hook, AlignDevicesHook) and hook.offload:
            # Kept as it was given: a number, a name, ...
            return torch.device(hook.execution_device)
    return None


class FetchOffloadedWeights:
    """
    Makes accelerate fetch the offloaded weights of a module around calls of another one that computes with them.

    Args:
        module (`nn.Module`):
            The module that holds the weights, which is not called itself.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def before(self, caller: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook for the other module."""
        if hasattr(self.module, "_hf_hook"):
            self.module._hf_hook.pre_forward(self.module)

    def behind(self, caller: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook for the other module."""
        if hasattr(self.module, "_hf_hook"):
            self.module._hf_hook.post_forward(self.module, None)


def weights_come_from_first_process() -> bool:
    """Whether only the first process has loaded weights, which FSDP broadcasts to the others."""
    return is_fsdp_enabled()
