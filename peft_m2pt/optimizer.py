"""Parameter groups for optimizers: a learning rate for each kind of prompt, and no weight decay on prompts."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .layers.summary import list_trained


PROMPTS = ("visual", "textual", "interaction")


KINDS = (*PROMPTS, "connector")


def get_parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    visual_lr: float | None = None,
    textual_lr: float | None = None,
    interaction_lr: float | None = None,
    connector_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """
    Sorts the trainable parameters of a model into groups for a PyTorch optimizer.

    The groups are "visual", "textual", "interaction", "connector", and "other" for parameters outside of M2PT
    (`modules_to_save`, LoRA). Empty groups are left out.

    Args:
        model (`nn.Module`):
            A model with M2PT adapters, such as the output of `get_peft_model`.
        lr (`float`):
            The default learning rate.
        visual_lr (`float`, *optional*):
            The learning rate of visual prompts.
        textual_lr (`float`, *optional*):
            The learning rate of textual prompts.
        interaction_lr (`float`, *optional*):
            The learning rate of interaction prompts.
        connector_lr (`float`, *optional*):
            The learning rate of the tuned connector.
        weight_decay (`float`, defaults to 0.0):
            Weight decay of "connector" and "other". It does not apply to prompts, nor to biases and other
            one-dimensional parameters, which are then in groups "connector_no_decay" and "other_no_decay".

    Returns:
        `list[dict[str, Any]]`: Groups with "name", "params", "lr" and "weight_decay".

    Raises:
        ValueError: If the model has no trainable parameters of M2PT, if a learning rate is given for something that is
            not trained, or if a number is invalid or negative.

    Example:

    ```py
    >>> groups = peft_m2pt.get_parameter_groups(model, lr=7e-4, connector_lr=2e-5)
    >>> trainer = Trainer(model=model, optimizers=(torch.optim.AdamW(groups), None), ...)
    ```
    """
    own_rates = dict(zip(KINDS, (visual_lr, textual_lr, interaction_lr, connector_lr)))
    own_rates = {kind: rate for kind, rate in own_rates.items() if rate is not None}
    numbers = {"lr": lr, **{f"{kind}_lr": rate for kind, rate in own_rates.items()}, "weight_decay": weight_decay}
    for name, number in numbers.items():
        _check_number(name, number)
    trained = _trained_parameters(model)
    if not trained.keys() & set(KINDS):
        raise ValueError(
            f"{type(model).__name__} has no trainable weights of M2PT. Add some with get_peft_model(model, "
            f"M2PTConfig(...)), or load an adapter with is_trainable=True."
        )
    for kind, rate in own_rates.items():
        if kind not in trained:
            raise ValueError(
                f"{kind}_lr={rate}, but the active adapters only train {list(trained)}. Leave {kind}_lr out."
            )
    groups = []
    for name, parameters in trained.items():
        group = {"name": name, "params": parameters, "lr": own_rates.get(name, lr), "weight_decay": 0.0}
        if name in PROMPTS or weight_decay == 0:
            groups.append(group)
            continue
        # DeepSpeed flattens and partitions parameters, but keeps their shape.
        is_matrix = {p: len(getattr(p, "ds_shape", p.shape)) > 1 for p in parameters}
        groups.append({**group, "params": [p for p in parameters if is_matrix[p]], "weight_decay": weight_decay})
        others = [p for p in parameters if not is_matrix[p]]
        groups.append({**group, "params": others, "name": f"{name}_no_decay"})
    return [group for group in groups if group["params"]]


def _trained_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters by kind, or "other". Shared parameters are listed once."""
    kinds = {
        parameter: part.name for part in list_trained(model) if part.name in KINDS for parameter in part.parameters
    }
    trained: dict[str, list[nn.Parameter]] = {}
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        trained.setdefault(kinds.get(parameter, "other"), []).append(parameter)
    return {kind: trained[kind] for kind in (*KINDS, "other") if kind in trained}


def _check_number(name: str, number: Any) -> None:
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not is_number or not math.isfinite(number) or number < 0:
        raise ValueError(f"{name}={number!r} is not a finite number of at least 0.")
