"""The tuner: finds the attention modules of a model, gives them prompts, and reports on them."""

from __future__ import annotations

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .anatomy import find_sites
from .config import M2PTConfig
from .init import PromptInitialiser
from .layer import NOT_MERGEABLE, M2PTAttention
from .loading import check_state_dict
from .register import PREFIX
from .report import describe


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
    tuner_layer_cls = M2PTAttention

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

    def _prepare_adapter_config(self, peft_config: M2PTConfig, model_config: dict) -> M2PTConfig:
        return peft_config

    def _prepare_model(self, peft_config: M2PTConfig, model: nn.Module) -> None:
        # PEFT calls this before it changes anything, so this is where a model is refused.
        sites = find_sites(model, peft_config)
        self._initialise = PromptInitialiser(peft_config, model, sites)
        self._sites = {site.path: site for site in sites}
        peft_config.target_modules = set(self._sites)

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
        site = self._sites[current_key]
        num_tokens = peft_config.num_visual_tokens if site.kind == "visual" else peft_config.num_textual_tokens
        if not isinstance(target, M2PTAttention):
            target = M2PTAttention(site)
            self._replace_module(parent, target_name, target, site.attention)
        target.update_layer(adapter_name, num_tokens, self._initialise)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies the `weight` of what is replaced, which attention modules do not have.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(NOT_MERGEABLE)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_state_dict(model, adapter_name, state_dict)
        return state_dict
