"""The content of official M2PT checkpoints, and its names in a transformers LLaVA."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..config import M2PTConfig
from ..errors import ConversionError, list_problems
from ..saving.checkpoints import Checkpoint, StoredTensor, read_json


# Prompt of layer i, of shape [1, n, D].
PROMPTS = {
    "visual": "model.vision_tower.vision_tower.vision_model.encoder.prompts.{}",
    "textual": "model.prompts.{}",
}


# Prefixes of names in transformers and in the official code.
VISION_TOWER = ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")


CONNECTOR = "model.multi_modal_projector."


PROJECTOR = (CONNECTOR + "linear_1.", "model.mm_projector.")


NAMES = (VISION_TOWER, PROJECTOR, ("model.language_model.", "model."), ("lm_head.", "lm_head."))


# The official projector is one linear layer; the second one of transformers becomes the identity.
IDENTITY = CONNECTOR + "linear_2."


# Buffers saved by older versions of transformers, and the text encoder of CLIP.
UNUSED = re.compile(
    r"rotary_emb\.inv_freq$|embeddings\.position_ids$|^text_model\.|^(text|visual)_projection\.|^logit_scale$"
)


# Settings of the official code, with the value in its training script, which is the only one that is converted.
SETTINGS = {
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "square",
}


@dataclass(frozen=True)
class Weight:
    """
    A weight of the base model, made when it is needed.

    Args:
        planned (`torch.Tensor`):
            The weight on the meta device.
        make (`Callable[[], torch.Tensor]`):
            Makes the weight.
    """

    planned: torch.Tensor
    make: Callable[[], torch.Tensor]

    def then(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Weight:
        """Returns this weight after a change, which must work on the meta device too."""
        return Weight(change(self.planned), lambda: change(self.make()))


@dataclass(frozen=True)
class _Place:
    """A possible place of a tensor."""

    checkpoint: Checkpoint
    name: str

    @property
    def exists(self) -> bool:
        return self.name in self.checkpoint.tensors

    @property
    def stored(self) -> StoredTensor:
        return self.checkpoint.tensors[self.name]

    def __str__(self) -> str:
        return f"'{self.name}' in {self.checkpoint.folder}"


def make_config(original: Path, language_model: Path, vision_tower: Path) -> LlavaConfig:
    """
    Makes the config of the base model, except for what depends on the prompts and the tokenizer.

    Returns:
        `LlavaConfig`

    Raises:
        ConversionError: If a config is missing or of another model type, or has a setting that is not converted.
    """
    settings_file = original / "config.json"
    settings = read_json(settings_file)
    for name, supported in SETTINGS.items():
        found = settings.get(name, supported)
        if found != supported:
            raise ConversionError(f"{settings_file} has {name}={found!r}. Only {supported!r} can be converted.")
    feature_layer = settings.get("mm_vision_select_layer")
    if not isinstance(feature_layer, int):
        raise ConversionError(f"{settings_file} has no mm_vision_select_layer. Is this an official checkpoint?")

    text_config = _read_config(LlamaConfig, language_model, "llama")
    text_config.tie_word_embeddings = False
    vision_config = _read_config(CLIPVisionConfig, vision_tower, "clip", "clip_vision_model")
    if not -vision_config.num_hidden_layers - 1 <= feature_layer <= vision_config.num_hidden_layers:
        raise ConversionError(
            f"{settings_file} has mm_vision_select_layer={feature_layer}, but the model in {vision_tower} has "
            f"{vision_config.num_hidden_layers} layers."
        )
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        vision_feature_layer=feature_layer,
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        projector_hidden_act="linear",
        architectures=[LlavaForConditionalGeneration.__name__],
    )


def _read_config(
    config_class: type[LlamaConfig | CLIPVisionConfig], folder: Path, *model_types: str
) -> LlamaConfig | CLIPVisionConfig:
    file = folder / "config.json"
    model_type = read_json(file).get("model_type")
    if model_type not in model_types:
        raise ConversionError(f"{file} has model_type={model_type!r}, expected {' or '.join(map(repr, model_types))}.")
    try:
        return config_class.from_pretrained(folder)
    except Exception as error:  # Validation raises errors of many types.
        raise ConversionError(f"{file} is not a valid {config_class.__name__}: {error}") from error


def find_feature_layer(config: LlavaConfig) -> int:
    """Returns the index of the vision layer whose input serves as image features."""
    return config.vision_feature_layer % (config.vision_config.num_hidden_layers + 1)


def find_prompts(original: Checkpoint, config: LlavaConfig) -> M2PTConfig:
    """
    Counts the prompts of a checkpoint.

    Args:
        original (`Checkpoint`):
            The official checkpoint.
        config (`LlavaConfig`):
            Config of the base model. Its `vision_feature_select_strategy` is set.

    Returns:
        [`M2PTConfig`]: The configuration of the adapter.

    Raises:
        ConversionError: If there are no prompts, or if some are missing or differ in shape.
    """
    num_visual = _num_prompts("visual", original, config.vision_config)
    num_textual = _num_prompts("textual", original, config.text_config)
    if num_visual == num_textual == 0:
        names = " and ".join(repr(template.format(0)) for template in PROMPTS.values())
        raise ConversionError(f"{original.folder} has no prompts, which are named {names} and so on.")
    num_layers = config.vision_config.num_hidden_layers
    if num_visual > 0 and not 0 < find_feature_layer(config) < num_layers:
        raise ConversionError(
            f"mm_vision_select_layer={config.vision_feature_layer} cannot be converted together with visual prompts: "
            f"the image features must come from between two of the {num_layers} vision layers."
        )
    # With visual prompts, the official code drops the first of them instead of the class token.
    config.vision_feature_select_strategy = "full" if num_visual > 0 else "default"
    return M2PTConfig.paper(num_visual, num_textual)


def _prompt_places(kind: str, original: Checkpoint, config: PreTrainedConfig) -> list[_Place]:
    return [_Place(original, PROMPTS[kind].format(i)) for i in range(config.num_hidden_layers)]


def _num_prompts(kind: str, original: Checkpoint, config: PreTrainedConfig) -> int:
    places = _prompt_places(kind, original, config)
    shape = next((place.stored.shape for place in places if place.exists), (1, 0, config.hidden_size))
    num_tokens = shape[1] if len(shape) == 3 else 1
    if num_tokens > 0:
        _refuse(_problem([place], (1, num_tokens, config.hidden_size)) for place in places)
    return num_tokens


def find_weights(
    model: PreTrainedModel, original: Checkpoint, language_model: Checkpoint, vision_tower: Checkpoint
) -> dict[str, Weight]:
    """
    Finds the weights of the base model.

    Args:
        model (`PreTrainedModel`):
            The base model on the meta device, with the names and shapes of all weights.
        original (`Checkpoint`):
            The official checkpoint, which takes precedence.
        language_model (`Checkpoint`):
            The Llama model.
        vision_tower (`Checkpoint`):
            The CLIP model.

    Returns:
        `dict[str, Weight]`: The weights by their names in transformers, in the order of their files.

    Raises:
        ConversionError: If a weight is missing or has another shape, or if there is an unknown tensor.
    """
    problems: list[str | None] = []
    found: dict[str, _Place] = {}
    known = set(_prompt_places("visual", original, model.config.vision_config))
    known.update(_prompt_places("textual", original, model.config.text_config))
    for key, expected in model.state_dict().items():
        if key.startswith(IDENTITY):
            continue
        places = _places(key, original, language_model, vision_tower)
        known.update(places)
        problems.append(_problem(places, tuple(expected.shape)))
        found |= {key: place for place in reversed(places) if place.exists}
    for checkpoint in (original, language_model, vision_tower):
        for place in (_Place(checkpoint, name) for name in checkpoint.tensors):
            if place not in known and not UNUSED.search(place.name):
                problems.append(f"{place}: expected nothing")
    _refuse(problems)

    weights = {key: _read_later(found[key]) for key in sorted(found, key=lambda key: found[key].stored.file)}
    projector = weights[PROJECTOR[0] + "weight"].planned
    for name, make in (("weight", torch.eye), ("bias", torch.zeros)):
        identity = partial(make, projector.shape[0], dtype=projector.dtype)
        weights[IDENTITY + name] = Weight(identity(device="meta"), identity)
    return weights


def _places(key: str, original: Checkpoint, language_model: Checkpoint, vision_tower: Checkpoint) -> list[_Place]:
    """The possible places of a weight of the base model, in order of precedence."""
    part, (ours, official) = next((key.removeprefix(names[0]), names) for names in NAMES if key.startswith(names[0]))
    places = [_Place(original, official + part)]
    if ours == VISION_TOWER[0]:
        # A full CLIP model, or its vision model alone.
        places += [_Place(vision_tower, "vision_model." + part), _Place(vision_tower, part)]
    elif ours != PROJECTOR[0]:
        places.append(_Place(language_model, official + part))
    return places


def _read_later(place: _Place) -> Weight:
    planned = torch.empty(place.stored.shape, dtype=place.stored.dtype, device="meta")
    return Weight(planned, partial(place.checkpoint.read, place.name))


def _problem(places: list[_Place], shape: tuple[int, ...]) -> str | None:
    """Describes what is wrong with the tensor that should be in one of these places, if anything."""
    place = next((place for place in places if place.exists), None)
    if place is None:
        return f"{' or '.join(map(str, places))}: expected shape {list(shape)}, found nothing"
    if place.stored.shape != shape:
        return f"{place}: expected shape {list(shape)}, found shape {list(place.stored.shape)}"
    if not place.stored.dtype.is_floating_point:
        return f"{place}: expected floating-point numbers, found {place.stored.dtype}"
    return None


def _refuse(problems: Iterable[str | None]) -> None:
    problems = [problem for problem in problems if problem is not None]
    if problems:
        raise ConversionError(
            f"The weights are not those of an official checkpoint and its models:\n{list_problems(problems)}"
        )
