"""Says what is wrong with a checkpoint, before any of it is loaded."""

from __future__ import annotations

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .base import M2PTLayer
from .config import M2PTConfig


MAX_PROBLEMS = 8


def check_state_dict(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """
    Checks that a checkpoint has exactly the weights of an adapter, in their shapes.

    Args:
        model (`nn.Module`):
            The model, which already has an adapter of this name.
        adapter_name (`str`):
            Name of the adapter.
        state_dict (`dict[str, torch.Tensor]`):
            The checkpoint, with the keys of the model.

    Raises:
        ValueError: If a weight is missing, has another shape, or belongs to nothing in the model. The message names
            tower, layer, what was expected and what was found.
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
    # Models that were injected into, without a `PeftModel` around them, lack its prefix.
    problems += [
        f"'{key}': expected nothing, found shape {list(weight.shape)}"
        for key, weight in state_dict.items()
        if key not in known and key.removeprefix("base_model.model.") not in known
    ]
    if problems:
        shown = "\n- ".join(problems[:MAX_PROBLEMS])
        more = f"\n- and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        raise ValueError(
            f"The weights of adapter '{adapter_name}' do not fit the model:\n- {shown}{more}\n"
            f"Load them into the base model and with the M2PTConfig (adapter_config.json) that they were trained with."
        )


def check_saved_modules(model: nn.Module, config: M2PTConfig, weights: dict[str, torch.Tensor]) -> None:
    """
    Checks that a checkpoint has the weights of all modules that were saved with an adapter, before they are copied.

    Args:
        model (`nn.Module`):
            The model.
        config ([`M2PTConfig`]):
            Names the modules.
        weights (`dict[str, torch.Tensor]`):
            The checkpoint.

    Raises:
        ValueError: If a weight is missing or has another shape.
    """
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
    """Weights of the base model that PEFT saves with an adapter if the vocabulary has grown, or if it is asked to."""
    try:
        embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):  # of modules that are no models of transformers, or have several
        return set()
    return {
        f"{name}.{weight_name}"
        for name, module in model.named_modules()
        if any(module is embedding for embedding in embeddings)
        for weight_name, _ in module.named_parameters()
    }
