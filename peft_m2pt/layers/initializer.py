"""Makes and initializes new prompts."""

from __future__ import annotations

import warnings
from collections import Counter

import torch
from accelerate.utils import align_module_device
from peft.utils.integrations import gather_params_ctx
from torch import distributed, nn

from ..anatomy.sites import Connector, Site
from ..config import M2PTConfig
from ..errors import UnsupportedModelError
from ..upstream import weights_come_from_first_process
from .initial_text import given_token_ids, non_special_token_ids
from .prompt import RELATIVE_STEP, M2PTPrompt
from .states import has_data, states_of_images, states_of_text


class PromptInitializer:
    """
    Makes new prompts, initialized as `config.init_prompts` says.

    Args:
        config ([`M2PTConfig`]):
            The configuration of the adapter.
        model (`transformers.PreTrainedModel`):
            The model. Its hidden states serve `init_prompts="states"`, its token embeddings "vocabulary".
        sites (`list[Site]`):
            The attention modules that get prompts.
        weights_follow (`bool`):
            Whether saved weights will replace the new ones, so that no hidden states have to be computed.

    Raises:
        UnsupportedModelError: If the model cannot read the text that the config gives.
        ValueError: If the token embeddings do not have the width of the layers, or if the text does not have
            `num_textual_tokens` tokens.

    **Attributes**:
        - **is_scaled** (`bool`) -- Whether prompts have a scale, see [`~peft_m2pt.layers.prompt.M2PTPrompt`].
    """

    def __init__(self, config: M2PTConfig, model: nn.Module, sites: list[Site], weights_follow: bool) -> None:
        self.config = config
        self.is_scaled = config.init_prompts == "states"
        self.num_layers = Counter(site.kind for site in sites)
        self.states: dict[str, torch.Tensor] = {}
        # With `cpu_ram_efficient_loading`, FSDP broadcasts the prompts of rank 0 too.
        weights_follow = weights_follow or (weights_come_from_first_process() and distributed.get_rank() > 0)
        if self.is_scaled and not weights_follow and has_data(model):
            self._collect_states(model, sites)
        if config.init_prompts == "vocabulary":
            self.embedding = model.get_input_embeddings()
            self.token_ids = non_special_token_ids([model], self.embedding)
            for site in sites:
                if site.kind == "textual" and site.width != self.embedding.embedding_dim:
                    raise ValueError(
                        f"init_prompts='vocabulary' needs token embeddings as wide as the layers, but they have width "
                        f"{self.embedding.embedding_dim} and '{site.path}' has {site.width}. Choose 'xavier_uniform'."
                    )

    @torch.no_grad()
    def make_prompt(self, num_tokens: int, site: Site | Connector, dtype: torch.dtype | None) -> M2PTPrompt:
        """
        Makes and initializes a prompt.

        Args:
            num_tokens (`int`):
                Number of prompt vectors.
            site ([`~peft_m2pt.anatomy.sites.Site`] or [`~peft_m2pt.anatomy.sites.Connector`]):
                What it belongs to: an attention module or, for interaction prompts, the connector.
            dtype (`torch.dtype`, *optional*):
                The dtype of its weight.
        """
        # Interaction prompts act in all layers of the language model.
        num_layers = self.num_layers["textual" if site.kind == "interaction" else site.kind]
        relative_step = RELATIVE_STEP / max(1, num_layers) if self.is_scaled else None
        prompt = M2PTPrompt(num_tokens, site.width, dtype, relative_step)
        if site.path in self.states:
            prompt.set_rows(self.states[site.path])
        elif self.config.init_prompts == "normal":
            nn.init.normal_(prompt.weight, std=self.config.init_std)
        elif self.config.init_prompts == "vocabulary" and site.kind == "textual":
            token_ids = self.token_ids[torch.randint(len(self.token_ids), (prompt.num_tokens,))]
            partitioned = gather_params_ctx(self.embedding.weight, modifier_rank=None)
            with align_module_device(self.embedding), partitioned:
                embeddings = self.embedding(token_ids.to(self.embedding.weight.device))
            if not embeddings.is_meta:
                prompt.weight.copy_(embeddings)
        else:
            # On shape [1, n, D] as in the official code: a = sqrt(6 / ((n + 1) * D)).
            nn.init.xavier_uniform_(prompt.weight[None])
            if self.is_scaled and not prompt.weight.is_meta:
                prompt.set_rows(prompt.weight)
        return prompt

    def _collect_states(self, model: nn.Module, sites: list[Site]) -> None:
        textual = [site for site in sites if site.kind == "textual"]
        visual = [site for site in sites if site.kind == "visual"]
        token_ids = given_token_ids(self.config, model)
        if textual:
            try:
                self.states |= states_of_text(model, self.config, textual, token_ids)
            except UnsupportedModelError as error:
                if token_ids is not None:
                    raise UnsupportedModelError(
                        f"init_prompts='states': {error.reason} Leave init_text and init_token_ids out, or choose "
                        f"init_prompts='xavier_uniform'."
                    ) from error
                _warn_random_init("Textual", error)
        if visual:
            try:
                self.states |= states_of_images(model, self.config, visual, self.config.num_visual_tokens)
            except UnsupportedModelError as error:
                _warn_random_init("Visual", error)


def _warn_random_init(kind: str, error: UnsupportedModelError) -> None:
    warnings.warn(f"init_prompts='states': {error.reason} {kind} prompts start at random, as with 'xavier_uniform'.")
