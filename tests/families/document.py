"""
Writes docs/models.md: what M2PT can do with each family of models.

`make models` runs all checks and writes the page; a test compares the page with what the families say of themselves.
"""

from __future__ import annotations

from pathlib import Path

from .spec import CHECKS, Family


PAGE = Path(__file__).parents[2] / "docs" / "models.md"

HEAD = """# Models

What M2PT can do with each family of models. `make models` writes this page from the checks below, run on a tiny model
of each family; a test fails if it is out of date.

Families that are not listed also work if their attention uses transformers' attention interface, as almost all do.
`peft-m2pt inspect MODEL` shows what is found in a model, from its config alone. What cannot be adapted is refused with
an `UnsupportedModelError` before the model is changed, which names the field of `M2PTConfig` that leaves the part out.

- **visual**, **textual**: prompts in the vision encoder (in audio models, the audio encoder) and in the language
  model.
- **interaction**: how many rows of image features the connector merges into one token. Interaction prompts go through
  it.
"""

ROADS_HEAD = """
## Roads

A sample padded on the left gives the same results as alone, however the model is called: the whole model with **text**
only; its **body**, without the head; its **decoder**; the decoder with a **4-D mask**, or with **positions** that
start at 5 and at 20. This is only checked where it holds without M2PT.
"""

# Found with the untuned model.
NO_ROAD = "no such input"
UNTUNED_DIFFERS = "differs without M2PT too"

REFUSALS = {
    "visual": "set `num_visual_tokens=0`",
    "textual": "set `num_textual_tokens=0`",
}


def documented_roads() -> dict[str, dict[str, str]]:
    """The table of roads on the page, by family."""
    lines = PAGE.read_text(encoding="utf-8").partition("## Roads")[2].partition("\n## ")[0].splitlines()
    header, _, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return {row[0].strip("`"): dict(zip(header[1:], row[1:])) for row in rows}


def has_roads(family: Family) -> bool:
    """Whether a family reads text with prompts."""
    return family.text and "textual" not in family.refused


def render(families: list[Family], roads: dict[str, dict[str, str]]) -> str:
    """
    The page.

    Args:
        families (`list[Family]`):
            The families.
        roads (`dict[str, dict[str, str]]`):
            What was measured on each road to the language model of each family.
    """
    notes: dict[str, int] = {}

    def note(reason: str) -> str:
        return f"– [{notes.setdefault(reason, len(notes) + 1)}](#notes)"

    columns = ["family", "visual", "textual", "interaction", *CHECKS]
    rows = [columns, ["---"] * len(columns)]
    for family in sorted(families, key=lambda family: family.name):
        failures = [
            note(f"does not run in transformers {version}, with M2PT or without: {reason}")
            for version, reason in family.fails_in.items()
        ]
        row = [" ".join([f"`{family.name}`", *failures])]
        for kind in ("visual", "textual"):
            reason = family.refused.get(kind)
            row.append(
                "yes" if reason is None else note(f"refused ({reason.replace('|', ', or ')}): {REFUSALS[kind]}")
            )
        row.append(f"{family.connector} : 1" if isinstance(family.connector, int) else note(family.connector))
        for check in CHECKS:
            if len(family.refused) == len(REFUSALS):
                row.append("")
            elif check in family.without:
                row.append(note(family.without[check]))
            elif check == "generation" and not family.generates:
                row.append(note("does not generate text, or not with `generate` alone"))
            else:
                row.append("yes")
        rows.append(row)
    lines = [HEAD + "".join(f"- **{name}**: {text}.\n" for name, text in CHECKS.items())]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ROADS_HEAD.splitlines()
    columns = ["family", *next(iter(roads.values()))]
    lines += ["", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| `{name}` | {' | '.join(of_family.values())} |" for name, of_family in sorted(roads.items())]
    lines += ["", "## Notes", "", *(f"{number}. {reason}." for reason, number in notes.items()), ""]
    return "\n".join(lines)
