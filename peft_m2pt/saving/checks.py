"""Checks the weights of a saved adapter before any of them is loaded."""

from __future__ import annotations

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..adapter_files import AdapterSource
from ..config import M2PTConfig
from ..errors import list_problems
from ..layers.base import M2PTLayer
from ..upstream import renamed_weights
from .names import WRAPPER_PREFIX


def read_weights(source: AdapterSource, model: nn.Module, config: M2PTConfig) -> dict[str, torch.Tensor]:
    """
    Reads the weights that PEFT is about to load, so that they can be checked before the model is changed.

    Returns:
        `dict[str, torch.Tensor]`: The weights by their names in the model.

    Raises:
        AdapterFileError: If the file is missing or damaged.
        ValueError: If weights of `modules_to_save` are missing or have another shape.
    """
    weights = source.load_weights(renamed_weights(model))
    weights = {name.removeprefix(WRAPPER_PREFIX): weight for name, weight in weights.items()}
    _check_saved_modules(model, config, weights)
    if config.num_interaction_tokens is None and any("m2pt_interaction" in name for name in weights):
        # In the first versions, `None` meant `num_visual_tokens` in both placements.
        config.num_interaction_tokens = config.num_visual_tokens
    return weights


def check_state_dict(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """
    Checks that a checkpoint has exactly the weights of an adapter, with the right shapes.

    Args:
        model (`nn.Module`):
            The model, which already has an adapter of this name.
        adapter_name (`str`):
            Name of the adapter.
        state_dict (`dict[str, torch.Tensor]`):
            The checkpoint, with the keys of the model.

    Raises:
        ValueError: If a weight is missing, unexpected, of another shape, or not finite. The message says which, what
            was expected and what was found.
    """
    problems = []
    known = _embedding_weights(model)
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            names = module.adapter_state_dict_load_map(adapter_name)
            known.update(f"{name}.{key}" for key in (*names, *names.values()))
        if not isinstance(module, M2PTLayer):
            continue
        for part, weight_name, expected, is_floating in module.expected_weights(adapter_name):
            weight = state_dict.get(f"{name}.{weight_name}")
            known.add(f"{name}.{weight_name}")
            if weight is None or tuple(weight.shape) != expected or weight.is_floating_point() != is_floating:
                found = "nothing" if weight is None else f"shape {list(weight.shape)}, {weight.dtype}"
                problems.append(f"{part} ('{module.site.path}'): expected shape {list(expected)}, found {found}")
            elif not weight.isfinite().all():
                problems.append(f"{part} ('{module.site.path}'): found numbers that are not finite")
    # After `inject_adapter_in_model`, there is no `PeftModel` with its prefix.
    problems += [
        f"'{key}': expected nothing, found shape {list(weight.shape)}"
        for key, weight in state_dict.items()
        if key not in known and key.removeprefix("base_model.model.") not in known
    ]
    if problems:
        raise ValueError(
            f"The weights of adapter '{adapter_name}' do not fit the model:\n{list_problems(problems)}\n"
            f"Load them with the base model and the M2PTConfig (adapter_config.json) that they were trained with."
        )


def _check_saved_modules(model: nn.Module, config: M2PTConfig, weights: dict[str, torch.Tensor]) -> None:
    """Checks that a checkpoint has the weights of all modules that were saved with an adapter."""
    for name, module in model.named_modules():
        if not any(name.endswith(saved) for saved in config.modules_to_save or ()):
            continue
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
        for key, parameter in module.state_dict(prefix=f"{name}.").items():
            weight = weights.get(key)
            if weight is None or weight.shape != parameter.shape:
                found = "nothing" if weight is None else f"shape {list(weight.shape)}"
                raise ValueError(
                    f"modules_to_save={list(config.modules_to_save)}: expected '{key}' of shape "
                    f"{list(parameter.shape)} in the weights of the adapter, found {found}."
                )


def _embedding_weights(model: nn.Module) -> set[str]:
    """Names of embedding weights, which PEFT saves with an adapter if the vocabulary was resized (or on request)."""
    try:
        embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):  # not a transformers model, or one with several embeddings
        return set()
    return {
        f"{name}.{weight_name}"
        for name, module in model.named_modules()
        if any(module is embedding for embedding in embeddings)
        for weight_name, _ in module.named_parameters()
    }
