"""What is compared with what: declared before any test picture was looked at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contrast:
    """
    A difference between two methods, from the same seeds.

    Args:
        question (`str`):
            What it answers.
        method (`str`), reference (`str`):
            "METHOD/VARIANT"; the difference is the first less the second.
    """

    question: str
    method: str
    reference: str


# The default when the study was planned. Today's is "m2pt/low-rank-connector".
DEFAULT = "m2pt/prompts-connector"

BOTH = (
    Contrast("What do visual prompts bring?", DEFAULT, "m2pt/textual-connector"),
    Contrast("What do textual prompts bring?", "m2pt/textual-connector", "full/connector"),
    Contrast("What does the connector bring?", DEFAULT, "m2pt/prompts"),
    Contrast('What do interaction prompts in "layers" bring?', "m2pt/layers", DEFAULT),
    Contrast("Is M2PT better than the connector alone?", DEFAULT, "full/connector"),
    Contrast("Is M2PT better than LoRA of as many parameters?", DEFAULT, "lora/equal-size"),
    Contrast("Is LoRA with the connector better than M2PT?", "lora/connector", DEFAULT),
    Contrast("Does a connector of rank 8 cost anything?", "m2pt/low-rank-connector", DEFAULT),
)
CONTRASTS = {
    "a": (
        *BOTH,
        Contrast('What do interaction prompts in "image" bring?', "m2pt/image", DEFAULT),
        Contrast(
            "Is tuning the gate and up projections better than tuning attention?", "full/gate-up", "full/attention"
        ),
    ),
    "b": (*BOTH, Contrast("Does a connector of rank 64 cost anything?", "m2pt/connector-rank-64", DEFAULT)),
}

# Of the controls, with answers to shuffled pictures and without a picture.
CONTROLLED = ("base/untuned", DEFAULT, "full/connector", "lora/equal-size")
