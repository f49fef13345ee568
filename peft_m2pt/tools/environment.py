"""Versions and platform, for bug reports: the command `peft-m2pt env`."""

from __future__ import annotations

import platform

import torch
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

from .. import tested
from ..upstream import attention_implementation, min_peft_version
from ..version import __version__
from .inspection import make_model


REQUIRED = (*tested.TESTED, "datasets", "huggingface-hub", "tokenizers", "safetensors")


OPTIONAL = ("trl", "bitsandbytes", "torchao", "deepspeed", "flash-attn", "kernels")


def describe_environment(source: str | nn.Module | None = None) -> str:
    """
    Describes versions and platform, for a bug report.

    Args:
        source (`str` or `nn.Module`, *optional*):
            A folder with a `config.json`, such a file, a model id on the Hub, or a model, whose attention
            implementations are described too.

    Returns:
        `str`: A text of several lines.

    Raises:
        ValueError: If the installed transformers has no model for the config.
        OSError: If there is no config.
    """
    rows = [
        ("peft-m2pt", __version__, ""),
        ("Python", platform.python_version(), ""),
        ("platform", platform.platform(), ""),
        ("accelerator", _describe_accelerator(), ""),
    ]
    rows += [(name, tested.find_version(name) or "not installed", _describe_place(name)) for name in REQUIRED]
    rows += [(name, version, "") for name in OPTIONAL if (version := tested.find_version(name))]
    versions = [version for _, version, place in rows if place]
    lines = _align([(name, version.ljust(max(map(len, versions))), place) for name, version, place in rows])
    if note := asks_for_newer_peft():
        lines += ["", note]
    if source is not None:
        model = make_model(source) if isinstance(source, str) else source
        lines += ["", f"attention of {type(model).__name__}", *_align(_find_implementations(model))]
    return "\n".join(lines)


def asks_for_newer_peft() -> str | None:
    """
    Checks whether PEFT is too old for the adapter methods of the installed transformers.

    Returns:
        `str | None`: A line that names both versions and what is affected. `None` if PEFT is new enough.
    """
    needed, installed = min_peft_version(), tested.find_release("peft")
    if needed is None or installed is None or installed >= Version(needed):
        return None
    return (
        f"transformers {tested.find_version('transformers')} requires PEFT {needed} or later in `add_adapter` and "
        f"`load_adapter` of its models, for all methods, but PEFT {installed} is installed; `get_peft_model` and "
        f"`PeftModel.from_pretrained` are unaffected."
    )


def _describe_accelerator() -> str:
    versions = {name: getattr(torch.version, name, None) for name in ("cuda", "hip", "xpu")}
    built_for = ", ".join(f"{name} {version}" for name, version in versions.items() if version) or "CPU only"
    # None of these calls creates a context on a device.
    if torch.accelerator.is_available():
        found = f"{torch.accelerator.device_count()} x {torch.accelerator.current_accelerator()}"
    else:
        found = "none"
    return f"{found} (torch is built for {built_for})"


def _describe_place(package: str) -> str:
    if package not in tested.TESTED:
        return ""
    place = tested.place(package)
    known = {"within": "tested", "older": "older than tested", "newer": "newer than tested"}
    return f"{known.get(place, 'not comparable with tested versions')} ({tested.TESTED[package]})"


def _find_implementations(model: nn.Module) -> list[tuple[str, str]]:
    """The attention implementation of each submodel with its own config."""
    seen, rows = set(), []
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and id(module.config) not in seen:
            seen.add(id(module.config))
            rows.append((f"  {path or 'the model itself'}", str(attention_implementation(module))))
    return rows


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    width = max((len(first) for first, *_ in rows), default=0)
    return ["  ".join((first.ljust(width), *others)).rstrip() for first, *others in rows]
