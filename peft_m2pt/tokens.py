"""The tokens of the text that prompts start as: given by a config, or written by the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .config import M2PTConfig


def given_token_ids(config: M2PTConfig, model: nn.Module) -> list[int] | None:
    """
    The tokens of `config.init_text`, or `config.init_token_ids`.

    Args:
        config ([`M2PTConfig`]):
            The configuration of an adapter.
        model (`transformers.PreTrainedModel`):
            The model, whose tokenizer is loaded if the config names no other.

    Returns:
        `list[int]`: As many as there are textual prompts. `None` if the config gives no text.

    Raises:
        ValueError: If there is no tokenizer, or if there are more or fewer tokens than textual prompts.
    """
    if config.init_token_ids is not None:
        token_ids = list(config.init_token_ids)
        source = "init_token_ids"
    elif config.init_text is not None:
        token_ids = list(_tokenizer(config, model)(config.init_text).input_ids)
        source = f"init_text={config.init_text!r}"
    else:
        return None
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


@torch.no_grad()
def write_text(
    model: nn.Module, decoder: nn.Module, read: Callable[[Sequence[int]], Any], num_tokens: int
) -> list[int]:
    """
    Lets a model write a text: its first token, and what it takes for the likeliest ordinary token next, again and
    again. So it needs no tokenizer, and hardly moves what the model makes of a text behind it.

    Args:
        model (`nn.Module`):
            The model, whose output embeddings choose the tokens or, where there are none, the input embeddings of its
            language model.
        decoder (`transformers.PreTrainedModel`):
            The language model.
        read (`Callable`):
            Calls the language model with tokens.
        num_tokens (`int`):
            The length of the text.

    Returns:
        `list[int]`: Its tokens.
    """
    embedding = decoder.get_input_embeddings()
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    head = head or (lambda states: nn.functional.linear(states, embedding.weight))
    ordinary = ordinary_token_ids([model, decoder], embedding)
    token_ids = [next(_first_token_ids([model, decoder]), int(ordinary[0]))]
    while len(token_ids) < num_tokens:
        output = read(token_ids)
        scores = output.logits if hasattr(output, "logits") else head(output.last_hidden_state)
        # Some models have embeddings of images behind those of tokens, which they never write.
        ordinary = ordinary[ordinary < scores.shape[-1]]
        token_ids.append(int(ordinary[scores[0, -1, ordinary.to(scores.device)].argmax()]))
    return token_ids


def ordinary_token_ids(models: Sequence[nn.Module], embedding: nn.Embedding) -> torch.Tensor:
    """All ids of a vocabulary, without the special tokens that the configs of models name."""
    special: set[int] = set()
    for config in _configs(models):
        for name, value in config.to_dict().items():
            if name.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, list) else [value])
    return torch.tensor([token_id for token_id in range(embedding.num_embeddings) if token_id not in special])


def _first_token_ids(models: Sequence[nn.Module]) -> Iterator[int]:
    """What a text may begin with: the token for that or, where a model has none, the one that ends texts."""
    for name in ("bos_token_id", "eos_token_id"):
        for config in _configs(models):
            token_ids = getattr(config, name, None)
            yield from token_ids if isinstance(token_ids, list) else [token_ids] if token_ids is not None else []


def _configs(models: Sequence[nn.Module]) -> list[Any]:
    """The configs of models, those of language models first."""
    configs = [config for model in models if (config := getattr(model, "config", None)) is not None]
    of_generation = [getattr(model, "generation_config", None) for model in models]
    return [
        *(config.get_text_config() for config in configs),
        *configs,
        *(config for config in of_generation if config is not None),
    ]


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
