"""Base models and adapters as folders, wherever they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME

from .card import is_repo_id
from .checkpoint import FILES, read_json
from .errors import BundleError


# What weights are saved as, by all frameworks. Of these, only the files that transformers would load are fetched.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".npz")
CARD = "README.md"
BESIDE_AN_ADAPTER = ("*.json", "*.jinja", "*.txt", "*.model", CARD)


def fetch_base(base: str, revision: str | None) -> Path:
    """
    Finds a base model, or downloads it to the cache.

    Args:
        base (`str`):
            A folder, or a repository of the Hub.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.

    Returns:
        `Path`: A folder with all its files, but for weights that transformers would not load.

    Raises:
        BundleError: If there is no such folder, and it is no name of a repository.
        OSError: If it cannot be downloaded.
    """
    if _is_folder("BASE", base, "revision", revision):
        return Path(base)
    folder = _download(base, revision, ignore_patterns=[f"*{suffix}" for suffix in WEIGHTS])
    for file in FILES:
        index = folder / f"{file}.index.json"
        shards = read_json(index).get("weight_map", {}).values() if index.is_file() else ()
        # The name of the folder is that of the commit, which "main" may no longer be.
        _download(base, folder.name, allow_patterns=[file, *map(str, set(shards))])
        if (folder / file).is_file() or index.is_file():
            break
    return folder


def fetch_adapter(adapter: str, revision: str | None, subfolder: str | None) -> Path:
    """
    Finds an adapter, or downloads it to the cache.

    Args:
        adapter (`str`):
            A folder, or a repository of the Hub.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        subfolder (`str`, *optional*):
            Where in it the adapter is.

    Returns:
        `Path`: A folder with the adapter, and what was saved with it.

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
            raise BundleError(f"{field}={revision!r} is one of a repository of the Hub, but {source!r} is a folder.")
        return True
    if not is_repo_id(source):
        raise BundleError(f"{what} {source!r} is neither a folder nor the name of a repository of the Hub.")
    return False


def _download(repo_id: str, revision: str | None, **kwargs: Any) -> Path:
    try:
        return Path(snapshot_download(repo_id, revision=revision, **kwargs))
    except Exception as error:  # of the Hub's client and of what it is built on
        raise OSError(f"{repo_id!r} cannot be downloaded: {error}") from error


def _check_alone(folder: Path) -> None:
    """Refuses one of several adapters of different methods that PEFT has saved with one model."""
    parent = folder.absolute().parent
    # PEFT writes one card for all adapters of a model: beside that of the name "default" and the folders of others.
    root = parent if not (folder / CARD).exists() and (parent / CARD).exists() else folder
    configs = [path for path in (root / CONFIG_NAME, *root.glob(f"*/{CONFIG_NAME}")) if path.is_file()]
    methods = {str(path.parent.relative_to(root)): read_json(path).get("peft_type") for path in configs}
    others = {name: method for name, method in methods.items() if method != "M2PT"}
    if others and read_json(folder / CONFIG_NAME).get("peft_type") == "M2PT":
        raise BundleError(
            f"The adapter was saved from a model that had adapters of other methods too, by peft_type: {others}. M2PT "
            f"was tuned on what they make of the base model, and a bundle would be without them. Merge them into the "
            f"base model, save that (merge_and_unload(), save_pretrained), and bundle the adapter with it from a "
            f"folder of its own."
        )
