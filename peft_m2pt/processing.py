"""Processors that leave room for interaction prompts among the tokens of each image."""

from __future__ import annotations

from transformers import ProcessorMixin

from .config import M2PTConfig


# Kept with the tokenizer's settings, which are saved with it: what the processor's number was before it was adapted.
MARK = "num_additional_image_tokens_without_m2pt"


def adapt_processor(processor: ProcessorMixin, config: M2PTConfig) -> ProcessorMixin:
    """
    Makes a processor emit as many more placeholders for each image as an adapter has interaction prompts.

    Needed for `interaction_placement="image"`, in which these prompts become tokens of every image. For other adapters
    the processor is set back. Doing it again changes nothing, also after the processor was saved and loaded.

    Args:
        processor (`transformers.ProcessorMixin`):
            The processor of a LLaVA model. It is changed in place.
        config ([`M2PTConfig`]):
            The configuration of the adapter, for example `model.peft_config["default"]`.

    Returns:
        `transformers.ProcessorMixin`: The same processor.

    Raises:
        ValueError: If the processor has no `num_additional_image_tokens`, which tells it of tokens beside the patches.

    Example:

    ```py
    >>> processor = peft_m2pt.adapt_processor(processor, config)
    >>> processor.save_pretrained("my-adapter")
    ```
    """
    num_tokens = config.wanted_interaction_tokens if config.interaction_placement == "image" else 0
    if not isinstance(getattr(processor, "num_additional_image_tokens", None), int):
        raise ValueError(
            f"{type(processor).__name__} has no num_additional_image_tokens, so it cannot leave room for interaction "
            f"prompts. Use interaction_placement='layers', which needs no change of the processor."
        )
    own_tokens = processor.tokenizer.init_kwargs.setdefault(MARK, processor.num_additional_image_tokens)
    processor.num_additional_image_tokens = own_tokens + num_tokens
    return processor
