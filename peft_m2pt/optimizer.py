"""Parameter groups for optimizers: a learning rate for each kind of prompts, and no weight decay on them."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .report import measure


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
    Sorts what is trained into groups for an optimizer of torch, every parameter into one.

    The groups are named "visual", "textual", "interaction" and "connector", as far as there is something in them.
    What is trained besides M2PT (`modules_to_save`, LoRA) is in a group "other".

    Args:
        model (`nn.Module`):
            A model with M2PT adapters, such as `get_peft_model` returns. Only trainable parameters count: those of the
            active adapters.
        lr (`float`):
            The learning rate of all groups that are given no own one.
        visual_lr (`float`, *optional*):
            The learning rate of visual prompts.
        textual_lr (`float`, *optional*):
            The learning rate of textual prompts.
        interaction_lr (`float`, *optional*):
            The learning rate of interaction prompts.
        connector_lr (`float`, *optional*):
            The learning rate of the tuned connector.
        weight_decay (`float`, defaults to 0.0):
            Weight decay of the connector and of the group "other". Prompts have none, nor have biases and other
            parameters of one dimension, which are then in groups "connector_no_decay" and "other_no_decay".

    Returns:
        `list[dict[str, Any]]`: Groups with "name", "params", "lr" and "weight_decay".

    Raises:
        ValueError: If nothing of M2PT is trainable in the model, if there is a learning rate for something that it
            does not train, or if a number is negative or no number.

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
            f"{type(model).__name__} has no trainable weights of M2PT. Give it some with get_peft_model(model, "
            f"M2PTConfig(...)), or load an adapter with is_trainable=True."
        )
    for kind, rate in own_rates.items():
        if kind not in trained:
            raise ValueError(
                f"{kind}_lr={rate}, but the active adapters train nothing of this kind, only {list(trained)}. Leave "
                f"{kind}_lr out."
            )
    groups = []
    for name, parameters in trained.items():
        group = {"name": name, "params": parameters, "lr": own_rates.get(name, lr), "weight_decay": 0.0}
        if name in PROMPTS or weight_decay == 0:
            groups.append(group)
            continue
        matrices, others = _split(parameters)
        groups.append({**group, "params": matrices, "weight_decay": weight_decay})
        groups.append({**group, "params": others, "name": f"{name}_no_decay"})
    return [group for group in groups if group["params"]]


def _trained_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of each kind, and of none ("other"). One that has several names is there once."""
    kinds = {parameter: part.name for part in measure(model) if part.name in KINDS for parameter in part.parameters}
    trained: dict[str, list[nn.Parameter]] = {}
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        trained.setdefault(kinds.get(parameter, "other"), []).append(parameter)
    return {kind: trained[kind] for kind in (*KINDS, "other") if kind in trained}


def _split(parameters: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parts matrices from biases and the like."""
    matrices, others = [], []
    for parameter in parameters:
        # DeepSpeed keeps a flat part of a parameter on each device.
        num_dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        (matrices if num_dimensions > 1 else others).append(parameter)
    return matrices, others


def _check_number(name: str, number: Any) -> None:
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not is_number or not math.isfinite(number) or number < 0:
        raise ValueError(f"{name}={number!r} is not a number of 0 or more.")
