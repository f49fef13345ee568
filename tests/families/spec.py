"""How a family of models is described."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version


VOCAB_SIZE = 99
PAD, BOS, EOS = 0, 1, 2
TEXT_IDS = (3, 80)  # Ids of ordinary words. Those from 80 on are for special tokens.
MEDIA_TOKEN = 98  # The placeholder of an image (or sound), where the family does not need another.

# For layers that select keys: more than there are. What a selection does is another test.
SEES_ALL = 64

Inputs = dict[str, torch.Tensor]

CHECKS = {
    "training": "every prompt has a finite, non-zero gradient",
    "exact": "each adapted attention equals the same module run on [prompts ; tokens], prompt rows dropped",
    "generation": "greedy generation with a cache equals that without, and the argmax of one forward pass over it",
    "padding": "a sample padded on the left gives the same as alone",
    "checkpointing": "gradient checkpointing, reentrant or not, does not change loss and gradients",
    "saving": "a fresh model with the saved adapter gives the same; without it, the base model is back bit for bit",
    "attention": '"eager" and "sdpa" attention agree, and so do "flash_attention_2" and "flex_attention" (run by '
    "stand-ins for their kernels) where those of the base model do",
}


@dataclass(frozen=True, eq=False)
class Family:
    """
    A family of models, its tiny model, inputs for it, and what M2PT can do with it.

    Args:
        name (`str`):
            The model type.
        model_class (`str`):
            Name of the model's class in transformers.
        config (`Callable`):
            Makes the tiny config.
        media (`Callable`):
            Makes the images (or sounds) of a number of samples. The first dimension of each tensor is that number
            times something, sample by sample.
        num_media_tokens (`int`):
            Placeholders for media in the text of a sample. 0 where media come in another way.
        media_token (`int`):
            The placeholder.
        before (`tuple[int, ...]`), after (`tuple[int, ...]`):
            Tokens around the placeholders.
        extra (`Callable`):
            Makes further inputs out of `input_ids`, `attention_mask` and the media.
        pack (`Callable`):
            Brings the inputs of several samples into the form in which the model takes them.
        labels (`str`, *optional*):
            The argument for labels. `None` where the model computes no loss.
        generates (`bool`):
            Whether it generates text.
        text (`bool`):
            Whether it reads text. Otherwise all its inputs are media.
        connector (`int` or `str`):
            How many rows of image features the connector makes one image token of, or why there are no interaction
            prompts.
        has_connector (`bool`):
            Whether there is a connector to tune.
        refused (`dict[str, str]`):
            For "visual" and "textual" prompts that cannot be had: a part of the message.
        without (`dict[str, str]`):
            For checks which say nothing of this family: the reason. "forcing" is that part of "generation" which runs
            one pass over all tokens.
        since (`str`):
            The version of transformers from which on all of this is so. Before, the model was another.
        fails_in (`dict[str, str]`):
            Versions of transformers in which the model without M2PT does not run at all: the reason.
    """

    name: str
    model_class: str
    config: Callable[[], Any]
    media: Callable[[int], Inputs]
    num_media_tokens: int = 0
    media_token: int = MEDIA_TOKEN
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    extra: Callable[[Inputs], Inputs] = lambda inputs: {}
    pack: Callable[[Inputs], Inputs] = lambda inputs: inputs
    labels: str | None = "labels"
    generates: bool = True
    text: bool = True
    connector: int | str = 1
    has_connector: bool = True
    refused: dict[str, str] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)
    since: str = "0"
    fails_in: dict[str, str] = field(default_factory=dict)

    @property
    def is_known(self) -> bool:
        """Whether the installed transformers has this family, as it is described here."""
        is_new_enough = Version(transformers.__version__) >= Version(self.since)
        return is_new_enough and hasattr(transformers, self.model_class)

    @property
    def runs(self) -> bool:
        """Whether the model runs without M2PT in the installed transformers."""
        return transformers.__version__ not in self.fails_in


def seeded(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def side_by_side(inputs: Inputs) -> Inputs:
    """Puts all images into one wide picture, as the MiniCPM models take them."""
    if "pixel_values" not in inputs:
        return inputs
    return {**inputs, "pixel_values": torch.cat(list(inputs["pixel_values"]), dim=-1)[None]}


def make_model(family: Family, attn: str) -> transformers.PreTrainedModel:
    """The tiny model. Equal arguments give equal models."""
    config = family.config()
    config._attn_implementation = attn
    torch.manual_seed(0)
    model = getattr(transformers, family.model_class)(config).eval()
    _give_weights(model)
    return model


@torch.no_grad()
def _give_weights(model: torch.nn.Module) -> None:
    """Weights with which every part of a small model matters: no closed gates, no indifferent attention."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2:
            parameter.copy_(1.5 * parameter.shape[-1] ** -0.5 * noise)
        else:
            parameter.add_(0.2 * noise)


def make_inputs(family: Family) -> Inputs:
    """Two samples of different lengths, padded on the left. To be packed before a model takes them."""
    generator = torch.Generator().manual_seed(1)
    inputs: Inputs = {}
    if family.text:
        media = [*family.before, *[family.media_token] * family.num_media_tokens, *family.after]
        rows = []
        for num_words_behind in (7, 4):
            in_front = torch.randint(*TEXT_IDS, (2,), generator=generator).tolist()
            behind = torch.randint(*TEXT_IDS, (num_words_behind,), generator=generator).tolist()
            rows.append([BOS, *in_front, *media, *behind])
        length = max(map(len, rows))
        inputs["input_ids"] = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
        inputs["attention_mask"] = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    inputs.update(family.media(2))
    inputs.update(family.extra(inputs))
    return inputs


def make_labels(family: Family, inputs: Inputs) -> Inputs:
    """Labels on the last words of each sample."""
    if family.labels is None or "input_ids" not in inputs:
        return {}
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    return {family.labels: labels}


def take_sample(family: Family, inputs: Inputs, index: int) -> Inputs:
    """One of the two samples, without padding."""
    sample = {name: value.chunk(2)[index] for name, value in inputs.items()}
    if "attention_mask" not in sample:
        return sample
    length = sample["attention_mask"].shape[1]
    start = length - int(sample["attention_mask"].sum())
    of_tokens = set(sample) - set(family.media(1))
    for name in of_tokens:
        if sample[name].dim() >= 2 and (sample[name].shape[1] == length or name == "decoder_attention_mask"):
            sample[name] = sample[name][:, start:]
    return sample
