"""The part of the config that reads and saves files, for which PEFT gives methods no hooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self, cast

from peft import PeftConfig

from .adapter_files import AdapterSource, name_damaged_file


@dataclass
class SavedConfig(PeftConfig):
    """
    The config of an adapter that can be read from and saved to files.

    PEFT does not tell a tuner where a config was read and whether the weights beside it will be loaded, and it has no
    hook for model cards. The attributes below carry this. They have no annotations, so that they are not dataclass
    fields: they are neither set by users nor saved.
    """

    # Values that were resolved for the model adapted last, saved in place of the fields' own.
    resolved = cast("Mapping[str, Any]", MappingProxyType({}))

    # Where the config was read, and whether PEFT is about to load the weights there.
    source = cast("AdapterSource | None", None)
    loads_weights = False

    # Called with the folder after the next save.
    after_save = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # The first thing that PEFT does with a config before it loads the weights.
        if name == "inference_mode" and self.source is not None:
            self.loads_weights = True

    def __getstate__(self) -> dict[str, Any]:
        # The source may hold a token.
        transient = ("source", "loads_weights", "after_save")
        return {name: value for name, value in self.__dict__.items() if name not in transient}

    def pop_source(self) -> AdapterSource | None:
        """
        Returns where the weights are that PEFT is about to load. Only once, since the config may be used for new
        adapters after that.

        Returns:
            `AdapterSource | None`: Where the adapter is. `None` if its weights will not be loaded.
        """
        source = self.source if self.loads_weights else None
        self.source, self.loads_weights = None, False
        return source

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **self.resolved}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        after_save, self.after_save = self.after_save, None
        if after_save is not None:
            after_save(save_directory)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        loaded = super().from_json_file(path_json_file, **kwargs)
        if isinstance(loaded, dict) and "peft_type" not in loaded:
            raise _MissingPeftType(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}. "
                f'If \'{path_json_file}\' is the config of an M2PT adapter, add "peft_type": "M2PT" to it.'
            )
        if isinstance(loaded, dict):
            # A saved adapter without it is of a version in which `None` was the default.
            loaded.setdefault("connector_rank", None)
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Self:
        """
        Loads the configuration of a saved adapter.

        Args:
            pretrained_model_name_or_path (`str`):
                A folder, or the id of a repository on the Hub.
            subfolder (`str`, *optional*):
                Folder of the adapter in it.
            kwargs (*optional*):
                Arguments of [`huggingface_hub.hf_hub_download`], such as `revision` and `token`.

        Returns:
            [`M2PTConfig`]

        Raises:
            AdapterFileError: If the file is missing, or is not the config of an M2PT adapter. The message names file
                and field.
            TypeError: If the file has no `peft_type`.
        """
        hub_arguments, *_ = cls._split_kwargs(dict(kwargs))
        with name_damaged_file(pretrained_model_name_or_path, "adapter_config.json", unless=_MissingPeftType):
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
            if config.peft_type != "M2PT":
                raise ValueError(
                    f"It has peft_type={config.peft_type.value!r}, so this is not an M2PT adapter. Use PeftConfig for "
                    f"adapters of other methods."
                )
            if isinstance(config.exclude_modules, str):
                raise ValueError(
                    f"exclude_modules={config.exclude_modules!r} is a regular expression, and one from an untrusted "
                    f"source can hang the program. Replace it by a list of module paths."
                )
        if subfolder is not None:
            hub_arguments["subfolder"] = subfolder
        config.source = AdapterSource(str(pretrained_model_name_or_path), hub_arguments)
        return config


class _MissingPeftType(TypeError):
    """Raised for a config without `peft_type`. A `TypeError`, as in PEFT."""
