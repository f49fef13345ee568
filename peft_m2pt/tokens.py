"""The tokens of the text that prompts start as."""

from __future__ import annotations

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .config import M2PTConfig


def init_token_ids(config: M2PTConfig, model: nn.Module) -> list[int]:
    """
    The tokens of `config.init_text`, or `config.init_token_ids`.

    Args:
        config ([`M2PTConfig`]):
            The configuration of an adapter with textual prompts.
        model (`transformers.PreTrainedModel`):
            The model, whose tokenizer is loaded if the config names no other.

    Returns:
        `list[int]`: As many as there are textual prompts.

    Raises:
        ValueError: If there is no text, no tokenizer, or if there are more or fewer tokens than textual prompts.
    """
    if config.init_token_ids is not None:
        token_ids = list(config.init_token_ids)
        source = "init_token_ids"
    elif config.init_text is not None:
        token_ids = list(_tokenizer(config, model)(config.init_text).input_ids)
        source = f"init_text={config.init_text!r}"
    else:
        raise ValueError(
            f"init_prompts='states' starts textual prompts as the states of a text. Give one of "
            f"{config.num_textual_tokens} tokens with init_text='...', or its tokens with init_token_ids=[...]."
        )
    if len(token_ids) != config.num_textual_tokens:
        raise ValueError(
            f"{source} has {len(token_ids)} tokens, special tokens of the tokenizer included, but num_textual_tokens="
            f"{config.num_textual_tokens}: each token is the start of one prompt. Set num_textual_tokens="
            f"{len(token_ids)}, or choose a text of {config.num_textual_tokens} tokens."
        )
    vocab_size = _vocab_size(model)
    if vocab_size is not None and max(token_ids) >= vocab_size:
        raise ValueError(
            f"{source}: token {max(token_ids)} has no embedding in the model, which has {vocab_size}. Take the "
            f"tokenizer that the model was trained with."
        )
    return token_ids


def _vocab_size(model: nn.Module) -> int | None:
    """The number of embeddings, `None` in models that do not say which these are."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        return None


def _tokenizer(config: M2PTConfig, model: nn.Module) -> PreTrainedTokenizerBase:
    name = config.tokenizer_name_or_path or getattr(model, "name_or_path", None)
    way_out = (
        "Name the tokenizer with tokenizer_name_or_path='...', or give its tokens with "
        "init_token_ids=tokenizer(text).input_ids. Where the weights of a saved adapter are loaded next, "
        "low_cpu_mem_usage=True does without."
    )
    if not name:
        raise ValueError(f"init_text needs a tokenizer, and the model does not say where it comes from. {way_out}")
    # A revision is that of the base model.
    revision = {} if config.tokenizer_name_or_path or not config.revision else {"revision": config.revision}
    try:
        return AutoTokenizer.from_pretrained(name, **revision)
    except Exception as error:  # of the Hub's client, of transformers, and of what the tokenizer is made with
        raise ValueError(
            f"init_text needs a tokenizer, and that of '{name}' cannot be loaded: {error} {way_out}"
        ) from error
