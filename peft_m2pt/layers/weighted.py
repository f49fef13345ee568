"""Combines adapters of a model into a new one: `add_weighted_adapter`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..config import M2PTConfig
from .base import M2PTLayer
from .prompt import M2PTPrompt
from .trainable_copy import DOWN, UP


COMBINATIONS = ("cat", "linear")
SUMMED_FIELDS = ("num_visual_tokens", "num_textual_tokens", "num_interaction_tokens")
EQUAL_FIELDS = ("interaction_placement", "tune_connector")


@dataclass(frozen=True)
class Combination:
    """
    A weighted combination of adapters. See [`M2PTModel.add_weighted_adapter`].

    Args:
        adapters (`Sequence[str]`):
            Names of the adapters.
        weights (`Sequence[float]`):
            Their weights.
        combination_type (`str`):
            "linear" or "cat".
    """

    adapters: Sequence[str]
    weights: Sequence[float]
    combination_type: str

    def check(
        self, model: nn.Module, configs: Mapping[str, M2PTConfig], resolved: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """
        Checks that the adapters can be combined. For the arguments, see [`Combination.make_config`].

        Raises:
            ValueError: If they cannot. The message names the field or the module.
        """
        self._check_arguments(configs)
        self._check_fields([{**vars(configs[name]), **resolved[name]} for name in self.adapters])
        for path, wrapper in _saved_modules(model):
            owners = [name for name in self.adapters if name in wrapper.modules_to_save]
            if len(owners) > 1:
                raise ValueError(
                    f"The adapters {owners} have each trained '{path}' (modules_to_save), and such modules cannot be "
                    f"combined. Choose adapters of which only one has trained it."
                )
        for path, layer_name, modules in _weights(model):
            self._check_weights(path, layer_name, modules)

    def make_config(self, configs: Mapping[str, M2PTConfig], resolved: Mapping[str, Mapping[str, Any]]) -> M2PTConfig:
        """
        Makes the config of the new adapter.

        Args:
            configs (`Mapping[str, M2PTConfig]`):
                The configs of all M2PT adapters.
            resolved (`Mapping[str, Mapping[str, Any]]`):
                The fields that were resolved for the model, by adapter.

        Returns:
            [`M2PTConfig`]
        """
        others = [configs[name] for name in self.adapters]
        config = copy.copy(others[0])
        config.modules_to_save = list(dict.fromkeys(name for c in others for name in c.modules_to_save or ())) or None
        if self.combination_type == "cat":
            for field in SUMMED_FIELDS:
                setattr(config, field, sum({**vars(configs[name]), **resolved[name]}[field] for name in self.adapters))
        ranks = [resolved[name]["connector_rank"] for name in self.adapters]
        config.connector_rank = None if None in ranks else sum(ranks)
        # The new prompts are not those of a text. They have scales if those of any other adapter do.
        config.init_text = config.init_token_ids = config.tokenizer_name_or_path = None
        if any(other.init_prompts == "states" for other in others):
            config.init_prompts = "states"
        return config

    @torch.no_grad()
    def combine_weights(self, model: nn.Module, adapter_name: str) -> None:
        """
        Computes the weights of the new adapter.

        Args:
            model (`nn.Module`):
                The model, which has the new adapter already.
            adapter_name (`str`):
                Name of the new adapter.
        """
        for _, layer_name, modules in _weights(model):
            if adapter_name in modules:
                self._combine(layer_name, modules[adapter_name], [modules[name] for name in self.adapters])
        for _, wrapper in _saved_modules(model):
            for owner in self.adapters:
                if owner in wrapper.modules_to_save:
                    wrapper.update(adapter_name)
                    trained = wrapper.modules_to_save[adapter_name]
                    trained.load_state_dict(wrapper.modules_to_save[owner].state_dict())
                    trained.requires_grad_(False)

    def _check_arguments(self, configs: Mapping[str, M2PTConfig]) -> None:
        unknown = [name for name in self.adapters if name not in configs]
        if unknown or not self.adapters:
            raise ValueError(
                f"adapters={list(self.adapters)}: {unknown or 'nothing'} is not the name of an adapter. Choose from "
                f"{sorted(configs)}."
            )
        if self.combination_type not in COMBINATIONS:
            raise ValueError(f"combination_type={self.combination_type!r} is unknown. Choose one of {COMBINATIONS}.")
        if len(self.weights) != len(self.adapters):
            raise ValueError(
                f"weights={list(self.weights)} has {len(self.weights)} weights for {len(self.adapters)} adapters."
            )
        if self.combination_type == "cat" and any(weight != 1 for weight in self.weights):
            raise ValueError(
                f"weights={list(self.weights)}: combination_type='cat' concatenates prompts, without weights. Leave "
                f"them out, or choose combination_type='linear'."
            )

    def _check_fields(self, configs: Sequence[Mapping[str, Any]]) -> None:
        for field in EQUAL_FIELDS:
            values = [config[field] for config in configs]
            if len(set(values)) > 1:
                raise ValueError(
                    f"The adapters {list(self.adapters)} differ in {field}: {values}. They cannot be combined."
                )
        ranks = [config["connector_rank"] for config in configs]
        if None in ranks and any(ranks):
            raise ValueError(
                f"The adapters {list(self.adapters)} have connectors of connector_rank={ranks}, and a full copy "
                f"(None) cannot be combined with low-rank updates."
            )
        if len(configs) > 1 and configs[0]["tune_connector"] and self.combination_type == "cat":
            raise ValueError(
                f"combination_type='cat': the adapters {list(self.adapters)} have each tuned the connector, which "
                f"cannot be combined in this way. Train them with tune_connector=False, or choose "
                f"combination_type='linear'."
            )

    def _check_weights(self, path: str, layer_name: str, modules: nn.ModuleDict) -> None:
        present = [name for name in self.adapters if name in modules]
        if present and len(present) < len(self.adapters):
            missing = [name for name in self.adapters if name not in modules]
            raise ValueError(
                f"'{path}': the adapters {missing} have no prompts here, but {present} do. Choose other adapters."
            )
        if self.combination_type == "linear" and not _is_low_rank(layer_name):
            shapes = {name: [list(parameter.shape) for parameter in modules[name].parameters()] for name in present}
            if any(shape != shapes[present[0]] for shape in shapes.values()):
                raise ValueError(
                    f"'{path}': combination_type='linear' needs weights of equal shape, but the shapes are {shapes}. "
                    f"Choose combination_type='cat'."
                )

    def _combine(self, layer_name: str, target: nn.Module, sources: Sequence[nn.Module]) -> None:
        if _is_low_rank(layer_name):
            self._combine_low_rank(layer_name, target, [source.get_parameter("weight") for source in sources])
            return
        is_cat = self.combination_type == "cat"
        if isinstance(target, M2PTPrompt):
            prompts = [source().to(target.weight) for source in sources]
            target.set_rows(
                torch.cat(prompts) if is_cat else sum(w * prompt for w, prompt in zip(self.weights, prompts))
            )
            return
        # The new part is a copy of the frozen connector, to which the changes of the adapters are added.
        for name, parameter in target.named_parameters():
            others = [source.get_parameter(name).to(parameter) for source in sources]
            if is_cat:  # of one adapter
                parameter.copy_(others[0])
            else:
                start = parameter.clone()
                parameter.copy_(start + sum(w * (other - start) for w, other in zip(self.weights, others)))

    def _combine_low_rank(self, layer_name: str, target: nn.Module, matrices: Sequence[torch.Tensor]) -> None:
        """The sum of updates `B A` is `[w_1 B_1, w_2 B_2] [A_1 ; A_2]`, whose rank is the sum of theirs."""
        weight = target.get_parameter("weight")
        if layer_name.endswith(UP):
            matrices = [factor * matrix for factor, matrix in zip(self.weights, matrices)]
        weight.copy_(torch.cat([matrix.to(weight) for matrix in matrices], dim=1 if layer_name.endswith(UP) else 0))


def _is_low_rank(layer_name: str) -> bool:
    return layer_name.endswith((DOWN, UP))


def _weights(model: nn.Module) -> Iterator[tuple[str, str, nn.ModuleDict]]:
    """Yields each `ModuleDict` with weights of adapters, the path of its layer, and its name in it."""
    for path, module in list(model.named_modules()):
        if isinstance(module, M2PTLayer):
            for layer_name in module.adapter_layer_names:
                yield path, layer_name, getattr(module, layer_name)


def _saved_modules(model: nn.Module) -> list[tuple[str, ModulesToSaveWrapper]]:
    """The wrappers of modules that adapters train in full (`modules_to_save`), with their paths."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
