"""
Loads bundles: folders with a base model and an adapter, which the auto classes of transformers load as one model.

No program must take such a folder for the base model alone. So its config.json has a model type that only this package
registers, an architecture that serving engines do not know, and a notice in place of the name of the weights file, for
model classes that are used directly and do not check the model type.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils import set_peft_model_state_dict
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..adapter_files import AdapterSource
from ..config import M2PTConfig
from ..errors import BundleError
from ..saving.names import WRAPPER_PREFIX
from ..upstream import AUTO_CLASSES, WEIGHTS_FIELD, is_adapted, mark_as_adapted, renamed_weights, with_loader


MODEL_TYPE = "peft_m2pt"


ARCHITECTURE = "PeftM2PTBundle"


NOTICE = (
    "peft_m2pt: this folder is a base model with an M2PT adapter, which only the auto classes load, such as "
    "AutoModelForImageTextToText, after `import peft_m2pt` (pip install peft-m2pt)"
)


BUNDLE_FIELDS = {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], WEIGHTS_FIELD: NOTICE}


# Prefix of the fields with the base model's own values. These are not in a dictionary, which transformers would take
# for a nested config.
ORIGINAL_PREFIX = "peft_m2pt_"


# The index of a sharded base model. The usual one also names the adapter's weights, for programs without M2PT.
BASE_INDEX = "base.safetensors.index.json"


def make_bundle_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    Makes the config.json of a bundle from that of its base model.

    Returns:
        `dict[str, Any]`
    """
    return {
        **config,
        **{f"{ORIGINAL_PREFIX}{name}": config[name] for name in BUNDLE_FIELDS if name in config},
        **BUNDLE_FIELDS,
    }


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle, by its config.json."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE
    except (OSError, ValueError, AttributeError):
        return False


class BundleConfig(PretrainedConfig):
    """
    The config class of the model type of bundles. It makes the config of the base model, as an instance of a subclass
    that the auto classes map to [`BundledModel`].
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        original = {name: config_dict.get(f"{ORIGINAL_PREFIX}{name}") for name in BUNDLE_FIELDS}
        if original["model_type"] is None:
            raise BundleError(
                f"config.json has model_type={MODEL_TYPE!r}, but no '{ORIGINAL_PREFIX}model_type', so it is not that "
                f"of a bundle. Make one with `peft-m2pt bundle BASE ADAPTER --output DIR`."
            )
        values = {name: value for name, value in config_dict.items() if not name.startswith(ORIGINAL_PREFIX)}
        # The notice stays, for model classes that are used directly with this config.
        values |= {**original, WEIGHTS_FIELD: NOTICE}
        return _bundled(CONFIG_MAPPING[original["model_type"]]).from_dict(values, **kwargs)


class _BundleMixin:
    """A mixin that marks the config classes of bundles."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is created dynamically, so it cannot be pickled by name.
        return _restore, (_own_class(self), self.__dict__.copy())


def _restore(config_class: type[PretrainedConfig], state: dict[str, Any]) -> PretrainedConfig:
    config = object.__new__(_bundled(config_class))
    config.__dict__.update(state)
    return config


def _own_class(config: PretrainedConfig) -> type[PretrainedConfig]:
    return next(base for base in type(config).__mro__[1:] if base is not _BundleMixin)


@functools.cache
def _bundled(config_class: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """Makes the config class of bundles of a base model, and registers its models with the auto classes."""
    bundled = type(config_class.__name__, (_BundleMixin, config_class), {"__module__": __name__})
    for auto_class in AUTO_CLASSES:
        if config_class in auto_class._model_mapping:
            model_classes = auto_class._model_mapping[config_class]
            is_choice = isinstance(model_classes, (list, tuple))
            loaders = tuple(map(BundledModel, model_classes if is_choice else (model_classes,)))
            auto_class._model_mapping.register(bundled, loaders if is_choice else loaders[0], exist_ok=True)
    return bundled


class BundledModel:
    """
    Takes the place of a model class when an auto class loads a bundle.

    Args:
        model_class (`type[PreTrainedModel]`):
            The class of the base model, and of the loaded model.
    """

    def __init__(self, model_class: type[PreTrainedModel]) -> None:
        self.model_class = model_class
        self.__name__ = model_class.__name__

    def from_pretrained(
        self, path: str, *args: Any, config: PretrainedConfig, subfolder: str = "", **kwargs: Any
    ) -> Any:
        """Loads base model and adapter, with the arguments of the base model's `from_pretrained`."""
        folder = os.path.join(path, subfolder) if subfolder else path
        own = copy.copy(config)
        if isinstance(config, _BundleMixin):
            own.__class__ = _own_class(config)
        setattr(own, WEIGHTS_FIELD, BASE_INDEX if os.path.isfile(os.path.join(folder, BASE_INDEX)) else None)
        loaded = with_loader(self.model_class, load_adapter).from_pretrained(folder, *args, config=own, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        delattr(model.config, WEIGHTS_FIELD)
        if not is_adapted(model):
            raise BundleError(f"The bundle {folder!r} has no adapter_config.json. Is it complete?")
        return loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model_class, name)


def load_adapter(model: nn.Module, folder: str | Path, adapter_name: str) -> None:
    """Loads a saved adapter into a transformers model, for inference."""
    config = M2PTConfig.from_pretrained(str(folder))
    source = config.source
    config.inference_mode = True
    inject_adapter_in_model(config, model, adapter_name)
    # As in a `PeftModel`.
    cast_adapter_dtype(model, adapter_name)
    set_peft_model_state_dict(model, weights_for(model, source), adapter_name)
    mark_as_adapted(model)
    model.eval()


def weights_for(model: nn.Module, source: AdapterSource) -> dict[str, torch.Tensor]:
    """Reads the weights of an adapter, with their names in a model without a `PeftModel` around it."""
    weights = source.load_weights(renamed_weights(model))
    return {name.removeprefix(WRAPPER_PREFIX): weight for name, weight in weights.items()}


def register_bundles() -> None:
    """Registers the model type of bundles with transformers."""
    AutoConfig.register(MODEL_TYPE, BundleConfig, exist_ok=True)
