"""New adapters out of those that a model has: `add_weighted_adapter`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .base import M2PTLayer
from .config import M2PTConfig
from .prompt import M2PTPrompt


if TYPE_CHECKING:
    from .model import M2PTModel


COMBINATIONS = ("cat", "linear")
COUNTS = ("num_visual_tokens", "num_textual_tokens", "num_interaction_tokens")
ALIKE = ("interaction_placement", "tune_connector", "connector_rank")


def add_weighted_adapter(
    tuner: M2PTModel,
    adapters: Sequence[str],
    weights: Sequence[float] | None,
    adapter_name: str,
    combination_type: str,
) -> None:
    """See [`M2PTModel.add_weighted_adapter`]."""
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    configs = _check(tuner, adapters, weights, adapter_name, combination_type)
    layers = [(path, module) for path, module in tuner.model.named_modules() if isinstance(module, M2PTLayer)]
    for path, layer in layers:
        for layer_name in layer.adapter_layer_names:
            _check_layer(path, getattr(layer, layer_name), adapters, combination_type)

    config = copy.copy(configs[0])
    config.modules_to_save = list(dict.fromkeys(name for c in configs for name in c.modules_to_save or ())) or None
    if combination_type == "cat":
        for name in COUNTS:
            counts = [{**vars(tuner.peft_config[other]), **tuner.resolved[other]}[name] for other in adapters]
            setattr(config, name, sum(counts))
    # It starts as no text, and its rows have units if those of any other have some.
    config.init_text = config.init_token_ids = config.tokenizer_name_or_path = None
    if any(other.init_prompts == "states" for other in configs):
        config.init_prompts = "states"
    tuner.peft_config[adapter_name] = config
    tuner.weights_follow = True
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except Exception:
        del tuner.peft_config[adapter_name]
        raise
    finally:
        tuner.weights_follow = False
    for _, layer in layers:
        for layer_name in layer.adapter_layer_names:
            _combine(layer, layer_name, adapters, weights, adapter_name, combination_type)
    _take_over_saved_modules(tuner, adapters, adapter_name)
    tuner.set_adapter(tuner.active_adapters)


def _check(
    tuner: M2PTModel, adapters: Sequence[str], weights: list[float], adapter_name: str, combination_type: str
) -> list[M2PTConfig]:
    if adapter_name in tuner.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r}: there is an adapter of this name already.")
    unknown = [name for name in adapters if name not in tuner.own_configs]
    if unknown or not adapters:
        raise ValueError(
            f"adapters={list(adapters)}: {unknown or 'nothing'} is not the name of an adapter. There are "
            f"{sorted(tuner.own_configs)}."
        )
    if combination_type not in COMBINATIONS:
        raise ValueError(f"combination_type={combination_type!r} is unknown. Choose one of {COMBINATIONS}.")
    if len(weights) != len(adapters):
        raise ValueError(f"weights={weights} has {len(weights)} numbers for {len(adapters)} adapters.")
    if combination_type == "cat" and any(weight != 1 for weight in weights):
        raise ValueError(
            f"weights={weights}: combination_type='cat' puts prompts side by side, which gives them no weights. Leave "
            f"them out, or choose combination_type='linear'."
        )
    configs = [tuner.peft_config[name] for name in adapters]
    for field in ALIKE:
        values = [getattr(config, field) for config in configs]
        if len(set(values)) > 1:
            raise ValueError(f"The adapters {list(adapters)} differ in {field}: {values}. They cannot be combined.")
    if len(adapters) > 1 and configs[0].tune_connector:
        rank = configs[0].connector_rank
        if combination_type == "cat" or rank is not None:
            how = "each tuned the connector" if rank is None else f"low-rank updates of the connector ({rank=})"
            raise ValueError(
                f"combination_type={combination_type!r}: the adapters {list(adapters)} have {how}, which cannot be "
                f"combined so. Train them with tune_connector=False"
                f"{', or choose combination_type=' + repr('linear') if rank is None else ''}."
            )
    for path, wrapper in _saved_modules(tuner):
        owners = [name for name in adapters if name in wrapper.modules_to_save]
        if len(owners) > 1:
            raise ValueError(
                f"The adapters {owners} have each trained '{path}' (modules_to_save), and such modules cannot be "
                f"combined. Combine adapters of which only one has trained it."
            )
    return configs


def _saved_modules(tuner: M2PTModel) -> list[tuple[str, ModulesToSaveWrapper]]:
    modules = tuner.model.named_modules()
    return [(path, module) for path, module in modules if isinstance(module, ModulesToSaveWrapper)]


def _take_over_saved_modules(tuner: M2PTModel, adapters: Sequence[str], adapter_name: str) -> None:
    """Gives the new adapter a copy of what one of the others has trained besides (`modules_to_save`)."""
    for _, wrapper in _saved_modules(tuner):
        for owner in adapters:
            if owner in wrapper.modules_to_save:
                wrapper.update(adapter_name)
                trained = wrapper.modules_to_save[adapter_name]
                trained.load_state_dict(wrapper.modules_to_save[owner].state_dict())
                trained.requires_grad_(False)


def _check_layer(path: str, modules: nn.ModuleDict, adapters: Sequence[str], combination_type: str) -> None:
    present = [name for name in adapters if name in modules]
    if present and len(present) < len(adapters):
        missing = [name for name in adapters if name not in modules]
        raise ValueError(f"'{path}': the adapters {missing} have no prompts here, but {present} have. Choose others.")
    if combination_type == "linear":
        shapes = {name: [list(parameter.shape) for parameter in modules[name].parameters()] for name in present}
        if any(shape != shapes[present[0]] for shape in shapes.values()):
            raise ValueError(
                f"'{path}': combination_type='linear' adds weights of equal shape, but these are {shapes}. Choose "
                f"combination_type='cat'."
            )


@torch.no_grad()
def _combine(
    layer: M2PTLayer,
    layer_name: str,
    adapters: Sequence[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str,
) -> None:
    modules = getattr(layer, layer_name)
    if adapter_name not in modules:
        return
    target, sources = modules[adapter_name], [modules[name] for name in adapters]
    is_cat = combination_type == "cat"
    if isinstance(target, M2PTPrompt):
        prompts = [source().to(target.weight) for source in sources]
        target.fill(torch.cat(prompts) if is_cat else sum(w * prompt for w, prompt in zip(weights, prompts)))
        return
    # What is new is a copy of the frozen connector: what adapters have changed of it is added up.
    for name, parameter in target.named_parameters():
        if is_cat:  # of one adapter
            parameter.copy_(sources[0].get_parameter(name))
            continue
        start = parameter.clone()
        changes = [w * (source.get_parameter(name).to(parameter) - start) for w, source in zip(weights, sources)]
        parameter.copy_(start + sum(changes))
