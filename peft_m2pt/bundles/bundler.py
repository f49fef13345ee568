"""Makes bundles: a base model and an adapter in one folder, for programs that take a model name."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, ProcessorMixin

from ..adapter_files import AdapterSource
from ..config import M2PTConfig
from ..errors import BundleError, ConversionError
from ..processing import MARK, adapt_processor
from ..saving.checkpoints import FILES, find_files, read_json
from ..saving.folders import atomic_folder, is_taken
from ..saving.model_card import find_loader, is_repo_id
from ..upstream import WEIGHTS_FIELD
from .fetching import WEIGHTS, fetch_adapter, fetch_base
from .loading import BASE_INDEX, make_bundle_config
from .readme import describe_bundle
from .textual_rows import make_tuned, textual_rows


# The prompt rows of each layer of the language model, by the path of its attention. The prefix shows in the errors of
# programs that take them for weights.
ROWS = "m2pt_textual_rows.safetensors"


ROWS_PREFIX = "peft_m2pt.textual_rows."


INDEX = "model.safetensors.index.json"


PROCESSOR = "processor_config.json"


# Files of processors saved by older versions of transformers.
OLD_PROCESSOR = ("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")


TEMPLATES = "additional_chat_templates"


def bundle(
    base: str | os.PathLike,
    adapter: str | os.PathLike,
    output: str | os.PathLike,
    *,
    revision: str | None = None,
    adapter_revision: str | None = None,
    adapter_subfolder: str | None = None,
    copy: bool = False,
) -> M2PTConfig:
    """
    Makes one folder of a base model and an adapter. After `import peft_m2pt`, the auto classes of transformers, such
    as `AutoModelForImageTextToText`, load it as one model, with the outputs of a `PeftModel`. Programs without this
    package fail on it instead of loading the base model alone.

    Weights of the base model are not read, except those of the connector if interaction prompts of the language model
    go through it.

    Args:
        base (`str` or `os.PathLike`):
            The base model: a folder, or a repository on the Hub, which is downloaded to the cache.
        adapter (`str` or `os.PathLike`):
            The M2PT adapter: a folder or repository as well.
        output (`str` or `os.PathLike`):
            Folder to write, new or empty. It is created once it is complete.
        revision (`str`, *optional*):
            Branch, tag or commit of the base model. `None` (default) for the one in the config of the adapter.
        adapter_revision (`str`, *optional*):
            Branch, tag or commit of the adapter.
        adapter_subfolder (`str`, *optional*):
            Folder of the adapter in its repository. PEFT saves an adapter not named "default" in a folder of its name.
        copy (`bool`, defaults to `False`):
            Whether to copy the files of the base model instead of linking to them.

    Returns:
        [`M2PTConfig`]: The configuration of the adapter.

    Raises:
        BundleError: If the two do not belong together, or cannot be bundled exactly.
        AdapterFileError: If a file of the adapter is damaged, or if it is the adapter of another method.
        OSError: If something cannot be downloaded or written.

    Example:

    ```py
    >>> import peft_m2pt
    >>> from transformers import AutoModelForImageTextToText

    >>> config = peft_m2pt.bundle("llava-hf/llava-1.5-7b-hf", "me/adapter", "bundle")
    >>> model = AutoModelForImageTextToText.from_pretrained("bundle")
    ```
    """
    base, adapter, output = os.fspath(base), os.fspath(adapter), Path(output)
    if is_taken(output):
        raise BundleError(f"{output} exists and is not empty. Choose another output folder.")
    try:
        # Everything is checked before anything is written.
        parts = _collect(base, adapter, revision, adapter_revision, adapter_subfolder)
    except ConversionError as error:
        raise BundleError(error.reason) from error
    with atomic_folder(output) as folder:
        _write(folder, parts, copy)
    return parts.config


@dataclass(frozen=True)
class _Parts:
    """The contents of a bundle."""

    base: str
    adapter: str
    base_folder: Path
    adapter_folder: Path
    files: list[Path]
    config: M2PTConfig
    loader: str
    tensors: dict[str, torch.Tensor]
    rows: dict[str, torch.Tensor]
    processor: ProcessorMixin | None


def _collect(
    base: str, adapter: str, revision: str | None, adapter_revision: str | None, adapter_subfolder: str | None
) -> _Parts:
    adapter_folder = fetch_adapter(adapter, adapter_revision, adapter_subfolder)
    config = M2PTConfig.from_pretrained(str(adapter_folder))
    base_folder = fetch_base(base, _resolve_revision(config, base, revision))
    files = list(find_files(base_folder))
    _check_base(config, base, base_folder, files)
    model_config = _read_base_config(base_folder)
    tensors = AdapterSource(str(adapter_folder), {}).load_weights(None)
    model = _make_tuned(model_config, base_folder, adapter_folder)
    # An engine that uses the rows alone would miss other trained weights.
    is_all = not config.modules_to_save and all("m2pt_" in name for name in tensors)
    rows = {f"{ROWS_PREFIX}{path}": row for path, row in textual_rows(model).items()} if is_all else {}
    processor = _adapted_processor(config, base_folder, adapter_folder)
    loader = find_loader(type(model).__name__)
    return _Parts(base, adapter, base_folder, adapter_folder, files, config, loader, tensors, rows, processor)


def _write(folder: Path, parts: _Parts, copy: bool) -> None:
    if parts.processor is not None:
        parts.processor.save_pretrained(folder)
    _add_base(folder, parts, copy)
    shutil.copyfile(parts.adapter_folder / CONFIG_NAME, folder / CONFIG_NAME)
    save_file(parts.tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    if parts.rows:
        save_file(parts.rows, folder / ROWS, metadata={"format": "pt"})
    if (folder / BASE_INDEX).exists():
        _write_index(folder, parts)
    text = describe_bundle(parts.base, parts.adapter, parts.loader, parts.config, bool(parts.rows), copy)
    (folder / "README.md").write_text(text, encoding="utf-8")
    # Last, since the folder is no model without it.
    config = make_bundle_config(read_json(parts.base_folder / "config.json"))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _resolve_revision(config: PeftConfig, base: str, revision: str | None) -> str | None:
    """The revision of the base model. A requested one must be that in the config of the adapter, if there is one."""
    tuned_on = config.revision if config.base_model_name_or_path == base else None
    if revision is not None and tuned_on is not None and revision != tuned_on:
        raise BundleError(
            f"revision={revision!r} of the base model {base!r} was requested, but the adapter was tuned on revision "
            f"{tuned_on!r} (in its {CONFIG_NAME}). Leave it out to use that one."
        )
    return revision or (None if Path(base).is_dir() else tuned_on)


def _check_base(config: PeftConfig, base: str, folder: Path, files: list[Path]) -> None:
    """Refuses a base model that is known not to be the one that the adapter was tuned on."""
    if (folder / CONFIG_NAME).exists():
        method = read_json(folder / CONFIG_NAME).get("peft_type")
        raise BundleError(
            f"BASE {base!r} has an adapter of its own (peft_type={method!r} in {folder / CONFIG_NAME}). Merge it into "
            f"its base model (merge_and_unload(), save_pretrained) and bundle with that."
        )
    tuned_on = config.base_model_name_or_path
    if not tuned_on or tuned_on == base:
        return
    if Path(tuned_on).is_dir():
        differs = _differs(Path(tuned_on), files)
    else:
        differs = True if is_repo_id(tuned_on) and is_repo_id(base) else None
    if differs:
        raise BundleError(
            f"base_model_name_or_path={tuned_on!r} in the {CONFIG_NAME} of the adapter, but BASE is {base!r}: prompts "
            f"only work with the model that they were tuned on. Bundle the adapter with {tuned_on!r}. If these are "
            f"two names of the same model, change the name in that file."
        )
    if differs is None:
        warnings.warn(
            f"The adapter was tuned on {tuned_on!r} (base_model_name_or_path), but is bundled with {base!r}. Whether "
            f"the two have the same weights cannot be checked: only their shapes are compared."
        )


def _differs(tuned_on: Path, files: list[Path]) -> bool | None:
    """Whether a base model has other weights than the one in a folder. `None` if that has no weights anymore."""
    try:
        others = {path.name: path for path in find_files(tuned_on)}
    except ConversionError:
        return None
    if others.keys() != {file.name for file in files}:
        return True
    return not all(file.samefile(others[file.name]) or filecmp.cmp(file, others[file.name], False) for file in files)


def _read_base_config(folder: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(f"{folder / 'config.json'} is not the config of a transformers model: {error}") from error
    if getattr(config, WEIGHTS_FIELD, None) is not None:
        raise BundleError(
            f"{WEIGHTS_FIELD}={getattr(config, WEIGHTS_FIELD)!r} in {folder / 'config.json'}: a bundle needs this "
            f"field itself. Load the base model and save it again (save_pretrained)."
        )
    return config


def _make_tuned(config: PretrainedConfig, base: Path, adapter: Path) -> PreTrainedModel:
    try:
        return make_tuned(config, base, adapter)
    except (BundleError, OSError):
        raise
    except (RuntimeError, ValueError) as error:
        raise BundleError(f"The adapter in {adapter} does not fit the base model in {base}: {error}") from error


def _adapted_processor(config: M2PTConfig, base: Path, adapter: Path) -> ProcessorMixin | None:
    """The processor of the adapter, or the base model's with room for interaction prompts. `None` if unchanged."""
    source = adapter if (adapter / PROCESSOR).is_file() else base
    in_image = config.interaction_placement == "image" and config.wanted_interaction_tokens > 0
    settings = source / "tokenizer_config.json"
    was_adapted = settings.is_file() and MARK in settings.read_text(encoding="utf-8")
    if source == base and not in_image and not was_adapted:
        return None
    try:
        # Not imported at the top, which would slow down the import of this package.
        processor = transformers.AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        raise BundleError(
            f"interaction_placement={config.interaction_placement!r}: the bundle needs a processor of its own, but "
            f"none can be loaded from {source}: {error}"
        ) from error
    return adapt_processor(processor, config) if in_image or was_adapted else processor


