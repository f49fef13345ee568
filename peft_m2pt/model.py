"""The tuner: finds the attention modules of a model, gives them prompts, and reports on them."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, delete_adapter
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .adapted import layer_of, release
from .anatomy import find_sites
from .base import NOT_MERGEABLE, M2PTLayer
from .card import own_card
from .chunks import refuse_unclear_chunks
from .config import M2PTConfig
from .connector import M2PTConnector
from .continuous_batching import refuse_continuous_batching
from .entrances import let_gradients_in
from .errors import UnsupportedModelError
from .graft import quantised_linears
from .init import PromptInitialiser
from .interaction import resolve_interaction
from .layer import M2PTAttention
from .loading import check_saved_modules, check_state_dict
from .names import plain, rebind_compiled, uncompiled
from .notes import let_caches_carry_notes
from .packing import refuse_boundaries_of_text, refuse_mixed_sequences
from .processes import agree_on_scales, let_take_part
from .prompt import M2PTPrompt
from .register import PREFIX
from .report import describe
from .samples import BASE, check_number, describe_samples, using
from .stacking import (
    WRAPPER_PREFIX,
    check_name,
    check_name_is_free,
    check_nesting,
    check_no_invocations,
    keeping_trained_modules,
    refuse_later_adapters,
    without_passing_wrappers,
    without_prefix,
    without_wrappers,
    wrapper_prefix,
)
from .starts import note_starts_of_others
from .towers import find_tower, has_tower
from .upstream import renamed_weights
from .weighted import add_weighted_adapter


# What torch puts into module paths where it checkpoints a module.
CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."


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
        UnsupportedModelError: If the model cannot be adapted. It is then as it was.
        ValueError: If the config does not fit the model.

    **Attributes**:
        - **model** (`transformers.PreTrainedModel`) -- The adapted model.
        - **peft_config** ([`M2PTConfig`]) -- The configuration.
    """

    prefix = PREFIX
    tuner_layer_cls = M2PTLayer

    # Whether what is being injected will be filled with other weights.
    weights_follow = False

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_name_is_free(model, adapter_name)
        check_no_invocations(model)
        # No child: whoever asks a `PeftModel` for its base model, as trainers do, is to get the base model.
        self._wrapped = [model]
        super().__init__(without_passing_wrappers(model), peft_config, adapter_name, *args, **kwargs)

    @property
    def own_configs(self) -> dict[str, M2PTConfig]:
        """The configs of the M2PT adapters. The model may have adapters of other methods too."""
        return {name: config for name, config in self.peft_config.items() if isinstance(config, M2PTConfig)}

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        with keeping_trained_modules(self.model, self.own_configs):
            super().set_adapter(adapter_name, inference_mode)

    def describe(self) -> str:
        """
        Returns a table of the prompts: for each part of the model its module path, layers, prompts per layer,
        parameters and their share of the model, and, after a backward pass, the norm of their gradients.

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
        Makes a new adapter out of others, which stay as they are. It is not active.

        Args:
            adapters (`Sequence[str]`):
                Names of the adapters to combine. They need prompts in the same layers.
            weights (`Sequence[float]`, *optional*):
                The weight w of each. 1 by default.
            adapter_name (`str`, defaults to `"combined"`):
                Name of the new adapter.
            combination_type (`str`, defaults to `"linear"`):
                "linear": prompts `sum_i w_i P_i`, and a connector that differs from the frozen one by the weighted sum
                of what each adapter changed in it. "cat": prompts `[P_1 ; P_2 ; ...]`, all side by side; there are no
                weights then, and no adapter may have tuned the connector.

        Raises:
            ValueError: If the adapters do not fit together. The message names the field or the module.

        Example:

        ```py
        >>> model.add_weighted_adapter(["digits", "letters"], adapter_name="both", combination_type="cat")
        >>> model.set_adapter("both")
        ```
        """
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        check_name(adapter_name)
        _check_modules_to_save(self.peft_config)
        model = without_wrappers(model)
        config = self.peft_config[adapter_name]
        self._source = config.source if config.loads_weights else None
        # Once, since the config may serve for new adapters after that.
        config.source, config.loads_weights = None, False
        makes_empty_weights = low_cpu_mem_usage or M2PTPrompt(1, 1).weight.is_meta
        self._init_is_overwritten = (
            self.weights_follow or self._source is not None or makes_empty_weights or state_dict is not None
        )
        targeted = list(self.targeted_module_names)
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

        def take_back() -> None:
            self._take_back(model, adapter_name)
            self.targeted_module_names = list(targeted)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)

        try:
            if self._source is not None:
                # A rehearsal on the meta device: what is to be loaded takes no memory before it is known to fit.
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    super().inject_adapter(model, adapter_name, autocast_adapter_dtype, True, state_dict)
                self._remap_adapter_state_dict_for_load(model, config, adapter_name, self._weights)
                take_back()
                self._source = None
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            self.targeted_module_names = list(dict.fromkeys(map(plain, self.targeted_module_names)))
            if self._initialise.scales and not self._init_is_overwritten:
                agree_on_scales(model, adapter_name)
            self._prepare_entrances(model, adapter_name)
            rebind_compiled(model)
            self.resolved = {**getattr(self, "resolved", {}), adapter_name: config.resolved}
        except Exception as error:
            take_back()
            if isinstance(error, NotImplementedError):
                raise UnsupportedModelError(f"PEFT cannot adapt {type(model).__name__}: {error}") from error
            raise
        finally:
            self._source = self._weights = self._initialise = None

    def _load_weights(self, model: nn.Module, config: M2PTConfig) -> None:
        """Reads the weights that PEFT is about to load, so that wrong ones are refused before anything is changed."""
        weights = self._source.load_weights(renamed_weights(model))
        self._weights = {key.removeprefix("base_model.model."): weight for key, weight in weights.items()}
        check_saved_modules(model, config, self._weights)
        if config.num_interaction_tokens is None and any("m2pt_interaction" in name for name in self._weights):
            # `None` used to mean that in both placements.
            config.num_interaction_tokens = config.num_visual_tokens

    def _prepare_entrances(self, model: nn.Module, adapter_name: str) -> None:
        """Prepares each tower with prompts of an adapter, at its first layer."""
        config = self.peft_config[adapter_name]
        first_layers = {}
        for kind in ("visual", "textual"):
            layers = (layer_of(site.attention) for site in self._sites.values() if site.kind == kind)
            layer = next((layer for layer in layers if layer and layer._adapters([adapter_name])), None)
            if layer is None:
                continue
            first_layers[kind] = layer
            if layer.hooks:
                continue
            tower_path, tower = find_tower(model, kind, config)
            layer.hooks += let_gradients_in(model, tower_path, layer.site.path)
            if kind == "visual":
                layer.hooks += refuse_boundaries_of_text(tower, layer)
            else:
                let_caches_carry_notes()
                layer.hooks += note_starts_of_others(model, layer.base_layer)
                layer.hooks += refuse_mixed_sequences(layer)
                layer.hooks += refuse_unclear_chunks(model, layer)
                layer.hooks += refuse_continuous_batching(model)
            layer.hooks += refuse_later_adapters(model, layer, self.peft_config)
        if has_tower(model, "textual", config):
            self._prepare_for_processes(model, config, first_layers)

    def _prepare_for_processes(
        self, model: nn.Module, config: M2PTConfig, first_layers: dict[str, M2PTAttention]
    ) -> None:
        """Prepares for training in several processes, of which some may have no images in a step."""
        _, decoder = find_tower(model, "textual", config)
        if layer := first_layers.get("visual"):
            _, tower = find_tower(model, "visual", config)
            layer.hooks += let_take_part(model, tower, layer, decoder)
        connector = layer_of(self._connector.module) if self._connector is not None else None
        if connector is not None:
            next(iter(first_layers.values())).hooks += let_take_part(model, connector, connector, decoder)

    def _take_back(self, model: nn.Module, adapter_name: str) -> None:
        """Undoes what an injection has done before it failed."""
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
        # PEFT calls this before it changes anything, so this is where a model is refused.
        _check_disk_offload(model)
        _check_compiled_modules(model, peft_config)
        if self._source is not None:
            self._load_weights(model, peft_config)
        sites = find_sites(model, peft_config)
        num_interaction_tokens, self._connector = resolve_interaction(model, peft_config)
        if num_interaction_tokens > 0 and peft_config.interaction_placement == "layers":
            sites = [replace(site, connector=self._connector) if site.kind == "textual" else site for site in sites]
        self._initialise = PromptInitialiser(peft_config, model, sites, self._init_is_overwritten)
        self._sites = {site.path: site for site in sites}
        self._targets = set(self._sites)
        in_image = num_interaction_tokens > 0 and peft_config.interaction_placement == "image"
        adapts_connector = self._connector is not None and (peft_config.tune_connector or in_image)
        if adapts_connector:
            self._targets.add(self._connector.path)
        peft_config.target_modules = set(self._targets)
        if adapts_connector:
            self._check_connector(peft_config)
        self._check_exclusions(peft_config)
        peft_config.resolved = {"num_interaction_tokens": num_interaction_tokens}
        if isinstance(peft_config.exclude_modules, str):
            # Who loads the adapter need not trust in a regular expression.
            chosen = [path for path in self._sites if self._check_target_module_exists(peft_config, path)]
            peft_config.resolved["exclude_modules"] = sorted(set(self._sites) - set(chosen))

    def _check_target_module_exists(self, peft_config: M2PTConfig, key: str) -> Any:
        # PEFT also takes modules whose paths only end in that of a target.
        key = plain(key)
        return key in self._targets and super()._check_target_module_exists(peft_config, key)

    def _check_connector(self, peft_config: M2PTConfig) -> None:
        path = self._connector.path
        inside = [f"{path}.{name}" if name else path for name, _ in self._connector.module.named_modules()]
        saved = [name for name in peft_config.modules_to_save or [] if any(part.endswith(name) for part in inside)]
        excluded = not self._check_target_module_exists(peft_config, path)
        if saved or excluded:
            field = f"modules_to_save={saved}" if saved else f"exclude_modules={peft_config.exclude_modules}"
            raise ValueError(
                f"{field} names the connector '{path}' or a part of it, but the adapter needs it: tune_connector=True "
                f"trains and saves a copy of it. Do not name it, or set tune_connector=False and "
                f"num_interaction_tokens=0."
            )
        widths = [module.in_features for module in self._connector.module.modules() if hasattr(module, "in_features")]
        if peft_config.connector_rank is not None and peft_config.connector_rank > max(widths, default=0):
            raise ValueError(
                f"connector_rank={peft_config.connector_rank} is more than the widest linear layer of the connector "
                f"'{path}' is wide ({max(widths, default=0)}). Choose a lower one, or None for a full copy."
            )
        quantised = quantised_linears(self._connector.module)
        if peft_config.tune_connector and peft_config.connector_rank is None and quantised:
            raise ValueError(
                f"The connector '{path}' has quantised linear layers {quantised}, of which no copy can be trained. "
                f"Train an update of it with connector_rank=8, for example, or set tune_connector=False, or load the "
                f"model without quantising '{path}'."
            )

    def _check_exclusions(self, peft_config: M2PTConfig) -> None:
        """Prompts that were asked for must not vanish without a word."""
        left = {path for path in self._sites if self._check_target_module_exists(peft_config, path)}
        for kind in ("visual", "textual"):
            paths = [path for path, site in self._sites.items() if site.kind == kind]
            if not paths or left.intersection(paths):
                continue
            raise ValueError(
                f"exclude_modules={peft_config.exclude_modules} and modules_to_save={peft_config.modules_to_save} "
                f"leave no attention module, such as '{paths[0]}', for {kind} prompts. To do without them, set "
                f"num_{kind}_tokens=0."
            )

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
        current_key = plain(current_key)
        if current_key not in self._targets:  # PEFT has found it in a state dict
            raise ValueError(
                f"The state dict has weights for '{current_key}', to which the config of adapter '{adapter_name}' "
                f"gives none. Inject it with the M2PTConfig (adapter_config.json) that it was trained with."
            )
        in_layers = peft_config.interaction_placement == "layers"
        num_interaction_tokens = peft_config.resolved["num_interaction_tokens"]
        layer = layer_of(uncompiled(target))
        if layer is not None and adapter_name in layer._get_available_adapters():
            # PEFT comes here twice, if the module itself is compiled.
            return
        if current_key in self._sites:
            site = self._sites[current_key]
            layer = layer or M2PTAttention(site)
            num_tokens = peft_config.num_visual_tokens if site.kind == "visual" else peft_config.num_textual_tokens
            num_interaction_tokens = num_interaction_tokens if in_layers and site.kind == "textual" else 0
            layer.update_layer(adapter_name, num_tokens, num_interaction_tokens, site.connector, self._initialise)
        else:
            layer = layer or M2PTConnector(self._connector)
            num_interaction_tokens = 0 if in_layers else num_interaction_tokens
            if num_interaction_tokens > 0:
                layer.register_hooks(without_wrappers(self.model))
            layer.update_layer(
                adapter_name,
                peft_config.tune_connector,
                peft_config.connector_rank,
                num_interaction_tokens,
                self._initialise,
            )

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        """PEFT opens this context around calls of the model, and leaves `adapter_names` to it."""
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        names = list(inspect.signature(type(self.model).forward).parameters)[1:]
        arguments = {**dict(zip(names, args)), **kwargs}
        check_number(adapter_names, arguments)
        input_ids = arguments.get("input_ids")
        image_token_id = getattr(self.model.config, "image_token_id", None)
        with using(describe_samples(adapter_names, input_ids, image_token_id)):
            yield

    def _check_adapter_names(self, adapter_names: Sequence[str]) -> None:
        if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
            raise TypeError(f"adapter_names={adapter_names!r} is not a list of names, one for each sample.")
        unknown = sorted(set(adapter_names) - {*self.own_configs, BASE})
        if unknown or not adapter_names:
            raise ValueError(
                f"adapter_names={list(adapter_names)}: {unknown or 'nothing'} is not the name of an adapter. There "
                f"are {sorted(self.own_configs)}, and {BASE!r} for none."
            )
        if self.training:
            raise ValueError(
                "adapter_names says which adapter each sample uses, which is not possible in training mode. Call "
                "model.eval(), or train the adapters one after the other."
            )
        for path, module in self.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper) and self.own_configs.keys() & module.modules_to_save.keys():
                raise ValueError(
                    f"adapter_names={list(adapter_names)}: '{path}' was trained with an adapter (modules_to_save) and "
                    f"cannot be another for each sample. Run the samples of each adapter apart."
                )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        # PEFT's version would remove the adapters of other methods too.
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
        if not isinstance(config, M2PTConfig):
            delete_adapter(self.model, adapter_name, PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type])
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
        # Of all that PEFT does to save a model, this is where the method gets to see it.
        if isinstance(model, PeftModel):
            check_nesting(model, is_own=isinstance(model.base_model, M2PTModel))
        tuner = next((module for module in model.modules() if isinstance(module, M2PTModel)), None)
        if tuner is not None:  # not so where M2PT was injected, or where the model that it was added to is saved
            config.resolved = tuner.resolved[adapter_name]
            own_card(model, config)
        state_dict = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        state_dict |= _left_out_scales(model, state_dict)
        # Another `PeftModel` may stand around this one.
        prefix = WRAPPER_PREFIX if isinstance(model, PeftModel) else ""
        return {prefix + without_prefix(name): weight for name, weight in state_dict.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT also asks this way for the names under which it finds weights in a checkpoint.
        return super()._remove_adapter_name_from_key(plain(key), adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # What was saved of a model without a `PeftModel` around it has no prefix.
        if prefix := wrapper_prefix(model):
            state_dict = {prefix + without_prefix(name): weight for name, weight in state_dict.items()}
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_state_dict(model, adapter_name, state_dict)
        return state_dict


def _left_out_scales(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The units of prompts whose weights are in a state dict that FSDP2 has collected without them."""
    scales = {}
    for path, module in model.named_modules():
        if isinstance(module, M2PTPrompt) and module.scale is not None:
            # State dicts do not tell of the wrappers for checkpointing.
            path = path.replace(CHECKPOINT_WRAPPER, "")
            if f"{path}.weight" in state_dict and f"{path}.scale" not in state_dict:
                scales[f"{path}.scale"] = module.scale
    return scales


def _check_modules_to_save(configs: dict[str, PeftConfig]) -> None:
    """Refuses to save what adapters have of their own as if it were a part of the model."""
    for config, adapter_name in itertools.product(configs.values(), configs):
        for name in getattr(config, "modules_to_save", None) or ():
            if adapter_name.endswith(name) or (PREFIX in name and name.endswith(f".{adapter_name}")):
                raise ValueError(
                    f"modules_to_save={config.modules_to_save}: PEFT takes modules whose paths end in {name!r}, as "
                    f"those of weights of M2PT do, which are trained and saved anyway. Leave it out, or give a longer "
                    f"part of the path of the module that is meant."
                )


def _check_compiled_modules(model: nn.Module, config: M2PTConfig) -> None:
    """Refuses to train modules of compiled parts, which PEFT would not find again in what was saved."""
    for path, _ in model.named_modules():
        if plain(path) != path and any(path.endswith(name) for name in config.modules_to_save or ()):
            raise ValueError(
                f"modules_to_save={config.modules_to_save} names '{plain(path)}', which is in a part of the model "
                f"that is compiled, so that PEFT could not load it again. Compile this part after get_peft_model."
            )


def _check_disk_offload(model: nn.Module) -> None:
    """Refuses weights on disk that nobody fetches any more, since `PeftModel.from_pretrained` has stopped that."""
    on_disk = "disk" in (getattr(model, "hf_device_map", None) or {}).values()
    if on_disk and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UnsupportedModelError(
            "PeftModel.from_pretrained cannot load M2PT adapters into a model that is partly offloaded to disk: PEFT "
            "loses track of the weights there. Use model = get_peft_model(model, M2PTConfig.from_pretrained(adapter)) "
            "and set_peft_model_state_dict(model, load_peft_weights(adapter))."
        )
