"""
The prompt rows [P_i ; f_in(V_i)] of the layers of a language model, for engines that prepend them as hidden states.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import inject_adapter_in_model
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..anatomy.connectors import find_connector
from ..config import M2PTConfig
from ..errors import BundleError
from ..layers.attention import M2PTAttention
from ..model import M2PTModel
from ..saving.checkpoints import Checkpoint
from ..upstream import make_on_meta, names_in_model
from .loading import weights_for


ADAPTER = "default"


HALF_TYPES = (torch.bfloat16, torch.float16)


PLAIN_TYPES = (torch.float64, torch.float32, *HALF_TYPES)


def make_tuned(config: PretrainedConfig, base: Path, adapter: Path) -> PreTrainedModel:
    """
    Makes a model with an adapter on the meta device and loads only the adapter, and the connector if interaction
    prompts of the language model go through it.

    Returns:
        `PreTrainedModel`: The model.

    Raises:
        BundleError: If the connector cannot be read from the weights of the base model.
        ValueError: If the adapter does not fit the model.
    """
    model = make_on_meta(config)
    m2pt_config = M2PTConfig.from_pretrained(str(adapter))
    weights = weights_for(model, m2pt_config.source)
    if m2pt_config.interaction_placement == "layers" and any("m2pt_interaction" in name for name in weights):
        _load_connector(model, find_connector(model, m2pt_config).path, base)
    m2pt_config.inference_mode = True
    inject_adapter_in_model(m2pt_config, model, ADAPTER, low_cpu_mem_usage=True)
    weights = M2PTModel._remap_adapter_state_dict_for_load(model, m2pt_config, ADAPTER, weights)
    # As PEFT does (`autocast_adapter_dtype`).
    weights = {name: weight.float() if weight.dtype in HALF_TYPES else weight for name, weight in weights.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    return model


def _load_connector(model: PreTrainedModel, path: str, base: Path) -> None:
    checkpoint = Checkpoint(base)
    names = names_in_model(model, checkpoint.tensors)
    wanted = {name: weight for name, weight in model.state_dict().items() if name.startswith(f"{path}.")}
    loaded = {}
    for name, expected in wanted.items():
        stored = checkpoint.tensors.get(names.get(name))
        if stored is None or stored.shape != expected.shape or stored.dtype not in PLAIN_TYPES:
            found = "nothing" if stored is None else f"shape {list(stored.shape)}, {stored.dtype}"
            is_quantized = getattr(model.config, "quantization_config", None) is not None
            reason = " (config.json has a quantization_config)" if is_quantized else ""
            raise BundleError(
                f"The interaction prompts of the adapter go through the connector, whose weight '{name}' is needed: "
                f"expected shape {list(expected.shape)} of floating-point numbers in the weights of {base}, found "
                f"{found}{reason}. Bundle the adapter with a base model whose connector '{path}' is not quantized."
            )
        loaded[name] = checkpoint.read(names[name]).to(expected.dtype)
    model.load_state_dict(loaded, strict=False, assign=True)


@torch.no_grad()
def textual_rows(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    Computes the prompt rows of all layers of the language model.

    Returns:
        `dict[str, torch.Tensor]`: The rows, of shape `(num_rows, text_width)` in float32, by the path of the attention
        module.

    Raises:
        BundleError: If a part of the connector is neither in the adapter nor in the weights of the base model.
    """
    rows = {}
    for module in model.modules():
        if isinstance(module, M2PTAttention) and module.site.kind == "textual":
            # float32 holds whatever dtype the connector computes in.
            rows[module.site.path] = module._prompt(ADAPTER, torch.empty(0, dtype=torch.float32))
    for path, prompt in rows.items():
        if prompt.is_meta or not prompt.isfinite().all():
            raise BundleError(
                f"The prompt rows of '{path}' cannot be computed without loading the whole base model, since the "
                f"connector has tensors that are not in its checkpoint. Load base and adapter with "
                f"PeftModel.from_pretrained instead of bundling them."
            )
    return rows
