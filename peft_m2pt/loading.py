"""Says what is wrong with a checkpoint, before any of it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import nn

from .base import M2PTLayer


MAX_PROBLEMS = 8


def check_weights_file(model_id: str | Path, subfolder: str | None = None, **download_kwargs: Any) -> None:
    """
    Downloads the weights of an adapter, and checks that the file is whole.

    PEFT gives a model its new prompts, which are random, and looks for their weights then. What can go wrong with the
    file shall go wrong before.

    Args:
        model_id (`str` or `Path`):
            Repository id or folder of the adapter.
        subfolder (`str`, *optional*):
            Folder of the adapter in there.
        download_kwargs (*optional*):
            Arguments of `huggingface_hub.hf_hub_download`, which keeps the file in its cache.

    Raises:
        OSError: If the file cannot be downloaded or is not whole. No file at all is no error.
    """
    path = Path(model_id, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
    try:
        if not path.is_file():
            if Path(model_id).is_dir():
                return
            path = hf_hub_download(str(model_id), SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **download_kwargs)
        with safe_open(path, framework="pt"):
            pass
    except RemoteEntryNotFoundError:
        return
    except Exception as error:
        raise OSError(
            f"The weights of the adapter in '{model_id}' cannot be loaded: {error}\n"
            f"No model has been changed. Try again, or see to it that '{SAFETENSORS_WEIGHTS_NAME}' is whole."
        ) from error


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
            known.update(f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values())
        if not isinstance(module, M2PTLayer):
            continue
        for part, weight_name, expected in module.expected_weights(adapter_name):
            weight = state_dict.get(f"{name}.{weight_name}")
            known.add(f"{name}.{weight_name}")
            if weight is None or tuple(weight.shape) != expected or not weight.is_floating_point():
                found = "nothing" if weight is None else f"shape {list(weight.shape)}, {weight.dtype}"
                problems.append(f"{part} ('{module.site.path}'): expected shape {list(expected)}, found {found}")
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


def _embedding_weights(model: nn.Module) -> set[str]:
    """Weights of the base model that PEFT saves with an adapter if the vocabulary has grown, or if it is asked to."""
    try:
        embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:  # by models that have several
        return set()
    return {
        f"{name}.{weight_name}"
        for name, module in model.named_modules()
        if any(module is embedding for embedding in embeddings)
        for weight_name, _ in module.named_parameters()
    }
