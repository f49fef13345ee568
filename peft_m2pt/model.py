"""The tuner: injects, loads, combines, removes and describes M2PT adapters."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, delete_adapter
from peft.utils import ModulesToSaveWrapper, PeftType
from torch import nn

from .adapted import layer_of, release
from .anatomy.compiled import plain, rebind_compiled, uncompiled
from .config import M2PTConfig
from .errors import UnsupportedModelError
from .hooks.install import install_hooks
from .layers.attention import M2PTAttention
from .layers.base import M2PTLayer
from .layers.connector import M2PTConnector
from .layers.initializer import PromptInitializer
from .layers.mixed_batch import check_adapter_names, check_batch_size, make_sample_adapters, use_adapters
from .layers.prompt import M2PTPrompt
from .layers.summary import describe
from .layers.weighted import Combination
from .plan import Plan, check_modules_to_save, make_plan
from .register import PREFIX
from .saving.checks import check_state_dict, read_weights
from .saving.model_card import complete_model_cards
from .saving.names import WRAPPER_PREFIX, check_name, without_prefix, wrapper_prefix
from .saving.scales import broadcast_scales, missing_scales
from .stacking import (
    check_name_is_free,
    check_nesting,
    check_no_alora,
    keep_trained_modules,
    without_transparent_wrappers,
    without_wrappers,
)


NOT_MERGEABLE = (
    "M2PT cannot be merged into the base weights: prompts are additional keys and values that every token attends "
    "to, not a change of any weight. Keep the adapter beside the model (it adds about 0.1% of its parameters), or "
    "remove it with `unload()`."
)


class M2PTModel(BaseTuner):
    """
    M2PT, Multimodal Prompt Tuning, on a frozen multimodal model.

    Args:
        model (`transformers.PreTrainedModel`):
            The model to adapt.
        config ([`M2PTConfig`]):
            The configuration of the adapter.
        adapter_name (`str`):
            Name of the adapter.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`):
            Create the prompts on the meta device, for loading saved ones.

    Raises:
        UnsupportedModelError: If the model cannot be adapted. It is left unchanged.
        ValueError: If the config does not fit the model.

    **Attributes**:
        - **model** (`transformers.PreTrainedModel`) -- The adapted model.
        - **peft_config** ([`M2PTConfig`]) -- The configuration.
    """

    prefix = PREFIX
    tuner_layer_cls = M2PTLayer

    # Whether other weights will replace those of the adapter that is being injected.
    weights_follow = False

    # Only set while an adapter is being injected.
    _plan: Plan
    _initializer: PromptInitializer

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_name_is_free(model, adapter_name)
        check_no_alora(model)
        # In a list, so that it is not a submodule. `unload` returns it, with its other wrappers.
        self._wrapped = [model]
        # The config fields resolved for the model, by adapter.
        self.resolved: dict[str, dict[str, Any]] = {}
        super().__init__(without_transparent_wrappers(model), peft_config, adapter_name, *args, **kwargs)

    @property
    def own_configs(self) -> dict[str, M2PTConfig]:
        """The configs of the M2PT adapters. `peft_config` also has those of other methods."""
        return {name: config for name, config in self.peft_config.items() if isinstance(config, M2PTConfig)}

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        with keep_trained_modules(self.model, self.own_configs):
            super().set_adapter(adapter_name, inference_mode)

    def describe(self) -> str:
        """
        Returns a table of what is trained in each part of the model: module path, layers, prompts per layer, number
        and share of parameters and, after a backward pass, gradient norm.

        Example:

        ```py
        >>> print(model.base_model.describe())
        ```
        """
        return describe(self.model, self.active_adapters)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float] | None = None,
        adapter_name: str = "combined",
        combination_type: str = "linear",
    ) -> None:
        """
        Combines adapters into a new one, which is not activated.

        Args:
            adapters (`Sequence[str]`):
                Names of the adapters to combine. They need prompts in the same layers.
            weights (`Sequence[float]`, *optional*):
                The weight w of each adapter, 1 by default.
            adapter_name (`str`, defaults to `"combined"`):
                Name of the new adapter.
            combination_type (`str`, defaults to `"linear"`):
                "linear": prompts `sum_i w_i P_i`, and the frozen connector plus the weighted sum of the adapters'
                changes to it. "cat": concatenated prompts `[P_1 ; P_2 ; ...]`, without weights, for adapters that have
                not tuned the connector.

        Raises:
            ValueError: If the adapters cannot be combined. The message names the field or the module.

        Example:

        ```py
        >>> model.add_weighted_adapter(["digits", "letters"], adapter_name="both", combination_type="cat")
        >>> model.set_adapter("both")
        ```
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r}: there is already an adapter of this name.")
        combination = Combination(
            adapters, [1.0] * len(adapters) if weights is None else list(weights), combination_type
        )
        combination.check(self.model, self.own_configs, self.resolved)
        self.peft_config[adapter_name] = combination.make_config(self.own_configs, self.resolved)
        self.weights_follow = True
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        finally:
            self.weights_follow = False
        combination.combine_weights(self.model, adapter_name)
        self.set_adapter(self.active_adapters)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        check_name(adapter_name)
        check_modules_to_save(self.peft_config)
        model = without_wrappers(model)
        config = self.own_configs[adapter_name]
        source = config.pop_source()
        makes_empty_weights = low_cpu_mem_usage or M2PTPrompt(1, 1).weight.is_meta
        weights_follow = self.weights_follow or source is not None or makes_empty_weights or state_dict is not None
        targeted = list(self.targeted_module_names)
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

        def roll_back() -> None:
            self._roll_back(model, adapter_name)
            self.targeted_module_names = list(targeted)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)

        try:
            weights = None if source is None else read_weights(source, model, config)
            self._plan = make_plan(model, config)
            sites = list(self._plan.sites.values())
            self._initializer = PromptInitializer(config, model, sites, weights_follow)
            if weights is not None:
                # Inject on the meta device first, to check that the weights fit before any memory is allocated.
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    super().inject_adapter(model, adapter_name, autocast_adapter_dtype, True, state_dict)
                self._remap_adapter_state_dict_for_load(model, config, adapter_name, weights)
                roll_back()
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            self.targeted_module_names = list(dict.fromkeys(map(plain, self.targeted_module_names)))
            if self._initializer.is_scaled and not weights_follow:
                broadcast_scales(model, adapter_name)
            install_hooks(model, adapter_name, self.peft_config, sites, self._plan.connector)
            rebind_compiled(model)
            config.resolved = self.resolved[adapter_name] = self._plan.resolved
        except Exception as error:
            roll_back()
            if isinstance(error, NotImplementedError):
                raise UnsupportedModelError(f"PEFT cannot adapt {type(model).__name__}: {error}") from error
            raise
        finally:
            for name in ("_plan", "_initializer"):
                vars(self).pop(name, None)

    def _roll_back(self, model: nn.Module, adapter_name: str) -> None:
        """Undoes a failed injection."""
        for path, module in list(model.named_modules()):
            if not isinstance(module, (M2PTLayer, ModulesToSaveWrapper)):
                continue
            is_layer = isinstance(module, M2PTLayer)
            if module._get_available_adapters() - {adapter_name}:
                module.delete_adapter(adapter_name, *([] if is_layer else [module.active_adapters]))
                continue
            if is_layer:
                release(module.base_layer)
            else:
                parent_path, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent_path), name, module.original_module)
        rebind_compiled(model)

    def _prepare_adapter_config(self, peft_config: M2PTConfig, model_config: dict) -> M2PTConfig:
        return peft_config

    def _prepare_model(self, peft_config: M2PTConfig, model: nn.Module) -> None:
        peft_config.target_modules = set(self._plan.targets)

    def _check_target_module_exists(self, peft_config: M2PTConfig, key: str) -> Any:
        # PEFT's version would also match paths that end in that of a target.
        key, known = plain(key), self._plan.targets | self._plan.excluded
        return key in known and super()._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: M2PTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        path, plan = plain(current_key), self._plan
        if path not in {*plan.targets, *plan.sites}:  # found by PEFT in a state dict
            raise ValueError(
                f"The state dict has weights for '{path}', which the config of adapter '{adapter_name}' does not "
                f"adapt. Inject it with the M2PTConfig (adapter_config.json) that it was trained with."
            )
        layer = layer_of(uncompiled(target))
        if layer is not None and adapter_name in layer._get_available_adapters():
            return  # PEFT finds compiled modules twice
        if path in plan.sites:
            site = plan.sites[path]
            layer = layer or M2PTAttention(site)
            num_interaction_tokens = 0 if site.connector is None else plan.num_interaction_tokens
            layer.update_layer(
                adapter_name, plan.num_tokens(site), num_interaction_tokens, site.connector, self._initializer
            )
        elif plan.connector is not None:
            layer = layer or M2PTConnector(plan.connector)
            layer.update_layer(
                adapter_name,
                peft_config.tune_connector,
                plan.connector_rank,
                plan.num_tokens_per_image,
                self._initializer,
            )

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Generator[None]:
        """PEFT enters this context around calls of the model, and passes `adapter_names` to it."""
        if adapter_names is None:
            yield
            return
        check_adapter_names(self.model, adapter_names, self.own_configs)
        names = list(inspect.signature(type(self.model).forward).parameters)[1:]
        arguments = {**dict(zip(names, args)), **kwargs}
        check_batch_size(adapter_names, arguments)
        image_token_id = getattr(self.model.config, "image_token_id", None)
        with use_adapters(make_sample_adapters(adapter_names, arguments.get("input_ids"), image_token_id)):
            yield

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        # PEFT's version would also remove the adapters of other methods.
        if merge:
            self._check_merge_allowed()
        names = set(self.own_configs)
        for path, module in list(self.model.named_modules()):
            if isinstance(module, M2PTLayer):
                release(module.base_layer)
            elif isinstance(module, ModulesToSaveWrapper) and names.issuperset(module.modules_to_save):
                parent_path, _, name = path.rpartition(".")
                setattr(self.model.get_submodule(parent_path), name, module.original_module)
        rebind_compiled(self.model)
        if names.issuperset(self.peft_config):
            del without_wrappers(self.model).peft_config
        else:
            for name in names:
                del self.peft_config[name]
        return self._wrapped[0]

    def delete_adapter(self, adapter_name: str) -> None:
        config = self.peft_config.get(adapter_name)
        super().delete_adapter(adapter_name)
        if config is not None and not isinstance(config, M2PTConfig):
            delete_adapter(self.model, adapter_name, PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(config.peft_type)])
        if not self.active_adapters and self.peft_config:
            layers = (module for module in self.model.modules() if isinstance(module, BaseTunerLayer))
            others = (layer.active_adapters for layer in layers if not isinstance(layer, M2PTLayer))
            self.active_adapter = next(others, [])

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(NOT_MERGEABLE)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: M2PTConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        # The only method that PEFT calls with the `PeftModel` when it saves an adapter.
        if isinstance(model, PeftModel):
            check_nesting(model, is_own=isinstance(model.base_model, M2PTModel))
        tuner = next((module for module in model.modules() if isinstance(module, M2PTModel)), None)
        if tuner is not None:  # None after `inject_adapter_in_model`, or if an inner `PeftModel` is saved
            config.resolved = tuner.resolved[adapter_name]
            if isinstance(model, PeftModel):
                complete_model_cards(model, config)
        state_dict = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        state_dict |= missing_scales(model, state_dict)
        # There may be an outer `PeftModel`.
        prefix = WRAPPER_PREFIX if isinstance(model, PeftModel) else ""
        return {prefix + without_prefix(name): weight for name, weight in state_dict.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT also derives the names of weights in a checkpoint with this method.
        return super()._remove_adapter_name_from_key(plain(key), adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # Weights saved without a `PeftModel` have no prefix.
        if prefix := wrapper_prefix(model):
            state_dict = {prefix + without_prefix(name): weight for name, weight in state_dict.items()}
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_state_dict(model, adapter_name, state_dict)
        return state_dict
