"""The pages of the documentation: what they link to and what they name exists."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from benchmarks.models import DIMS, make_model
from peft_m2pt import M2PTConfig
from peft_m2pt.plan import make_plan


ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
# What `make` creates.
MADE = re.compile(r"\.venv")


def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def make_smolvlm():
    text = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "intermediate_size": 8192}
    vision = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
    config = SmolVLMConfig(
        text_config={**text, "model_type": "llama", "num_key_value_heads": 32, "vocab_size": 49280},
        vision_config={**vision, "patch_size": 14, "image_size": 384},
        scale_factor=3,
        image_token_id=49190,
    )
    with torch.device("meta"):
        return SmolVLMForConditionalGeneration(config)


@pytest.mark.parametrize(
    "name, make, targets",
    [
        ("LLaVA-1.5-7B", lambda: make_model(DIMS["llava-1.5-7b"], "meta"), DIMS["llava-1.5-7b"].lora_targets),
        ("Qwen2.5-VL-7B", lambda: make_model(DIMS["qwen2.5-vl-7b"], "meta"), DIMS["qwen2.5-vl-7b"].lora_targets),
        ("SmolVLM-2.2B", make_smolvlm, DIMS["llava-1.5-7b"].lora_targets),
    ],
)
def test_sizes_in_the_readme(name, make, targets):
    """As `peft-m2pt inspect` prints them. Adapters are saved in float32."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [row] = re.findall(rf"^\| {name} \| (.*) \|$", text, re.MULTILINE)
    model = make()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    default, full = (
        make_plan(model, config).describe(num_parameters).splitlines()[-1].split()
        for config in (M2PTConfig(), M2PTConfig(connector_rank=None))
    )
    with torch.device("meta"):
        lora = get_peft_model(model, LoraConfig(r=8, target_modules=targets), low_cpu_mem_usage=True)
    sizes = [int(number.replace(",", "")) for number in (default[1], full[1])]
    sizes.insert(1, sum(weight.numel() for key, weight in lora.named_parameters() if "lora_" in key))
    assert row.split(" | ") == [*default[1:], *(f"{4 * size / 1e6:.1f} MB" for size in sizes)]
    assert float(default[2].rstrip("%")) < 0.1 and sizes[0] < sizes[1]


def test_paths_in_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = {word for code in re.findall(r"`([^`]+)`", text) for word in re.split(r"[\s\"=]+", code)}
    paths = {name for name in names if re.search(r"/|\.(py|txt|md|cff)$", name) and not MADE.match(name)}
    assert {"anatomy/", "peft_m2pt/plan.py", "plan.py", ".ci/run", "constraints-*.txt"} <= paths
    for path in paths:
        assert any(found for folder in (ROOT, ROOT / "peft_m2pt") for found in folder.glob(path.rstrip("/"))), path


# One is of transformers, the other put together of several strings and tested with them.
NOT_LOOKED_FOR = ("model type `peft_m2pt` but Transformers", "is newer than the newest version")


def test_messages_that_the_faq_quotes_are_those_of_the_package():
    """Numbers in them, and the sample `i`, stand for what the code puts in."""
    faq = " ".join((ROOT / "docs" / "faq.md").read_text(encoding="utf-8").split())
    quoted = [message for message in re.findall(r'\*"([^"]+)"', faq) if not message.startswith(NOT_LOOKED_FOR)]
    assert len(quoted) > 10
    source = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("peft_m2pt/**/*.py"))
    source = re.sub(r'"\s+f?"', "", source)
    for message in quoted:
        pattern = re.sub(r"\b(\d+|i)\b", r"\\{.+?\\}", re.escape(message))
        assert re.search(pattern, source), f"No error says {message!r}."
