"""Processors with room for interaction prompts among the tokens of each image."""

from __future__ import annotations

from transformers import ProcessorMixin

from .config import M2PTConfig


FIELD = "num_additional_image_tokens"

# The original `num_additional_image_tokens`, kept in `init_kwargs` of the tokenizer, which are saved with it.
MARK = "num_additional_image_tokens_without_m2pt"


def adapt_processor(processor: ProcessorMixin, config: M2PTConfig) -> ProcessorMixin:
    """
    Makes a processor emit an additional placeholder token per image for each interaction prompt of an adapter.

    This is needed for `interaction_placement="image"`, where these prompts become tokens of each image. Other adapters
    reset the processor. Calling it again changes nothing, even if the processor was saved and loaded in between.

    Args:
        processor (`transformers.ProcessorMixin`):
            The processor of a LLaVA model, which is changed in place.
        config ([`M2PTConfig`]):
            The configuration of the adapter, for example `model.peft_config["default"]`.

    Returns:
        `transformers.ProcessorMixin`: The same processor.

    Raises:
        ValueError: If the processor has no `num_additional_image_tokens`.

    Example:

    ```py
    >>> processor = peft_m2pt.adapt_processor(processor, config)
    >>> processor.save_pretrained("my-adapter")
    ```
    """
    num_tokens = config.wanted_interaction_tokens if config.interaction_placement == "image" else 0
    current = getattr(processor, FIELD, None)
    if not isinstance(current, int):
        raise ValueError(
            f"{type(processor).__name__} has no {FIELD}, so it cannot make room for interaction "
            f"prompts. Use interaction_placement='layers', which needs no change of the processor."
        )
    setattr(processor, FIELD, processor.tokenizer.init_kwargs.setdefault(MARK, current) + num_tokens)
    return processor
