"""How the connector of base B is aligned: on the names of emoji and drawings, with both towers frozen."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from .learner import Learner
from .tasks import Pictures
from .towers import SIZE, TEMPLATE, normalize, pretrained
from .training import one_cycle


QUESTIONS = ("Name this picture.", "What do you see?", "Describe the picture in a few words.")
NUM_STEPS, BATCH_SIZE = 160, 24

# Pictures of clothing take no part: a model that is tuned on photographs of clothing is asked about them (level L4).
# These are the ones that surely belong to one of `clothing.CLASSES`; of emoji the name, of drawings the file.
CLOTHING = {
    "t-shirt": 0,
    "t_tshirt": 0,
    "t_poloshirt": 0,
    "jeans": 1,
    "t_pants": 1,
    "dress": 3,
    "coat": 4,
    "lab coat": 4,
    "t_jacket": 4,
    "womans sandal": 5,
    "thong sandal": 5,
    "t_shirt": 6,
    "athletic shoe": 7,
    "purse": 8,
    "handbag": 8,
    "pouch": 8,
    "shopping bags": 8,
    "school satchel": 8,
    "womans boots": 9,
    "hiking boot": 9,
}


def build(packages: Path, seed: int) -> Learner:
    """
    Aligns a model.

    Args:
        packages (`Path`):
            Where the unpacked packages are.
        seed (`int`):
            Of the connector, and of the order of pictures.
    """
    torch.manual_seed(seed)
    model, tokenizer = pretrained(packages)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    learner = Learner(model, tokenizer, TEMPLATE)
    pictures = named(packages)
    with torch.no_grad():
        # Image tokens start as large as the embeddings of words.
        sample = projector(learner.features(pictures.images[:64]))
        projector.linear_2.weight.mul_(model.get_input_embeddings().weight.std() / sample.std())
    pictures = learner.prepare(pictures)
    _point_at_words(learner, pictures)
    model.model.language_model.to(torch.bfloat16)
    _name(learner, pictures, seed)
    projector.requires_grad_(False)
    model.float()
    return learner


def known(packages: Path, number: int) -> Pictures:
    """Some of what the connector was aligned on."""
    pictures = named(packages)
    return pictures.take(random.Random(0).sample(range(len(pictures)), number))


def named(packages: Path) -> Pictures:
    """Emoji and drawings with their names, which have at most four words."""
    pictures = [
        (file, name)
        for file, name, _, is_clothing in _listed(packages)
        if not is_clothing and 0 < len(name.split()) <= 4
    ]
    return Pictures(normalize(torch.stack([read(file) for file, _ in pictures])), [name for _, name in pictures])


def clothing(packages: Path) -> Pictures:
    """Emoji and drawings of clothing, mirrored and not, in three sizes: six views of each."""
    pictures = [(file, CLOTHING[key]) for file, _, key, is_clothing in _listed(packages) if is_clothing]
    views = [
        view
        for file, _ in pictures
        for share in (1.0, 0.85, 0.7)
        for view in (read(file, share), read(file, share).flip(-1))
    ]
    return Pictures(normalize(torch.stack(views)), [label for _, label in pictures for _ in range(6)], num_views=6)


def _listed(packages: Path) -> list[tuple[Path, str, str, bool]]:
    """Pictures: the file, the name in lower case, the key of `CLOTHING`, and whether it is one of those."""
    pictures = []
    listing = next(packages.rglob("emoji.json"))
    for entry in json.loads(listing.read_text()):
        file = listing.parent / "img/google/64" / entry["image"]
        if entry["category"] not in ("Flags", "Symbols") and entry.get("has_img_google") and file.exists():
            name = (entry["name"] or entry["short_name"]).lower()
            pictures.append((file, name, name, entry["subcategory"] == "clothing"))
    for text in sorted(packages.rglob("tuxpaint/stamps/**/*.txt")):
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        if text.with_suffix(".png").exists() and lines:
            caption = lines[0].strip().rstrip(".!").split(",")[0].split("(")[0].strip()
            for article in ("A ", "An ", "The "):
                caption = caption.removeprefix(article)
            pictures.append((text.with_suffix(".png"), caption.lower(), text.stem, "clothes" in text.parts))
    return [
        (file, name, key, key in CLOTHING)
        for file, name, key, is_clothing in pictures
        # Other clothing is neither aligned on nor asked about.
        if not is_clothing or key in CLOTHING
    ]


def read(file: Path, share: float = 1.0) -> torch.Tensor:
    """A picture on a white square, of which it takes a share of each side: `(3, SIZE, SIZE)`, values of 0 to 1."""
    image = Image.open(file).convert("RGBA")
    side = round(max(image.size) / share)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    array = np.array(square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def _point_at_words(learner: Learner, pictures: Pictures, num_steps: int = 300) -> None:
    """First, image tokens are to point at the words of their name."""
    projector = learner.model.model.multi_modal_projector
    embeddings = learner.model.get_input_embeddings().weight
    words = torch.stack([embeddings[learner.ids(name)].mean(0) for name in pictures.labels])
    center = words.mean(0)
    directions = nn.functional.normalize(words - center, dim=-1)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(num_steps):
        chosen = torch.randint(len(pictures), (128,))
        tokens = projector(pictures.images[chosen])
        pooled = nn.functional.normalize(tokens.mean(1) - center, dim=-1)
        loss = nn.functional.cross_entropy(pooled @ directions[chosen].T / 0.1, torch.arange(len(chosen)))
        loss = loss + (tokens.pow(2).mean(-1).sqrt() / embeddings.std() - 1).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _name(learner: Learner, pictures: Pictures, seed: int) -> None:
    """Then, answers count."""
    optimizer = torch.optim.AdamW(learner.trained.values(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, NUM_STEPS, 12, 0.02))
    generator, order = random.Random(seed), []
    for _ in range(NUM_STEPS):
        if len(order) < BATCH_SIZE:
            order = generator.sample(range(len(pictures)), len(pictures))
        part, order = pictures.take(order[:BATCH_SIZE]), order[BATCH_SIZE:]
        items = [(generator.choice(QUESTIONS), name) for name in part.labels]
        logits, tokens, _ = learner.answer_logits(part.images, items)
        nn.functional.cross_entropy(logits, tokens).backward()
        nn.utils.clip_grad_norm_(learner.trained.values(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
