"""The configuration of M2PT."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, TypeGuard

from peft.utils import PeftType

from .saved_config import SavedConfig


LAYERS = ("first", "odd", "top_half", "bottom_half")


PLACEMENTS = ("layers", "image")


MAX_TOKENS = 2**20


INITS = ("states", "xavier_uniform", "normal", "vocabulary")


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass
class M2PTConfig(SavedConfig):
    """
    Configuration of M2PT, Multimodal Prompt Tuning (EMNLP 2024, [arXiv 2409.15657](https://arxiv.org/abs/2409.15657)).

    Each adapted self-attention layer `i` of the frozen model gets its own prompt `P_i` of shape `[n, D]`. The layer
    computes on `[P_i ; tokens]`, and its outputs at the prompt rows are replaced by `P_{i+1}` in the next layer.

    Args:
        num_visual_tokens (`int`, defaults to 20):
            Number of prompt vectors in each layer of the vision encoder. 0 leaves the vision encoder unchanged.
        num_textual_tokens (`int`, defaults to 10):
            Number of prompt vectors in each layer of the language model. 0 leaves the language model unchanged. Visual
            and textual prompts cannot both be disabled.
        num_interaction_tokens (`int`, *optional*):
            Number of interaction prompts: vectors of the vision encoder's width that go through the connector into the
            language model. `None` (default): 0 with `interaction_placement="layers"`; with "image",
            `num_visual_tokens` if the model has both kinds of prompts and its connector supports it.
        interaction_placement (`str`, defaults to `"layers"`):
            Where interaction prompts go. "layers": each layer of the language model has its own, which become textual
            prompt rows there; this works with every connector that maps tokens to tokens. Careful: a pretrained
            language model does not know the outputs of the connector for them, however they are initialized (13 to 15
            nats per token of plain text before the first step, compared to 3 for the base model). "image": one set, in
            front of the image features that enter the connector, so that each image has that many more tokens. This
            is the paper's placement. It needs a prepared processor, see [`adapt_processor`].
        tune_connector (`bool`, defaults to `True`):
            Train the connector, the paper's interaction layer.
        connector_rank (`int` or `str`, *optional*, defaults to `"auto"`):
            How the connector is trained. An integer: each linear layer gets an update `B A` of this rank, which is
            zero at first. `None`: a full copy is trained, as in the paper, which can be most of the adapter (21
            million parameters in LLaVA-1.5-7B). "auto": rank 64, or a full copy where that has no more parameters
            (narrow connectors, and those without linear layers, as of Gemma 3). The resolved value is saved.
        visual_layers (`list[int]` or `str`, *optional*):
            The layers of the vision encoder that get prompts. `None` (default): all *live* layers, those whose output
            the model uses (LLaVA with `vision_feature_layer=-2` ignores the last one). A list holds layer indices;
            negative ones count back from the last live layer. A string is one of "first" (the first live layer), "odd"
            (layers 1, 3, 5, ...), "bottom_half" (the half next to the input) and "top_half" (the half next to the
            output; the larger one if the number of layers is odd).
        textual_layers (`list[int]` or `str`, *optional*):
            The same for the language model.
        init_prompts (`str`, defaults to `"states"`):
            How prompts are initialized. "states": textual prompts start as the hidden states of a text in each layer,
            so that the adapter at first equals the base model behind that text, and visual prompts as those of a blank
            image. Where a model has no such states, and for interaction prompts, "xavier_uniform" is used. All prompts
            are then trained at the scale of their rows, `P = s * W` with a fixed scale `s` and a trained `W`. So a
            step of AdamW moves a row by 160 times the learning rate, divided by the number of layers with such
            prompts, relative to its norm: 3e-3 suits prompts as well as the connector. The other choices train the
            prompts themselves, and break a pretrained language model before the first step (10 nats per token of plain
            text, compared to 3 for the base model). "xavier_uniform" is the paper's, on shape `[1, n, D]`: uniform in
            `[-a, a]` with `a = sqrt(6 / ((n + 1) * D))`. "normal" draws from a normal distribution with standard
            deviation `init_std`. "vocabulary" uses the embeddings of random tokens except special tokens for textual
            prompts, and "xavier_uniform" for visual prompts.
        init_std (`float`, defaults to 0.02):
            Standard deviation for `init_prompts="normal"`. Ignored otherwise.
        init_text (`str`, *optional*):
            For `init_prompts="states"`: the text that textual prompts start as. It must have `num_textual_tokens`
            tokens, including special tokens that the tokenizer adds. `None` (default): a text generated by the
            language model from its first token, which needs no tokenizer.
        init_token_ids (`list[int]`, *optional*):
            The tokens of that text, instead of `init_text`.
        tokenizer_name_or_path (`str`, *optional*):
            The tokenizer for `init_text`. `None` (default): that of the base model. It is not needed to load a saved
            adapter.
        exclude_modules (`list[str]` or `str`, *optional*):
            Attention modules in the chosen layers that get no prompts. A list holds module paths or suffixes of them;
            a string is a regular expression that matches the whole path.
        modules_to_save (`list[str]`, *optional*):
            Other modules to train in full and save with the adapter, for example `["lm_head"]`. Careful: this can need
            far more memory and disk space than all prompts.
        vision_encoder (`str`, *optional*):
            Module path of the vision encoder, for models in which it is not found automatically.
        text_decoder (`str`, *optional*):
            Module path of the language model, for models in which it is not found automatically.
        connector (`str`, *optional*):
            Module path of the connector, for models in which it is not found automatically.

    Raises:
        ValueError: If a field has an invalid type or value. The message names field and value.

    Example:

    ```py
    >>> import peft_m2pt
    >>> from peft import get_peft_model

    >>> config = peft_m2pt.M2PTConfig(num_visual_tokens=20, num_textual_tokens=10)
    >>> model = get_peft_model(vlm, config)
    ```
    """

    num_visual_tokens: int = _option(20, "Prompt vectors in each layer of the vision encoder, 0 for none.")
    num_textual_tokens: int = _option(10, "Prompt vectors in each layer of the language model, 0 for none.")
    num_interaction_tokens: int | None = _option(
        None, "Prompt vectors that go through the connector. None: 0, or num_visual_tokens in placement 'image'."
    )
    interaction_placement: str = _option("layers", f"Where interaction prompts go, one of {PLACEMENTS}.")
    tune_connector: bool = _option(True, "Train the connector.")
    connector_rank: int | str | None = _option(
        "auto", "Rank of the trained update of the connector. 'auto': 64, or a copy if that is smaller. None: a copy."
    )
    visual_layers: list[int] | str | None = _option(
        None, f"Vision layers: None (all live ones), indices, or one of {LAYERS}."
    )
    textual_layers: list[int] | str | None = _option(None, f"Text layers: None (all), indices, or one of {LAYERS}.")
    init_prompts: str = _option("states", f"How prompts are initialized, one of {INITS}.")
    init_std: float = _option(0.02, "Standard deviation for init_prompts='normal'.")
    init_text: str | None = _option(None, "The text that textual prompts start as. None: generated by the model.")
    init_token_ids: list[int] | None = _option(None, "The tokens of that text, instead of init_text.")
    tokenizer_name_or_path: str | None = _option(None, "The tokenizer for init_text. None: that of the base model.")
    exclude_modules: list[str] | str | None = _option(
        None, "Modules without prompts: paths, ends of paths, or a regex."
    )
    modules_to_save: list[str] | None = _option(None, "Other modules to train in full and save, such as lm_head.")
    vision_encoder: str | None = _option(None, "Module path of the vision encoder if it is not found.")
    text_decoder: str | None = _option(None, "Module path of the language model if it is not found.")
    connector: str | None = _option(None, "Module path of the connector if it is not found.")

    # PEFT reads this attribute of each config. It is derived for each model, so it is not a field and not saved.
    target_modules = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("M2PT")
        for name in ("num_visual_tokens", "num_textual_tokens"):
            _check_count(name, getattr(self, name))
        if self.num_visual_tokens == 0 and self.num_textual_tokens == 0:
            raise ValueError(
                "num_visual_tokens=0 and num_textual_tokens=0 leave nothing to tune. Set at least one of them above 0."
            )
        self._check_interaction()
        for name in ("visual_layers", "textual_layers"):
            setattr(self, name, _checked_layers(name, getattr(self, name)))
        if self.init_prompts not in INITS:
            raise ValueError(f"init_prompts={self.init_prompts!r} is unknown. Choose one of {INITS}.")
        if self.init_prompts == "vocabulary" and self.num_textual_tokens == 0:
            raise ValueError(
                "init_prompts='vocabulary' initializes textual prompts, but num_textual_tokens=0. "
                "Choose 'xavier_uniform' or 'normal', or set num_textual_tokens above 0."
            )
        if not _is_number(self.init_std) or not math.isfinite(self.init_std) or self.init_std <= 0:
            raise ValueError(f"init_std={self.init_std!r} is not a finite number above 0.")
        self._check_text()
        self.exclude_modules = _checked_names("exclude_modules", self.exclude_modules, allow_string=True)
        if isinstance(self.exclude_modules, str):
            try:
                re.compile(self.exclude_modules)
            except re.error as error:
                raise ValueError(
                    f"exclude_modules={self.exclude_modules!r} is not a valid regular expression: {error}."
                ) from None
        self.modules_to_save = _checked_names("modules_to_save", self.modules_to_save)
        for name in ("vision_encoder", "text_decoder", "connector"):
            path = getattr(self, name)
            if path is not None and (not isinstance(path, str) or not path):
                raise ValueError(f"{name}={path!r} is not a module path, such as 'model.vision_tower'.")

    @property
    def trainable_token_indices(self) -> Any:
        # PEFT reads this with `getattr(config, ..., None)`. TRL reads it if a chat template has new tokens.
        raise AttributeError(
            "M2PT has no trainable_token_indices: it cannot train embeddings of single tokens. If a chat template has "
            "new tokens (chat_template_path=...), use a template without them, or add them to tokenizer and model "
            "first and train all embeddings with modules_to_save=['embed_tokens', 'lm_head']."
        )

    def _check_text(self) -> None:
        for name in ("init_text", "tokenizer_name_or_path"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name}={value!r} is neither a string nor None.")
        token_ids = self.init_token_ids
        if token_ids is not None:
            # Sets have no order.
            items = None if isinstance(token_ids, Set) else _as_list(token_ids)
            if items is None or not all(map(_is_token_id, items)):
                raise ValueError(
                    f"init_token_ids={token_ids!r} is not a list of token ids: "
                    f"{_describe_problem(token_ids, items, _is_token_id)}."
                )
            self.init_token_ids = items
        given = [name for name in ("init_text", "init_token_ids") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError("init_text and init_token_ids are both given. Leave one of them out.")
        if self.tokenizer_name_or_path is not None and self.init_text is None:
            raise ValueError("tokenizer_name_or_path names the tokenizer for init_text, which is not given.")
        if given and self.init_prompts != "states":
            raise ValueError(
                f"{given[0]} says what textual prompts start as, but init_prompts={self.init_prompts!r}. Set "
                f"init_prompts='states', or leave {given[0]} out."
            )
        if given and self.num_textual_tokens == 0:
            raise ValueError(f"{given[0]} says what textual prompts start as, but num_textual_tokens=0.")
        if self.init_token_ids is not None and len(self.init_token_ids) != self.num_textual_tokens:
            raise ValueError(
                f"init_token_ids has {len(self.init_token_ids)} tokens, but num_textual_tokens="
                f"{self.num_textual_tokens}: each token initializes one prompt. Make the two equal."
            )

    def _check_interaction(self) -> None:
        if self.num_interaction_tokens is not None:
            _check_count("num_interaction_tokens", self.num_interaction_tokens)
        if self.interaction_placement not in PLACEMENTS:
            raise ValueError(
                f"interaction_placement={self.interaction_placement!r} is unknown. Choose one of {PLACEMENTS}."
            )
        if not isinstance(self.tune_connector, bool):
            raise ValueError(f"tune_connector={self.tune_connector!r} is neither True nor False.")
        if self.connector_rank is not None and self.connector_rank != "auto":
            if not _is_index(self.connector_rank) or self.connector_rank < 1:
                raise ValueError(
                    f"connector_rank={self.connector_rank!r} is not an integer above 0. Use 'auto' for the default "
                    f"rank, None for a full copy of the connector, and tune_connector=False to leave it unchanged."
                )
            if not self.tune_connector:
                raise ValueError(
                    f"connector_rank={self.connector_rank} says how to tune the connector, but tune_connector=False."
                )

    @property
    def wanted_interaction_tokens(self) -> int:
        """Number of interaction prompts, if the connector supports them."""
        if self.num_interaction_tokens is not None:
            return self.num_interaction_tokens
        in_image = self.interaction_placement == "image"
        return self.num_visual_tokens if in_image and self.num_textual_tokens > 0 else 0

    @classmethod
    def paper(cls, num_visual_tokens: int = 20, num_textual_tokens: int = 10, **kwargs: Any) -> M2PTConfig:
        """
        The configuration of the paper, as implemented by its official code.

        The official code uses the visual prompts of the last vision layer, raw and without the first of them, as
        additional tokens of each image. So there is one interaction prompt less than there are visual prompts, in
        placement "image", and the connector is tuned. To reproduce its numbers exactly, the model needs
        `vision_feature_select_strategy="full"` (without visual prompts: "default"), since that code drops a prompt
        instead of the class token, and the processor needs [`adapt_processor`].

        Args:
            num_visual_tokens (`int`, defaults to 20):
                Prompt vectors in each layer of the vision encoder. The paper uses 10 or 20.
            num_textual_tokens (`int`, defaults to 10):
                Prompt vectors in each layer of the language model.
            kwargs (*optional*):
                Other fields of [`M2PTConfig`].

        Returns:
            [`M2PTConfig`]
        """
        defaults: dict[str, Any] = {
            "num_interaction_tokens": max(num_visual_tokens - 1, 0) if _is_index(num_visual_tokens) else None,
            "interaction_placement": "image",
            "tune_connector": True,
            "connector_rank": None,
            "visual_layers": None,
            "textual_layers": None,
            "init_prompts": "xavier_uniform",
        }
        return cls(
            num_visual_tokens=num_visual_tokens, num_textual_tokens=num_textual_tokens, **{**defaults, **kwargs}
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_index(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token_id(value: Any) -> bool:
    return _is_index(value) and value >= 0


def _check_count(name: str, value: Any) -> None:
    if not _is_index(value):
        raise ValueError(f"{name}={value!r} is not an integer.")
    if value < 0:
        raise ValueError(f"{name}={value} is negative. Use 0 for no such prompts.")
    if value > MAX_TOKENS:
        raise ValueError(f"{name}={value} is more than {MAX_TOKENS}, which is longer than any sequence.")


def _checked_layers(name: str, value: Any) -> list[int] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        if value not in LAYERS:
            raise ValueError(f"{name}={value!r} is unknown. Choose one of {LAYERS}, a list of indices, or None.")
        return value
    items = _as_list(value)
    if items is None or not all(map(_is_index, items)):
        raise ValueError(
            f"{name}={value!r} is neither a list of layer indices nor one of {LAYERS} nor None: "
            f"{_describe_problem(value, items, _is_index)}."
        )
    if not items:
        raise ValueError(f"{name}={value!r} selects no layer. Use None for all layers, or 0 tokens for no prompts.")
    if len(set(items)) < len(items):
        raise ValueError(f"{name}={value!r} names a layer twice.")
    return items


def _checked_names(name: str, value: Any, allow_string: bool = False) -> Any:
    if value is None or (allow_string and isinstance(value, str)):
        return value
    items = _as_list(value)
    if items is None or not all(map(_is_name, items)):
        raise ValueError(
            f"{name}={value!r} is not a list of module names: {_describe_problem(value, items, _is_name)}."
        )
    return items


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _describe_problem(value: Any, items: list | None, is_right: Callable[[Any], bool]) -> str:
    if items is None:
        return f"it is of type {type(value).__name__}"
    wrong = next(item for item in items if not is_right(item))
    return f"it holds {wrong!r} of type {type(wrong).__name__}"


def _as_list(value: Any) -> list | None:
    """
    The items of any sequence, such as an array or an OmegaConf list, or of a set, sorted. `None` for anything else.
    """
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping)):
        return None
    if isinstance(value, Set):
        items = list(value)
        with contextlib.suppress(TypeError):  # items of several types, which are refused later
            items.sort()
        return items
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        return None
    return [int(item) if isinstance(item, Integral) and not isinstance(item, bool) else item for item in value]
