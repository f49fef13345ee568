"""The pages of the documentation: what they link to and what they name exists."""

import re
from pathlib import Path

import pytest


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
