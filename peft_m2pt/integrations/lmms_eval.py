"""
M2PT in lmms-eval: `lmms_eval --model m2pt --model_args model=llava_hf,pretrained=BASE,adapter=ADAPTER`.

lmms-eval finds this model by an entry point of the group `lmms_eval.models`. It stands for any model of lmms-eval that
runs a model of transformers: lmms-eval builds that one, which then gets the adapter.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.utils import simple_parse_args_string
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from peft_m2pt import M2PTConfig, adapt_processor

from ..bundles.loading import is_bundle
from ..errors import M2PTError


NAME = "m2pt"
NEEDED = ("model", "pretrained", "adapter")


class M2PT(lmms):
    """
    Any model of lmms-eval with an M2PT adapter. [`create_from_arg_string`] returns that model itself.
    """

    is_simple = False

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> lmms:
        """
        Builds a model of lmms-eval and puts an adapter into it.

        Args:
            arg_string (`str`):
                `model`: the name that lmms-eval has for the model, such as "llava_hf". `pretrained`: the base model.
                `adapter`: a folder, or the id of a repository on the Hub. The rest is passed to the model.
            additional_config (`dict[str, Any]`, *optional*):
                Arguments of the model that are options of lmms-eval, such as `device`.

        Returns:
            `lmms`: The model.

        Raises:
            ValueError: If an argument is missing, or if its value cannot be used. The message names it.
        """
        arguments = simple_parse_args_string(arg_string)
        if missing := [name for name in NEEDED if name not in arguments]:
            raise ValueError(
                f"--model {NAME} lacks {', '.join(f'{name}=' for name in missing)}. It takes --model_args "
                f"model=llava_hf,pretrained=BASE,adapter=ADAPTER, and the arguments of the model itself."
            )
        name, adapter = arguments.pop("model"), str(arguments.pop("adapter"))
        model_class = _find_class(name, cls.is_simple)
        config = M2PTConfig.from_pretrained(adapter)
        _check_base(str(arguments["pretrained"]))
        given = {key: value for key, value in (additional_config or {}).items() if value is not None}
        # `dict` refuses an argument that is given twice.
        evaluated = model_class.create_from_arg_string("", dict(**arguments, **given))
        _put_in(evaluated, name, adapter, config)
        return evaluated


class M2PTSimple(M2PT):
    """The same for `--force_simple`, with the model of lmms-eval that does not use a chat template."""

    is_simple = True


def manifest() -> ModelManifest:
    """The function that the entry point names."""
    return ModelManifest(
        model_id=NAME,
        simple_class_path=f"{__name__}.{M2PTSimple.__name__}",
        chat_class_path=f"{__name__}.{M2PT.__name__}",
    )


def _find_class(name: str, is_simple: bool) -> type[lmms]:
    # Not at the top, since that module of lmms-eval imports this one.
    from lmms_eval.models import get_model, list_available_models

    if name == NAME or name not in list_available_models(include_aliases=True):
        raise ValueError(
            f"model={name!r} is no model of lmms-eval that can get an adapter. Give the name that --model takes "
            f"without M2PT, such as llava_hf; `lmms-eval models --aliases` lists them."
        )
    return get_model(name, force_simple=is_simple)


def _check_base(base: str) -> None:
    if is_bundle(Path(base)):
        raise ValueError(
            f"pretrained={base!r} is a bundle, which has an adapter already, and which the models of lmms-eval cannot "
            f"load since they call classes of transformers by their names. Give the base model and the adapter that "
            f"the bundle was made of."
        )


def _put_in(evaluated: lmms, name: str, adapter: str, config: M2PTConfig) -> None:
    parts = vars(evaluated)
    model = parts.get("_model")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model={name!r} does not hold a model of transformers in `_model`, but {type(model).__name__}, so "
            f"{NAME} cannot put an adapter into it. Take a model of lmms-eval that runs one model of transformers in "
            f"its own process: no engine, no server, no several copies, no FSDP or DeepSpeed."
        )
    # In place, so that it does not matter who else holds the model.
    PeftModel.from_pretrained(model, adapter)
    model.__class__ = type(type(model).__name__, (_StopsWhenRefused, type(model)), {})
    _adapt_processors([part for part in parts.values() if isinstance(part, ProcessorMixin)], name, config)


def _adapt_processors(processors: list[ProcessorMixin], name: str, config: M2PTConfig) -> None:
    in_image = config.interaction_placement == "image" and config.wanted_interaction_tokens > 0
    if in_image and not processors:
        raise ValueError(
            f"interaction_placement='image' of the adapter needs more tokens for each image, but model={name!r} has "
            f"no processor of transformers that could leave room for them. Take another model of lmms-eval."
        )
    for processor in processors:
        # Resets one that was saved for another adapter.
        if in_image or hasattr(processor, "num_additional_image_tokens"):
            adapt_processor(processor, config)


class _StopsWhenRefused:
    """
    Stops the program where M2PT refuses a call. Models of lmms-eval, such as llava_hf, would log the error and score
    an empty answer.
    """

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().generate(*args, **kwargs)
        except M2PTError as error:
            # Not an `Exception`, which they catch.
            sys.exit(f"error: {error}")
