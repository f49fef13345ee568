"""The model card of an adapter: adds what PEFT does not know to it, on every save and push."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel
from peft.utils import CONFIG_NAME
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ..config import M2PTConfig
from ..layers.summary import count_parameters, list_trained
from ..version import __version__


FILE = "README.md"


TAGS = {"m2pt", "multimodal-prompt-tuning", "arxiv:2409.15657"}


VERSIONS = {
    "PEFT": peft.__version__,
    "peft-m2pt": __version__,
    "Transformers": transformers.__version__,
    "PyTorch": torch.__version__,
}


START = "<!-- peft-m2pt: from here to the end mark, every save writes anew. All other text stays. -->"


END = "<!-- peft-m2pt: end -->"


SECTION = f"""\
{START}

## Multimodal prompt tuning

Tuned with [M2PT](https://arxiv.org/abs/2409.15657): prompts in vision encoder and language model, and between them. \
The base model itself is unchanged. Needs `pip install peft-m2pt`.

```py
{{code}}
```

To serve it, `peft-m2pt bundle BASE ADAPTER --output DIR` makes one folder of the two. To score it,
`lmms-eval --model m2pt --model_args model=...,pretrained=BASE,adapter=ADAPTER`.

{{tables}}

### Framework versions

{{versions}}

{END}
"""


# Generated lines of cards, besides those of the template.
GENERATED = re.compile(
    r"### Framework versions|- PEFT \S+|This is the model card of a .* model that has been pushed on the Hub\."
    r" This model card has been automatically generated\."
)


def complete_model_cards(model: PeftModel, config: M2PTConfig) -> None:
    """
    Makes a model complete its cards from now on.

    PEFT has no hook for model cards, and `push_to_hub` of transformers replaces the card. So the methods of this model
    that write and upload cards are replaced. PEFT has already written the card of the current save, so the config
    completes it.

    Args:
        model (`PeftModel`):
            The model that is being saved.
        config ([`M2PTConfig`]):
            The config of one of its adapters, which is saved next.
    """
    model.create_or_update_model_card = partial(_create_or_update_model_card, model)
    model._upload_modified_files = partial(_upload_modified_files, model)
    # A weak reference, since a config can outlive its model.
    config.after_save = partial(_after_save, weakref.ref(model))


def _create_or_update_model_card(model: PeftModel, output_dir: str, repo_id: str | None = None) -> None:
    path = Path(output_dir, FILE)
    # PEFT overwrites them.
    tags = (ModelCard.load(path).data.tags or []) if path.exists() else []
    type(model).create_or_update_model_card(model, output_dir)
    _complete(model, Path(output_dir), tags, repo_id)


def _upload_modified_files(model: PeftModel, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    _create_or_update_model_card(model, working_dir, repo_id)
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)


def _after_save(model_ref: weakref.ref[PeftModel], adapter_folder: str) -> None:
    model, folder = model_ref(), Path(adapter_folder).absolute()
    # Adapters not named "default" are in a subfolder, below the card.
    root = next((root for root in (folder, folder.parent) if (root / FILE).is_file()), None)
    if model is not None and root is not None:
        _complete(model, root)


def _complete(model: PeftModel, folder: Path, tags: Iterable[str] = (), repo_id: str | None = None) -> None:
    """Completes the card of the M2PT adapters of a model that are saved in a folder, if there are any."""
    configs = {
        name: config
        for name, config in model.base_model.own_configs.items()
        if (folder / _subfolder(name) / CONFIG_NAME).is_file()
    }
    if not configs:
        return
    base_model = model.get_base_model()
    config = next((configs[name] for name in model.active_adapters if name in configs), next(iter(configs.values())))
    base_name = config.base_model_name_or_path or base_model.__dict__.get("name_or_path") or None
    loader = find_loader(type(base_model).__name__)
    path = folder / FILE
    card = ModelCard.load(path) if path.exists() else ModelCard("")
    tags = {*tags, *(getattr(base_model, "model_tags", None) or []), *model._get_peft_specific_model_tags(), *TAGS}
    _fill_in(card.data, base_name, loader, tags)
    section = SECTION.format(
        code=_code(configs, base_name, config.revision, loader, repo_id),
        tables="\n\n".join(_tables(base_model, configs)),
        versions="\n".join(f"- {name} {version}" for name, version in VERSIONS.items()),
    )
    card.text = _merge(card.text, section.rstrip(), base_name)
    card.save(path)


def _fill_in(data: ModelCardData, base_name: str | None, loader: str, tags: set[str]) -> None:
    data.library_name = "peft"
    # PEFT writes "text-generation" for `task_type="CAUSAL_LM"`.
    if loader == "AutoModelForImageTextToText" and data.pipeline_tag in (None, "text-generation"):
        data.pipeline_tag = "image-text-to-text"
    tags |= set(data.tags or [])
    if is_repo_id(base_name):
        data.base_model = base_name
    else:
        # The Hub refuses cards whose base model is a local folder.
        data.base_model = None if data.base_model in (base_name, "") else data.base_model
        tags.discard(f"base_model:adapter:{base_name or ''}")
    data.tags = sorted(tags)


def _merge(text: str, section: str, base_name: str | None) -> str:
    """Puts the section into a text: in place of the previous one, or else at the end of what somebody wrote."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if start and end:
        return f"{before}{section}{after}".rstrip() + "\n"
    template = ModelCard.from_template(ModelCardData()).text.splitlines()
    if all(line in template or GENERATED.fullmatch(line) for line in text.splitlines()):
        text = f"# M2PT adapter of {base_name}" if base_name else "# M2PT adapter"
    return f"{text.strip()}\n\n{section}\n"


def _code(
    configs: Mapping[str, M2PTConfig], base_name: str | None, revision: str | None, loader: str, repo_id: str | None
) -> str:
    in_image = [
        name
        for name, config in configs.items()
        if config.wanted_interaction_tokens and config.interaction_placement == "image"
    ]
    classes = sorted({loader, *(["AutoProcessor"] if in_image else [])})
    arguments = (f'"{base_name}"' if base_name else "...") + (f', revision="{revision}"' if revision else "")
    lines = [
        "import peft_m2pt  # registers the method with PEFT",
        "from peft import PeftModel",
        f"from transformers import {', '.join(classes)}",
        "",
        f"model = {loader}.from_pretrained({arguments})",
        f'adapter = "{repo_id}"'
        if repo_id
        else 'adapter = "."  # the folder of this card; or the id of its repository',
    ]
    for i, name in enumerate(configs):
        place = f', adapter_name="{name}"' + (f', subfolder="{name}"' if _subfolder(name) else "")
        if i > 0:
            lines.append(f"model.load_adapter(adapter{place})")
        else:
            lines.append(f"model = PeftModel.from_pretrained(model, adapter{'' if name == 'default' else place})")
    if in_image:
        lines.append(f"processor = AutoProcessor.from_pretrained({arguments})")
        lines.append(f'processor = peft_m2pt.adapt_processor(processor, model.peft_config["{in_image[0]}"])')
    return "\n".join(lines)


def _tables(base_model: torch.nn.Module, adapter_names: Iterable[str]) -> list[str]:
    names = list(adapter_names)
    parts, total = list_trained(base_model), count_parameters(base_model.parameters())
    tables = []
    for adapter_name in names:
        own = [part for part in parts if part.adapter == adapter_name]
        rows = [(part.name, part.layers, part.tokens, part.size) for part in own]
        rows.append(("all", "", "", sum(part.size for part in own)))
        lines = [f"Adapter `{adapter_name}`:", ""] if len(names) > 1 else []
        lines += ["| trained | layers | prompts per layer | parameters | share |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(words)} | {size:,} | {size / max(total, 1):.4%} |" for *words, size in rows]
        tables.append("\n".join(lines))
    return tables


def _subfolder(adapter_name: str) -> str:
    """The folder in which PEFT saves an adapter."""
    return "" if adapter_name == "default" else adapter_name


def find_loader(class_name: str) -> str:
    """The class of transformers with which a card or README loads a model of this class."""
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    # A value is a tuple where a model type has several classes.
    if any(class_name in ((name,) if isinstance(name, str) else name) for name in names):
        return "AutoModelForImageTextToText"
    return class_name if hasattr(transformers, class_name) else "AutoModel"


def is_repo_id(name: str | None) -> bool:
    """Whether a name can be that of a repository on the Hub, and not a local folder."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return not Path(name).exists()
