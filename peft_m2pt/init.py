"""How prompts are initialised."""

from __future__ import annotations

import warnings
from collections import Counter

import torch
from accelerate.utils import align_module_device
from peft.utils.integrations import gather_params_ctx
from torch import distributed, nn

from .anatomy import Connector, Site
from .config import M2PTConfig
from .errors import UnsupportedModelError
from .prompt import TURN, M2PTPrompt
from .states import has_data, states_of_images, states_of_text
from .tokens import given_token_ids, ordinary_token_ids
from .upstream import weights_come_from_first_process


class PromptInitialiser:
    """
    Fills new prompts as `config.init_prompts` says.

    Args:
        config ([`M2PTConfig`]):
            The configuration of the adapter.
        model (`transformers.PreTrainedModel`):
            The model, which reads a text for `init_prompts="states"`, and whose token embeddings serve
            `init_prompts="vocabulary"`.
        sites (`list[Site]`):
            The attention modules that get prompts.
        weights_follow (`bool`):
            Whether the prompts will be replaced by saved ones, so that no text needs to be read.

    Raises:
        UnsupportedModelError: If the model cannot read the text that the config gives.
        ValueError: If the model's token embeddings cannot initialise prompts of its language model, or if the text has
            more or fewer tokens than there are textual prompts.

    **Attributes**:
        - **scales** (`bool`) -- Whether prompts are trained in units of their rows.
    """

    def __init__(self, config: M2PTConfig, model: nn.Module, sites: list[Site], weights_follow: bool) -> None:
        self.config = config
        self.scales = config.init_prompts == "states"
        self.num_layers = Counter(site.kind for site in sites)
        self.states: dict[str, torch.Tensor] = {}
        # What FSDP brings to this process are the prompts too.
        weights_follow = weights_follow or (weights_come_from_first_process() and distributed.get_rank() > 0)
        if self.scales and not weights_follow and has_data(model):
            self._collect_states(model, sites)
        if config.init_prompts == "vocabulary":
            self.embedding = model.get_input_embeddings()
            self.token_ids = ordinary_token_ids([model], self.embedding)
            for site in sites:
                if site.kind == "textual" and site.width != self.embedding.embedding_dim:
                    raise ValueError(
                        f"init_prompts='vocabulary' needs token embeddings as wide as the layers, but they have width "
                        f"{self.embedding.embedding_dim} and '{site.path}' has {site.width}. Choose 'xavier_uniform'."
                    )

    def turn(self, site: Site | Connector) -> float | None:
        """
        How many times its length a row of a prompt turns by a learning rate of 1, if it has a unit.

        Args:
            site ([`~peft_m2pt.anatomy.Site`] or [`~peft_m2pt.anatomy.Connector`]):
                What the prompt belongs to. Interaction prompts act in all layers of the language model.
        """
        if not self.scales:
            return None
        kind = "textual" if site.kind == "interaction" else site.kind
        return TURN / max(1, self.num_layers[kind])

    @torch.no_grad()
    def __call__(self, prompt: M2PTPrompt, site: Site | Connector) -> None:
        """
        Fills a prompt in place.

        Args:
            prompt ([`~peft_m2pt.prompt.M2PTPrompt`]):
                The prompt.
            site ([`~peft_m2pt.anatomy.Site`] or [`~peft_m2pt.anatomy.Connector`]):
                What it belongs to: an attention module or, for interaction prompts, the connector.
        """
        if site.path in self.states:
            prompt.fill(self.states[site.path])
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
            # On shape [1, n, D], as the official code has it: a = sqrt(6 / ((n + 1) * D)).
            nn.init.xavier_uniform_(prompt.weight[None])
            if self.scales and not prompt.weight.is_meta:
                prompt.fill(prompt.weight)

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
                _warn_of_random("Textual", error)
        if visual:
            try:
                self.states |= states_of_images(model, self.config, visual, self.config.num_visual_tokens)
            except UnsupportedModelError as error:
                _warn_of_random("Visual", error)


def _warn_of_random(kind: str, error: UnsupportedModelError) -> None:
    warnings.warn(f"init_prompts='states': {error.reason} {kind} prompts start at random, as with 'xavier_uniform'.")
