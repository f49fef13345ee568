"""The model card of an adapter: what PEFT does not say in it, and what a push to the Hub would replace."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
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

from .config import M2PTConfig
from .report import Part, count, measure


FILE = "README.md"
TAGS = ("m2pt", "multimodal-prompt-tuning", "arxiv:2409.15657")
PIPELINE = "image-text-to-text"
START = "<!-- peft-m2pt: from here to the end mark, every save writes anew. All other text stays. -->"
END = "<!-- peft-m2pt: end -->"
# What stands in cards that nobody has written in, besides the lines of the template.
GENERATED = re.compile(
    r"### Framework versions|- PEFT \S+|This is the model card of a .* model that has been pushed on the Hub\."
    r" This model card has been automatically generated\."
)


def own_card(model: PeftModel, config: M2PTConfig) -> None:
    """
    Lets a model write cards for M2PT.

    PEFT asks a method for nothing when it writes a card, and transformers replaces that card in a push to the Hub, by
    a general one or by that of the repository. So the methods that write and upload cards are replaced, of this one
    model. In the first save of a model, PEFT has written the card already; there, the config completes it.

    Args:
        model (`PeftModel`):
            The model that is being saved.
        config ([`M2PTConfig`]):
            The config of one of its adapters, which is saved next.
    """
    if "create_or_update_model_card" not in vars(model):
        model.create_or_update_model_card = functools.partial(_create_or_update_model_card, model)
        model._upload_modified_files = functools.partial(_upload_modified_files, model)
    config.card = Card.of(model)


def _create_or_update_model_card(model: PeftModel, output_dir: str, repo_id: str | None = None) -> None:
    path = Path(output_dir, FILE)
    # PEFT replaces them by its own.
    tags = (ModelCard.load(path).data.tags or []) if path.exists() else []
    type(model).create_or_update_model_card(model, output_dir)
    if model.base_model.own_configs:  # all may be deleted by now
        Card.of(model).write(output_dir, tags, repo_id)


def _upload_modified_files(model: PeftModel, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    _create_or_update_model_card(model, working_dir, repo_id)
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)


@dataclass(frozen=True)
class Card:
    """
    What a model card says about the adapters of a model.

    Args:
        base_model (`str`, *optional*):
            Repository id or path of the base model, if known.
        revision (`str`, *optional*):
            Its revision.
        loader (`str`):
            The class of transformers that loads it.
        tags (`tuple[str, ...]`):
            Tags of PEFT and M2PT.
        tables (`dict[str, str]`):
            For each adapter a table of what it trains.
        in_image (`frozenset[str]`):
            Adapters with which images have more tokens, so that the processor must be adapted.
    """

    base_model: str | None
    revision: str | None
    loader: str
    tags: tuple[str, ...]
    tables: dict[str, str]
    in_image: frozenset[str]

    @classmethod
    def of(cls, model: PeftModel) -> Card:
        """
        Collects what there is to say about a model.

        Args:
            model (`PeftModel`):
                A model with M2PT adapters.

        Returns:
            [`Card`]
        """
        base_model = model.get_base_model()
        configs = model.base_model.own_configs
        config = next(
            (configs[name] for name in model.active_adapters if name in configs), next(iter(configs.values()))
        )
        parts = measure(base_model)
        total = count(base_model.parameters())
        return cls(
            base_model=config.base_model_name_or_path or base_model.__dict__.get("name_or_path") or None,
            revision=config.revision,
            loader=find_loader(type(base_model).__name__),
            tags=(*(getattr(base_model, "model_tags", None) or []), *model._get_peft_specific_model_tags(), *TAGS),
            tables={name: _table([part for part in parts if part.adapter == name], total) for name in configs},
            in_image=frozenset(
                name
                for name, config in configs.items()
                if config.wanted_interaction_tokens and config.interaction_placement == "image"
            ),
        )

    def write(self, folder: str | Path, tags: Iterable[str] = (), repo_id: str | None = None) -> None:
        """
        Completes the card in a folder with saved adapters. Text that is not ours stays.

        Args:
            folder (`str` or `Path`):
                The folder. If there is no adapter in it yet, nothing is done.
            tags (`Iterable[str]`, *optional*):
                More tags.
            repo_id (`str`, *optional*):
                The repository that the folder goes to, if known.
        """
        adapters = [name for name in self.tables if Path(folder, _subfolder(name), CONFIG_NAME).is_file()]
        if not adapters:
            return
        path = Path(folder, FILE)
        card = ModelCard.load(path) if path.exists() else ModelCard("")
        self._fill_in(card.data, tags)
        card.text = self._merged(card.text, self._section(adapters, repo_id))
        card.save(path)

    def complete(self, adapter_folder: str | Path) -> None:
        """
        Completes the card that PEFT has written, once an adapter is saved.

        Args:
            adapter_folder (`str` or `Path`):
                The folder with the adapter. The card is there, or one level up for adapters with a name.
        """
        for folder in (Path(adapter_folder), Path(adapter_folder).absolute().parent):
            if (folder / FILE).is_file():
                self.write(folder)
                return

    def _fill_in(self, data: ModelCardData, tags: Iterable[str]) -> None:
        data.library_name = "peft"
        if self.loader == "AutoModelForImageTextToText" and data.pipeline_tag in (None, "text-generation"):
            # The other one is what PEFT writes for task type "CAUSAL_LM".
            data.pipeline_tag = PIPELINE
        tags = {*(data.tags or []), *tags, *self.tags}
        if is_repo_id(self.base_model):
            data.base_model = self.base_model
        else:
            # The Hub refuses cards that name a folder.
            data.base_model = None if data.base_model in (self.base_model, "") else data.base_model
            tags = {tag for tag in tags if tag != f"base_model:adapter:{self.base_model or ''}"}
        data.tags = sorted(tags)

    def _merged(self, text: str, section: str) -> str:
        """Puts the section into a text: in the place of the one before, behind what somebody wrote, or alone."""
        before, start, rest = text.partition(START)
        _, end, after = rest.partition(END)
        if start and end:
            return f"{before}{section}{after}".rstrip() + "\n"
        template = ModelCard.from_template(ModelCardData()).text.splitlines()
        if all(line in template or GENERATED.fullmatch(line) for line in text.splitlines()):
            text = f"# M2PT adapter of {self.base_model}" if self.base_model else "# M2PT adapter"
        return f"{text.strip()}\n\n{section}\n"

    def _section(self, adapters: list[str], repo_id: str | None) -> str:
        tables = []
        for name in adapters:
            title = f"Adapter `{name}`:\n\n" if len(adapters) > 1 else ""
            tables.append(title + self.tables[name])
        return "\n\n".join(
            [
                START,
                "## Multimodal prompt tuning",
                "Tuned with [M2PT](https://arxiv.org/abs/2409.15657): prompts in vision encoder and language"
                " model, and between them. The base model itself is unchanged. Needs `pip install peft-m2pt`.",
                f"```py\n{self._code(adapters, repo_id)}\n```",
                "To serve it, `peft-m2pt bundle BASE ADAPTER --output DIR` makes one folder of the two. To score it,"
                " `lmms-eval --model m2pt --model_args model=...,pretrained=BASE,adapter=ADAPTER`.",
                *tables,
                "### Framework versions",
                _versions(),
                END,
            ]
        )

    def _code(self, adapters: list[str], repo_id: str | None) -> str:
        classes = ["AutoProcessor"] * bool(self.in_image.intersection(adapters)) + [self.loader]
        base_model = f'"{self.base_model}"' if self.base_model else "..."
        revision = f', revision="{self.revision}"' if self.revision else ""
        adapter = f'"{repo_id}"' if repo_id else '"."'
        note = "" if repo_id else "  # the folder of this card; or the id of its repository"
        lines = [
            "import peft_m2pt  # registers the method with PEFT",
            "from peft import PeftModel",
            f"from transformers import {', '.join(sorted(classes))}",
            "",
            f"model = {self.loader}.from_pretrained({base_model}{revision})",
            f"adapter = {adapter}{note}",
        ]
        for i, name in enumerate(adapters):
            place = f', adapter_name="{name}"' + (f', subfolder="{name}"' if _subfolder(name) else "")
            if i > 0:
                lines.append(f"model.load_adapter(adapter{place})")
            else:
                place = "" if name == "default" else place
                lines.append(f"model = PeftModel.from_pretrained(model, adapter{place})")
        for name in adapters:
            if name in self.in_image:
                lines.append(f"processor = AutoProcessor.from_pretrained({base_model}{revision})")
                lines.append(f'processor = peft_m2pt.adapt_processor(processor, model.peft_config["{name}"])')
                break
        return "\n".join(lines)


def _subfolder(adapter_name: str) -> str:
    """Where PEFT saves an adapter."""
    return "" if adapter_name == "default" else adapter_name


def find_loader(class_name: str) -> str:
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    # Some models have several classes.
    known = {name for value in names for name in ((value,) if isinstance(value, str) else value)}
    if class_name in known:
        return "AutoModelForImageTextToText"
    return class_name if hasattr(transformers, class_name) else "AutoModel"


def is_repo_id(name: str | None) -> bool:
    if not name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _table(parts: list[Part], total: int) -> str:
    rows = [(part.name, part.layers, part.tokens, part.size) for part in parts]
    rows.append(("all", "", "", sum(part.size for part in parts)))
    lines = ["| trained | layers | prompts per layer | parameters | share |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {layers} | {tokens} | {size:,} | {size / max(total, 1):.4%} |"
        for name, layers, tokens, size in rows
    ]
    return "\n".join(lines)


def _versions() -> str:
    from . import __version__

    versions = {
        "PEFT": peft.__version__,
        "peft-m2pt": __version__,
        "Transformers": transformers.__version__,
        "PyTorch": torch.__version__,
    }
    return "\n".join(f"- {name} {version}" for name, version in versions.items())
