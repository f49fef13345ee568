"""
M2PT as an adapter of axolotl, chosen in its YAML:

    plugins:
      - peft_m2pt.integrations.axolotl.M2PTPlugin
    adapter: m2pt
    m2pt:  # fields of M2PTConfig
      num_visual_tokens: 20
      num_textual_tokens: 10

`lora_modules_to_save` and `lora_model_dir` mean what they mean for LoRA: modules to train in addition, and a saved
adapter to continue, whose config is used instead of `m2pt`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel, model_validator
from transformers import PreTrainedModel

from peft_m2pt import M2PTConfig


def make_config(options: dict[str, Any]) -> M2PTConfig:
    """Makes the config of a new adapter from the options of axolotl."""
    modules = options.get("lora_modules_to_save")
    return M2PTConfig(**(options.get("m2pt") or {}), **({"modules_to_save": modules} if modules else {}))


class M2PTArgs(BaseModel):
    """
    The options that the plugin adds to those of axolotl.

    Args:
        m2pt (`dict[str, Any]`, *optional*):
            Fields of [`M2PTConfig`].

    Raises:
        ValueError: If options are set that would have no effect.
    """

    m2pt: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def check_m2pt(cls, options: dict[str, Any]) -> dict[str, Any]:
        adapter = options.get("adapter")
        if adapter != "m2pt":
            if options.get("m2pt"):
                raise ValueError(f"m2pt has fields of M2PTConfig, but adapter is {adapter!r}. Set adapter: m2pt.")
            return options
        for name in ("load_in_4bit", "load_in_8bit"):
            if options.get(name):
                raise ValueError(
                    f"{name}: true has no effect with adapter: m2pt, since axolotl quantizes models for its own "
                    f"adapters only. Leave it out."
                )
        make_config(options)
        return options


class M2PTPlugin(BasePlugin):
    """Makes and loads adapters of M2PT for axolotl."""

    def get_input_args(self) -> str:
        return f"{__name__}.{M2PTArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name="m2pt")]

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, M2PTConfig] | None:
        if cfg.adapter != "m2pt":
            return None
        if config_only and cfg.lora_model_dir:
            raise ValueError(
                f"With rl: {cfg.rl}, axolotl makes a new adapter and would ignore "
                f"lora_model_dir={cfg.lora_model_dir!r}. Train without rl, or without lora_model_dir."
            )
        config = make_config(cfg)
        if config_only:
            return None, config
        # As axolotl does for LoRA: if it is not set, PEFT has the default.
        autocast = cfg.peft_autocast_adapter_dtype
        kwargs = {} if autocast is None else {"autocast_adapter_dtype": autocast}
        if cfg.lora_model_dir:
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **kwargs)
        else:
            model = get_peft_model(model, config, **kwargs)
        model.print_trainable_parameters()
        return model, model.peft_config["default"]

    def post_train_unload(self, cfg: Any) -> None:
        """
        Removes the config of the base model, which axolotl writes beside the adapter. With it, transformers would take
        the folder for a complete model and look for the weights of the base model in it.
        """
        folder = Path(cfg.output_dir)
        has_adapter = cfg.adapter == "m2pt" and (folder / "adapter_config.json").exists()
        if has_adapter and int(os.environ.get("RANK", 0)) == 0 and not any(folder.glob("model*.safetensors")):
            (folder / "config.json").unlink(missing_ok=True)
