"""Finds base models and adapters, in folders or on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME

from ..errors import BundleError
from ..saving.checkpoints import FILES, read_json
from ..saving.model_card import is_repo_id


# Suffixes of weights of all frameworks, of which only the files that transformers would load are downloaded.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".npz")


CARD = "README.md"


BESIDE_AN_ADAPTER = ("*.json", "*.jinja", "*.txt", "*.model", CARD)


def fetch_base(base: str, revision: str | None) -> Path:
    """
    Finds a base model, or downloads it to the cache.

    Args:
        base (`str`):
            A folder, or the id of a repository on the Hub.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.

    Returns:
        `Path`: A folder with all its files, except weights that transformers would not load.

    Raises:
        BundleError: If it is neither a folder nor the id of a repository.
        OSError: If it cannot be downloaded.
    """
    if _is_folder("BASE", base, "revision", revision):
        return Path(base)
    folder = _download(base, revision, ignore_patterns=[f"*{suffix}" for suffix in WEIGHTS])
    for file in FILES:
        index = folder / f"{file}.index.json"
        shards = read_json(index).get("weight_map", {}).values() if index.is_file() else ()
        # The folder is named after the commit. The branch may have moved on.
        _download(base, folder.name, allow_patterns=[file, *map(str, set(shards))])
        if (folder / file).is_file() or index.is_file():
            break
    return folder


def fetch_adapter(adapter: str, revision: str | None, subfolder: str | None) -> Path:
    """
    Finds an adapter, or downloads it to the cache.

    Args:
        adapter (`str`):
            A folder, or the id of a repository on the Hub.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        subfolder (`str`, *optional*):
            Folder of the adapter in it.

    Returns:
        `Path`: The folder of the adapter.

    Raises:
        BundleError: If there is no adapter, or if one of another method was saved with it.
        OSError: If it cannot be downloaded.
    """
    if _is_folder("ADAPTER", adapter, "adapter_revision", revision):
        root = Path(adapter)
    else:
        prefix = f"{subfolder}/" if subfolder else ""
        patterns = [f"{prefix}adapter_model.*", *BESIDE_AN_ADAPTER]
        root = _download(adapter, revision, allow_patterns=patterns)
    folder = root / (subfolder or "")
    if not (folder / CONFIG_NAME).is_file():
        names = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        reason = f"There are adapters in {names}: choose one with adapter_subfolder." if names else ""
        raise BundleError(f"ADAPTER {adapter!r} has no {CONFIG_NAME} in {folder}. {reason}".strip())
    _check_alone(folder)
    return folder


def _is_folder(what: str, source: str, field: str, revision: str | None) -> bool:
    if Path(source).is_dir():
        if revision is not None:
            raise BundleError(f"{field}={revision!r} needs a repository on the Hub, but {source!r} is a folder.")
        return True
    if not is_repo_id(source):
        raise BundleError(f"{what} {source!r} is neither a folder nor the id of a repository on the Hub.")
    return False


def _download(repo_id: str, revision: str | None, **kwargs: Any) -> Path:
    try:
        return Path(snapshot_download(repo_id, revision=revision, **kwargs))
    except Exception as error:  # raised by huggingface_hub, httpx, ...
        raise OSError(f"{repo_id!r} cannot be downloaded: {error}") from error


def _check_alone(folder: Path) -> None:
    """Refuses an adapter that was saved together with adapters of other methods."""
    parent = folder.absolute().parent
    # PEFT writes one card for all adapters of a model, above the subfolders of those not named "default".
    root = parent if not (folder / CARD).exists() and (parent / CARD).exists() else folder
    configs = [path for path in (root / CONFIG_NAME, *root.glob(f"*/{CONFIG_NAME}")) if path.is_file()]
    methods = {str(path.parent.relative_to(root)): read_json(path).get("peft_type") for path in configs}
    others = {name: method for name, method in methods.items() if method != "M2PT"}
    if others and read_json(folder / CONFIG_NAME).get("peft_type") == "M2PT":
        raise BundleError(
            f"The adapter was saved from a model that also had adapters of other methods (by peft_type): {others}. "
            f"M2PT was tuned with them, and a bundle would not have them. Merge them into the base model, save that "
            f"(merge_and_unload(), save_pretrained), and bundle it with the M2PT adapter from a separate folder."
        )
