"""
What an adapter will change in a model: decided, or refused, before anything is changed.

`peft-m2pt inspect` prints the plan, [`M2PTModel`] carries it out.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from .anatomy.compiled import plain
from .anatomy.connectors import find_connector
from .anatomy.layers import find_sites
from .anatomy.modules import linear_layers, own_modules, quantized_linears
from .anatomy.sites import Connector, Site
from .anatomy.towers import has_tower
from .attention.interface import find_extension
from .config import M2PTConfig
from .errors import UnsupportedModelError
from .layers.summary import count_parameters, format_ranges, format_table, star_layer
from .register import PREFIX


# Model types in which each row of the connector's output is an image token, for any number of rows.
IMAGE_PLACEMENT = ("llava",)

# The highest of `connector_rank="auto"`.
DEFAULT_RANK = 64

COLUMNS = ("part", "module", "layers", "tokens", "parameters", "share")


@dataclass(frozen=True)
class Plan:
    """
    What an adapter will change in a model.

    Args:
        config ([`M2PTConfig`]):
            The configuration of the adapter.
        sites (`dict[str, Site]`):
            The attention modules of the chosen layers, by path.
        excluded (`frozenset[str]`):
            Paths of those excluded by `exclude_modules` or `modules_to_save`.
        connector ([`~peft_m2pt.anatomy.sites.Connector`], *optional*):
            The connector, if it is tuned or if interaction prompts go through it.
        num_interaction_tokens (`int`):
            Number of interaction prompts.
    """

    config: M2PTConfig
    sites: dict[str, Site]
    excluded: frozenset[str]
    connector: Connector | None
    num_interaction_tokens: int

    @property
    def num_tokens_per_image(self) -> int:
        """Number of interaction prompts in front of the features of each image."""
        return self.num_interaction_tokens if self.config.interaction_placement == "image" else 0

    @property
    def adapted_connector(self) -> Connector | None:
        """The connector, if it is adapted. In placement "layers", prompts can go through a frozen one."""
        return self.connector if self.config.tune_connector or self.num_tokens_per_image > 0 else None

    @property
    def connector_rank(self) -> int | None:
        """The rank of the trained update of the connector. `None`: there is none, but possibly a full copy."""
        if self.config.connector_rank != "auto":
            return cast("int | None", self.config.connector_rank)
        if self.connector is None or not self.config.tune_connector:
            return None
        module = self.connector.module
        rank = min(DEFAULT_RANK, _widest_linear(module))
        num_copied = sum(linear.in_features * linear.out_features for linear in linear_layers(module).values())
        # Packed weights cannot be copied.
        return rank if _update_size(module, rank) < num_copied or quantized_linears(module) else None

    @property
    def targets(self) -> set[str]:
        """Paths of all adapted modules."""
        connector = self.adapted_connector
        return {*self.sites, *([] if connector is None else [connector.path])} - self.excluded

    @property
    def resolved(self) -> dict[str, Any]:
        """Values of config fields as resolved for this model."""
        resolved: dict[str, Any] = {
            "num_interaction_tokens": self.num_interaction_tokens,
            "connector_rank": self.connector_rank,
        }
        if isinstance(self.config.exclude_modules, str):
            # Loading does not accept regular expressions, which are not safe from untrusted sources.
            resolved["exclude_modules"] = sorted(self.excluded)
        return resolved

    def num_tokens(self, site: Site) -> int:
        """Number of visual or textual prompts in a layer."""
        return self.config.num_visual_tokens if site.kind == "visual" else self.config.num_textual_tokens

    def describe(self, num_parameters: int) -> str:
        """
        Returns a table of what the adapter will train.

        Args:
            num_parameters (`int`):
                Number of parameters of the model, for the shares.
        """
        sizes: dict[tuple[str, ...], int] = defaultdict(int)
        layers: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for site in (site for path, site in self.sites.items() if path not in self.excluded):
            parts = [(site.kind, self.num_tokens(site), site.width)]
            if site.connector is not None:
                width = site.connector.width * (site.connector.rows_per_token or 1)
                parts.append(("interaction", self.num_interaction_tokens, width))
            for kind, num_tokens, width in parts:
                sizes[kind, star_layer(site.path), str(num_tokens)] += num_tokens * width
                layers[kind, star_layer(site.path), str(num_tokens)].append(site.layer)
        if (connector := self.adapted_connector) is not None:
            num_tokens = self.num_tokens_per_image
            sizes["interaction", connector.path, str(num_tokens)] = num_tokens * connector.width
            sizes["connector", connector.path, ""] = self._size_of(connector.module)
        sizes["total", "", ""] = sum(sizes.values())
        rows = [COLUMNS]
        for (kind, module, tokens), size in sizes.items():
            if size > 0:
                numbers = (format_ranges(layers[kind, module, tokens]), tokens, f"{size:,}")
                rows.append((kind, module, *numbers, f"{size / num_parameters:.4%}"))
        return format_table(rows, num_text_columns=3)

    def _size_of(self, connector: nn.Module) -> int:
        """Number of parameters that are trained of the connector."""
        if not self.config.tune_connector:
            return 0
        if self.connector_rank is not None:
            return _update_size(connector, self.connector_rank)
        modules = [module for _, module in own_modules(connector)]
        return count_parameters(parameter for module in modules for parameter in module.parameters(recurse=False))


def make_plan(model: nn.Module, config: M2PTConfig) -> Plan:
    """
    Plans what an adapter will change in a model. The model stays as it is.

    Args:
        model (`nn.Module`):
            The model, which may have adapters.
        config ([`M2PTConfig`]):
            The configuration of the adapter.

    Returns:
        [`Plan`]

    Raises:
        UnsupportedModelError: If the model cannot be adapted.
        ValueError: If the config does not fit the model.
    """
    _check_disk_offload(model)
    _check_compiled_modules(model, config)
    sites = find_sites(model, config)
    num_interaction_tokens, connector = _plan_interaction(model, config)
    if num_interaction_tokens > 0 and config.interaction_placement == "layers":
        sites = [replace(site, connector=connector) if site.kind == "textual" else site for site in sites]
    excluded = frozenset(site.path for site in sites if _is_excluded(config, site.path))
    _check_exclusions(config, sites, excluded)
    for site in sites:
        if site.path not in excluded:
            find_extension(site.attention, site.path)
    plan = Plan(config, {site.path: site for site in sites}, excluded, connector, num_interaction_tokens)
    if plan.adapted_connector is not None:
        _check_connector(plan, plan.adapted_connector)
    return plan


def _is_excluded(config: M2PTConfig, path: str) -> bool:
    """Whether a module is excluded by `exclude_modules` or `modules_to_save`, according to PEFT."""
    config = copy.copy(config)
    config.target_modules = {path}
    return not check_target_module_exists(config, path)


def _check_exclusions(config: M2PTConfig, sites: list[Site], excluded: frozenset[str]) -> None:
    """Refuses exclusions that leave no module for prompts that the config asks for."""
    for kind in ("visual", "textual"):
        paths = [site.path for site in sites if site.kind == kind]
        if paths and excluded.issuperset(paths):
            raise ValueError(
                f"exclude_modules={config.exclude_modules} and modules_to_save={config.modules_to_save} exclude all "
                f"attention modules for {kind} prompts, such as '{paths[0]}'. If you want none, set "
                f"num_{kind}_tokens=0."
            )


def _check_connector(plan: Plan, connector: Connector) -> None:
    config, path, module = plan.config, connector.path, connector.module
    inside = [f"{path}.{name}" if name else path for name, _ in module.named_modules()]
    saved = [name for name in config.modules_to_save or [] if any(part.endswith(name) for part in inside)]
    if saved or _is_excluded(config, path):
        field = f"modules_to_save={saved}" if saved else f"exclude_modules={config.exclude_modules}"
        raise ValueError(
            f"{field} includes the connector '{path}' or a part of it, which the adapter needs: tune_connector=True "
            f"trains and saves a copy of it. Leave it out, or set tune_connector=False and num_interaction_tokens=0."
        )
    widest = _widest_linear(module)
    if plan.connector_rank is not None and plan.connector_rank > widest:
        raise ValueError(
            f"connector_rank={plan.connector_rank} is more than the width of the widest linear layer of the "
            f"connector '{path}' ({widest}). Choose a lower rank, or None for a full copy."
        )
    quantized = quantized_linears(module)
    if config.tune_connector and plan.connector_rank is None and quantized:
        raise ValueError(
            f"The connector '{path}' has quantized linear layers {quantized}, so a full copy cannot be trained. Train "
            f"a low-rank update, for example with connector_rank=8, set tune_connector=False, or load the model "
            f"without quantizing '{path}'."
        )


def _update_size(module: nn.Module, rank: int) -> int:
    """Number of parameters of a low-rank update of all linear layers of a module."""
    return rank * sum(linear.in_features + linear.out_features for linear in linear_layers(module).values())


def _widest_linear(module: nn.Module) -> int:
    return max((linear.in_features for linear in linear_layers(module).values()), default=0)


def check_modules_to_save(configs: Mapping[str, PeftConfig]) -> None:
    """
    Checks that `modules_to_save` does not match weights of adapters.

    Args:
        configs (`Mapping[str, PeftConfig]`):
            The configs of all adapters of a model, by name.

    Raises:
        ValueError: If it does.
    """
    for config, adapter_name in itertools.product(configs.values(), configs):
        modules_to_save = getattr(config, "modules_to_save", None) or ()
        for name in modules_to_save:
            if adapter_name.endswith(name) or (PREFIX in name and name.endswith(f".{adapter_name}")):
                raise ValueError(
                    f"modules_to_save={modules_to_save}: PEFT matches modules whose paths end in {name!r}, "
                    f"such as the weights of M2PT, which are trained and saved anyway. Leave it out, or give a longer "
                    f"part of the path of the module."
                )


def _check_compiled_modules(model: nn.Module, config: M2PTConfig) -> None:
    """Refuses `modules_to_save` in compiled parts, which PEFT could save but not load."""
    for path, _ in model.named_modules():
        if plain(path) != path and any(path.endswith(name) for name in config.modules_to_save or ()):
            raise ValueError(
                f"modules_to_save={config.modules_to_save} includes '{plain(path)}', which is in a compiled part of "
                f"the model, so PEFT could not load it again. Compile this part after get_peft_model."
            )


def _check_disk_offload(model: nn.Module) -> None:
    """Refuses models offloaded to disk whose hooks were removed by `PeftModel.from_pretrained`."""
    on_disk = "disk" in (getattr(model, "hf_device_map", None) or {}).values()
    if on_disk and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UnsupportedModelError(
            "PeftModel.from_pretrained cannot load M2PT adapters into a model that is partly offloaded to disk: PEFT "
            "loses track of its weights. Use model = get_peft_model(model, M2PTConfig.from_pretrained(adapter)) "
            "and set_peft_model_state_dict(model, load_peft_weights(adapter))."
        )


def _plan_interaction(model: nn.Module, config: M2PTConfig) -> tuple[int, Connector | None]:
    """
    Decides how many interaction prompts a model gets, and whether its connector is needed.

    Returns:
        `tuple[int, Connector | None]`: The number of interaction prompts, and the connector if it is tuned or if
        interaction prompts go through it.

    Raises:
        UnsupportedModelError: If the config asks for interaction prompts that cannot go through the connector.
    """
    num_tokens = config.wanted_interaction_tokens
    if num_tokens == 0 and not config.tune_connector:
        return 0, None
    is_default = config.num_interaction_tokens is None
    try:
        connector = find_connector(model, config)
    except UnsupportedModelError as error:
        if config.connector is not None or (num_tokens > 0 and not is_default):
            raise
        if all(has_tower(model, kind, config) for kind in ("visual", "textual")):
            warnings.warn(f"{error.reason} So there are no interaction prompts, and the connector is not tuned.")
        return 0, None
    reason = _why_no_interaction(model, connector, config) if num_tokens > 0 else None
    if reason is not None:
        message = (
            f"Interaction prompts cannot go through the connector '{connector.path}' "
            f"({type(connector.module).__name__}): {reason}"
        )
        if not is_default:
            raise UnsupportedModelError(f"num_interaction_tokens={num_tokens}: {message}")
        warnings.warn(f"{message} So there are none; set num_interaction_tokens=0 to silence this warning.")
        num_tokens = 0
    return num_tokens, connector if num_tokens > 0 or config.tune_connector else None


def _why_no_interaction(model: nn.Module, connector: Connector, config: M2PTConfig) -> str | None:
    if connector.rows_per_token is None:
        return "it does not map each row of image features, or a fixed number of rows, to one image token."
    if config.interaction_placement == "layers":
        return None
    model_config = getattr(model, "config", None)
    has_place = getattr(model_config, "model_type", None) in IMAGE_PLACEMENT
    if not has_place or getattr(getattr(model_config, "vision_config", None), "model_type", None) == "pixtral":
        return (
            f"with interaction_placement='image' each image has more tokens, which {type(model).__name__} does not "
            f"support. Choose interaction_placement='layers'."
        )
    return None
