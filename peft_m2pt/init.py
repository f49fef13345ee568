"""How prompts are initialised."""

from __future__ import annotations

import torch
from accelerate.utils import align_module_device
from peft.utils.integrations import gather_params_ctx
from torch import nn

from .anatomy import Connector, Site
from .base import M2PTPrompt
from .config import M2PTConfig


class PromptInitialiser:
    """
    Fills new prompts as `config.init_prompts` says.

    Args:
        config ([`M2PTConfig`]):
            The configuration of the adapter.
        model (`transformers.PreTrainedModel`):
            The model, whose token embeddings serve `init_prompts="vocabulary"`.
        sites (`list[Site]`):
            The attention modules that get prompts.

    Raises:
        ValueError: If the model's token embeddings cannot initialise prompts of its language model.
    """

    def __init__(self, config: M2PTConfig, model: nn.Module, sites: list[Site]) -> None:
        self.config = config
        if config.init_prompts == "vocabulary":
            self.embedding = model.get_input_embeddings()
            self.token_ids = _ordinary_token_ids(model)
            for site in sites:
                if site.kind == "textual" and site.width != self.embedding.embedding_dim:
                    raise ValueError(
                        f"init_prompts='vocabulary' needs token embeddings as wide as the layers, but they have width "
                        f"{self.embedding.embedding_dim} and '{site.path}' has {site.width}. Choose 'xavier_uniform'."
                    )

    @torch.no_grad()
    def __call__(self, prompt: M2PTPrompt, site: Site | Connector) -> None:
        """
        Fills a prompt in place.

        Args:
            prompt ([`~peft_m2pt.base.M2PTPrompt`]):
                The prompt.
            site ([`~peft_m2pt.anatomy.Site`] or [`~peft_m2pt.anatomy.Connector`]):
                What it belongs to: an attention module or, for interaction prompts, the connector.
        """
        if self.config.init_prompts == "normal":
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


def _ordinary_token_ids(model: nn.Module) -> torch.Tensor:
    """All ids of the vocabulary, without the special tokens that the model's configs name."""
    special: set[int] = set()
    for config in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
        for name, value in config.to_dict().items() if config is not None else ():
            if name.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, list) else [value])
    vocab_size = model.get_input_embeddings().num_embeddings
    return torch.tensor([token_id for token_id in range(vocab_size) if token_id not in special])