def _add_base(folder: Path, parts: _Parts, copy: bool) -> None:
    """Copies or links the files of a base model, except those of which a bundle has its own version."""
    base, weights = parts.base_folder, {file.name for file in parts.files}
    without = {"config.json", "README.md", INDEX, *(OLD_PROCESSOR if parts.processor is not None else ())}
    for path in sorted(base.iterdir()):
        is_other = not path.name.startswith(".") and not path.name.endswith(WEIGHTS) and path.name not in without
        if path.is_file() and (path.name in weights or is_other) and not (folder / path.name).exists():
            _add(path, folder / path.name, copy)
    if (base / TEMPLATES).is_dir() and parts.processor is None:
        (folder / TEMPLATES).mkdir()
        for path in (base / TEMPLATES).iterdir():
            _add(path, folder / TEMPLATES / path.name, copy)
    if (base / INDEX).is_file() and weights.isdisjoint(FILES):
        _add(base / INDEX, folder / BASE_INDEX, copy)


def _add(source: Path, target: Path, copy: bool) -> None:
    if copy:
        shutil.copyfile(source, target)
    else:
        target.symlink_to(source.absolute())


def _write_index(folder: Path, parts: _Parts) -> None:
    """Writes an index that also names the tensors of the adapter, so that programs without M2PT fail on them."""
    index = read_json(folder / BASE_INDEX)
    for file, tensors in ((SAFETENSORS_WEIGHTS_NAME, parts.tensors), (ROWS, parts.rows)):
        index["weight_map"] |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
