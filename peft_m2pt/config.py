"""The configuration of M2PT."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from numbers import Integral
from types import MappingProxyType
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import PeftType

from .source import AdapterSource, naming_the_file


LAYERS = ("first", "odd", "top_half", "bottom_half")
PLACEMENTS = ("layers", "image")
MAX_TOKENS = 2**20
INITS = ("states", "xavier_uniform", "normal", "vocabulary")


@dataclass
class M2PTConfig(PeftConfig):
    """
    Configuration of M2PT, Multimodal Prompt Tuning (EMNLP 2024, [arXiv 2409.15657](https://arxiv.org/abs/2409.15657)).

    Every adapted self-attention layer `i` of the frozen model gets its own prompt `P_i` of shape `[n, D]`. The layer
    computes on `[P_i ; tokens]`, and what it computes at the prompt rows is replaced by `P_{i+1}` in the next layer.

    Args:
        num_visual_tokens (`int`, defaults to 20):
            Prompt vectors in each layer of the vision encoder. 0 leaves the vision encoder untouched.
        num_textual_tokens (`int`, defaults to 10):
            Prompt vectors in each layer of the language model. 0 leaves the language model untouched. Visual and
            textual prompts cannot both be switched off.
        num_interaction_tokens (`int`, *optional*):
            Interaction prompts: vectors of the vision encoder's width that go through the connector into the language
            model. `None` (default): none with `interaction_placement="layers"`; with "image", as many as
            `num_visual_tokens` if the model has both kinds of prompts and its connector allows it.
        interaction_placement (`str`, defaults to `"layers"`):
            Where interaction prompts go. "layers": each layer of the language model has its own, which become textual
            prompt rows there; it works with every connector that maps tokens to tokens. Careful: what a connector
            makes of them is nothing that a pretrained language model knows, however they are initialised (plain text
            at 13 to 15 nats a token before the first step, where the model by itself is at 3). "image": one set, in
            front of the image features that enter the connector, so that every image has that many more tokens. This
            is the paper's; the processor must know, see [`adapt_processor`].
        tune_connector (`bool`, defaults to `True`):
            Train a copy of the connector, the paper's interaction layer. Careful: in models with a big connector, this
            is most of the adapter (21 million parameters in LLaVA-1.5-7B); see `connector_rank`.
        connector_rank (`int`, *optional*):
            Train an update of this rank of each linear layer of the connector, instead of a full copy.
        visual_layers (`list[int]` or `str`, *optional*):
            The layers of the vision encoder that get prompts. `None` (default): all *live* layers, that is all whose
            output the model reads (LLaVA with `vision_feature_layer=-2` ignores the last one). A list holds layer
            indices, of which negative ones count back from the last live layer. A string is one of the placements
            "first" (the first live layer), "odd" (layers 1, 3, 5, ...), "bottom_half" (the half next to the input) and
            "top_half" (the half next to the output; the larger one if the number of layers is odd).
        textual_layers (`list[int]` or `str`, *optional*):
            The same for the language model.
        init_prompts (`str`, defaults to `"states"`):
            How prompts are initialised. "states": textual prompts start as what the tokens of a text are in each
            layer, so that the adapter at first equals the base model behind that text, and visual prompts as what a
            blank image is in each layer. Where a model cannot be asked for these, or for interaction prompts, they
            start as with "xavier_uniform". All prompts are then trained in units of their rows: a row `P = s * W` has
            a fixed scale `s`, and the optimizer sees `W`. So a step of AdamW turns every row by 160 times the learning
            rate, divided by the number of layers with such prompts, whatever the width: 3e-3 suits prompts as well as
            the connector. The other choices train the prompts as they are, and break a pretrained
            language model before the first step (a plain text at 10 nats a token, where the model by itself is at
            3). "xavier_uniform" is the paper's, on shape `[1, n, D]`: uniform in `[-a, a]` with
            `a = sqrt(6 / ((n + 1) * D))`. "normal" draws from a normal distribution with standard deviation
            `init_std`. "vocabulary" starts each textual prompt at the embeddings of random tokens of the model's
            vocabulary, special tokens left out; visual prompts, which have no vocabulary, are then initialised with
            "xavier_uniform".
        init_std (`float`, defaults to 0.02):
            Standard deviation of `init_prompts="normal"`. Ignored otherwise.
        init_text (`str`, *optional*):
            For `init_prompts="states"`: the text that the textual prompts start as. With the special tokens that the
            tokenizer adds, it must have `num_textual_tokens` tokens. `None` (default): the text with which the
            language model by itself continues its first token, for which no tokenizer is needed.
        init_token_ids (`list[int]`, *optional*):
            The tokens of that text, in the place of `init_text`.
        tokenizer_name_or_path (`str`, *optional*):
            The tokenizer for `init_text`. `None` (default): that of the base model. It is not needed to load a saved
            adapter.
        exclude_modules (`list[str]` or `str`, *optional*):
            Attention modules that get no prompts, though their layer is chosen. A list holds module paths or their
            ends, a string is a regular expression for the whole path.
        modules_to_save (`list[str]`, *optional*):
            Other modules to train in full and to save with the adapter, for example `["lm_head"]`. Careful: this can
            cost far more memory and disk than all prompts.
        vision_encoder (`str`, *optional*):
            Module path of the vision encoder, for models in which it is not found.
        text_decoder (`str`, *optional*):
            Module path of the language model, for models in which it is not found.
        connector (`str`, *optional*):
            Module path of the connector between the two, for models in which it is not found.

    Raises:
        ValueError: If a field has a type or value that no model could take. The message names field and value.

    Example:

    ```py
    >>> import peft_m2pt
    >>> from peft import get_peft_model

    >>> config = peft_m2pt.M2PTConfig(num_visual_tokens=20, num_textual_tokens=10)
    >>> model = get_peft_model(vlm, config)
    ```
    """

    num_visual_tokens: int = field(
        default=20, metadata={"help": "Prompt vectors in each layer of the vision encoder, 0 for none."}
    )
    num_textual_tokens: int = field(
        default=10, metadata={"help": "Prompt vectors in each layer of the language model, 0 for none."}
    )
    num_interaction_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Prompt vectors that go through the connector. None: as many as visual ones in placement 'image', "
            "if possible, else none."
        },
    )
    interaction_placement: str = field(
        default="layers", metadata={"help": f"Where interaction prompts go, one of {PLACEMENTS}."}
    )
    tune_connector: bool = field(
        default=True, metadata={"help": "Train a copy of the connector, often the biggest part of the adapter."}
    )
    connector_rank: int | None = field(
        default=None, metadata={"help": "Rank of a low-rank update to train instead of a copy of the connector."}
    )
    visual_layers: list[int] | str | None = field(
        default=None,
        metadata={"help": f"Vision layers with prompts: None (all live ones), indices, or one of {LAYERS}."},
    )
    textual_layers: list[int] | str | None = field(
        default=None,
        metadata={"help": f"Language model layers with prompts: None (all), indices, or one of {LAYERS}."},
    )
    init_prompts: str = field(default="states", metadata={"help": f"How prompts are initialised, one of {INITS}."})
    init_std: float = field(default=0.02, metadata={"help": "Standard deviation for init_prompts='normal'."})
    init_text: str | None = field(
        default=None,
        metadata={
            "help": "For init_prompts='states': the text that textual prompts start as. None: one of the model's own."
        },
    )
    init_token_ids: list[int] | None = field(
        default=None, metadata={"help": "For init_prompts='states': the tokens of the text, in place of init_text."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "The tokenizer for init_text. None: that of the base model."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Attention modules without prompts: paths, ends of paths, or a regex."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train in full and to save. Can cost more than all prompts."}
    )
    vision_encoder: str | None = field(
        default=None, metadata={"help": "Module path of the vision encoder where it is not found."}
    )
    text_decoder: str | None = field(
        default=None, metadata={"help": "Module path of the language model where it is not found."}
    )
    connector: str | None = field(
        default=None, metadata={"help": "Module path of the connector where it is not found."}
    )

    # PEFT reads this name on every tuner's config. It holds the adapted modules once a model is known, is derived anew
    # for every model, and is therefore not a field: it is neither a choice of the user nor saved.
    target_modules: ClassVar[set[str] | None] = None

    # What the fields above that leave something to the model amount to in the model that was adapted last. It is saved
    # in their place.
    resolved: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    # Where the config was read from, and whether PEFT is about to load the weights that lie beside it. Neither saved
    # nor pickled, since there may be a token among it.
    source: ClassVar[AdapterSource | None] = None
    loads_weights: ClassVar[bool] = False

    # What the model card is to say (a `Card`), while a model is being saved. No field either.
    card: ClassVar[Any] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("M2PT")
        for name in ("num_visual_tokens", "num_textual_tokens"):
            _check_count(name, getattr(self, name))
        if self.num_visual_tokens == 0 and self.num_textual_tokens == 0:
            raise ValueError(
                "num_visual_tokens=0 and num_textual_tokens=0 leave nothing to tune. Set at least one above 0."
            )
        self._check_interaction()
        for name in ("visual_layers", "textual_layers"):
            setattr(self, name, _checked_layers(name, getattr(self, name)))
        if self.init_prompts not in INITS:
            raise ValueError(f"init_prompts={self.init_prompts!r} is unknown. Choose one of {INITS}.")
        if self.init_prompts == "vocabulary" and self.num_textual_tokens == 0:
            raise ValueError(
                "init_prompts='vocabulary' initialises textual prompts, but num_textual_tokens=0. "
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
                    f"exclude_modules={self.exclude_modules!r} is no regular expression: {error}."
                ) from None
        self.modules_to_save = _checked_names("modules_to_save", self.modules_to_save)
        for name in ("vision_encoder", "text_decoder", "connector"):
            path = getattr(self, name)
            if path is not None and (not isinstance(path, str) or not path):
                raise ValueError(f"{name}={path!r} is not a module path, such as 'model.vision_tower'.")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # The first thing that PEFT does with a config whose weights it will load.
        if name == "inference_mode" and self.source is not None:
            self.loads_weights = True

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("source", "loads_weights")}

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **self.resolved}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        card, self.card = self.card, None
        if card is not None:
            card.complete(save_directory)

    @property
    def trainable_token_indices(self) -> Any:
        # PEFT takes this error for "none". TRL asks for the field when a chat template brings new tokens.
        raise AttributeError(
            "M2PT has no trainable_token_indices: it trains no embeddings of single tokens. If a chat template brings "
            "new tokens (chat_template_path=...), give the tokenizer a template without them, or add them to "
            "tokenizer and model first and train all embeddings with modules_to_save=['embed_tokens', 'lm_head']."
        )

    def _check_text(self) -> None:
        for name in ("init_text", "tokenizer_name_or_path"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name}={value!r} is neither a string nor None.")
        token_ids = self.init_token_ids
        if token_ids is not None:
            # The order of tokens matters, and a set has none.
            items = None if isinstance(token_ids, Set) else _as_list(token_ids)
            if items is None or not all(map(_is_token_id, items)):
                raise ValueError(
                    f"init_token_ids={token_ids!r} is not a list of the ids of tokens: "
                    f"{_what_is_wrong(token_ids, items, _is_token_id)}."
                )
            self.init_token_ids = items
        given = [name for name in ("init_text", "init_token_ids") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError("init_text and init_token_ids are both given. Give one of them.")
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
                f"{self.num_textual_tokens}: each token is the start of one prompt. Make the two equal."
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
        if self.connector_rank is not None:
            if not _is_index(self.connector_rank) or self.connector_rank < 1:
                raise ValueError(
                    f"connector_rank={self.connector_rank!r} is not an integer above 0. Use None for a full copy of "
                    f"the connector, and tune_connector=False to leave it as it is."
                )
            if not self.tune_connector:
                raise ValueError(
                    f"connector_rank={self.connector_rank} says how to tune the connector, but tune_connector=False."
                )

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        loaded = super().from_json_file(path_json_file, **kwargs)
        if isinstance(loaded, dict) and "peft_type" not in loaded:
            raise _NamesNoMethod(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}. "
                f'Without it, \'{path_json_file}\' may be of any method: add "peft_type": "M2PT" if it is of this one.'
            )
        return loaded

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> M2PTConfig:
        """
        Reads the configuration of a saved adapter.

        Args:
            pretrained_model_name_or_path (`str`):
                A folder, or a repository of the Hub.
            subfolder (`str`, *optional*):
                Where in it the adapter is.
            kwargs (*optional*):
                Arguments of [`huggingface_hub.hf_hub_download`], such as `revision` and `token`.

        Returns:
            [`M2PTConfig`]

        Raises:
            AdapterFileError: If there is no such file, or if it is none of an M2PT adapter. The message names file and
                field.
            TypeError: If the file does not say of which method it is.
        """
        hub_arguments, *_ = cls._split_kwargs(dict(kwargs))
        with naming_the_file(pretrained_model_name_or_path, "adapter_config.json", unless=_NamesNoMethod):
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
            if isinstance(config.exclude_modules, str):
                raise ValueError(
                    f"exclude_modules={config.exclude_modules!r} is a regular expression, and those of others can "
                    f"keep a program busy for ever. Make it a list of module paths."
                )
        if subfolder is not None:
            hub_arguments["subfolder"] = subfolder
        config.source = AdapterSource(str(pretrained_model_name_or_path), hub_arguments)
        return config

    @property
    def wanted_interaction_tokens(self) -> int:
        """Number of interaction prompts, if the connector allows them."""
        if self.num_interaction_tokens is not None:
            return self.num_interaction_tokens
        in_image = self.interaction_placement == "image"
        return self.num_visual_tokens if in_image and self.num_textual_tokens > 0 else 0

    @classmethod
    def paper(cls, num_visual_tokens: int = 20, num_textual_tokens: int = 10, **kwargs: Any) -> M2PTConfig:
        """
        The configuration of the paper, as its official code computes it.

        The official code takes the visual prompts of the last vision layer, raw and without the first of them, as
        additional tokens of every image. So there is one interaction prompt less than there are visual prompts, in
        placement "image", and the connector is tuned. For its exact numbers the model needs
        `vision_feature_select_strategy="full"` (without visual prompts: "default"), since that code keeps the class
        token where it drops the prompt, and the processor needs [`adapt_processor`].

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
        defaults = {
            "num_interaction_tokens": max(num_visual_tokens - 1, 0) if _is_index(num_visual_tokens) else None,
            "interaction_placement": "image",
            "tune_connector": True,
            "init_prompts": "xavier_uniform",
        }
        return cls(
            num_visual_tokens=num_visual_tokens, num_textual_tokens=num_textual_tokens, **{**defaults, **kwargs}
        )


class _NamesNoMethod(TypeError):
    """A file of a config does not say of which method it is. PEFT raises a `TypeError` then."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token_id(value: Any) -> bool:
    return _is_index(value) and value >= 0


def _check_count(name: str, value: Any) -> None:
    if not _is_index(value):
        raise ValueError(f"{name}={value!r} is not an integer.")
    if value < 0:
        raise ValueError(f"{name}={value} is negative. Use 0 to switch these prompts off.")
    if value > MAX_TOKENS:
        raise ValueError(f"{name}={value} is more than {MAX_TOKENS}, more than any sequence is long.")


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
            f"{_what_is_wrong(value, items, _is_index)}."
        )
    if not items:
        raise ValueError(f"{name}={value!r} chooses no layer. Use None for all layers, or 0 tokens for no prompts.")
    if len(set(items)) < len(items):
        raise ValueError(f"{name}={value!r} names a layer twice.")
    return items


def _checked_names(name: str, value: Any, allow_string: bool = False) -> list[str] | str | None:
    if value is None or (allow_string and isinstance(value, str)):
        return value
    items = _as_list(value)
    if items is None or not all(map(_is_name, items)):
        raise ValueError(f"{name}={value!r} is not a list of module names: {_what_is_wrong(value, items, _is_name)}.")
    return items


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _what_is_wrong(value: Any, items: list | None, is_right: Callable[[Any], bool]) -> str:
    if items is None:
        return f"it is of type {type(value).__name__}"
    wrong = next(item for item in items if not is_right(item))
    return f"it holds {wrong!r} of type {type(wrong).__name__}"


def _as_list(value: Any) -> list | None:
    """
    The items of a sequence of any class, such as those of configuration tools and arrays, or of a set, in which order
    does not matter. `None` if it is neither.
    """
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping)):
        return None
    if isinstance(value, Set):
        items = list(value)
        with contextlib.suppress(TypeError):  # items of several types, of which one is refused
            items.sort()
        return items
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        return None
    return [int(item) if isinstance(item, Integral) and not isinstance(item, bool) else item for item in value]
