"""
A LLaVA of pretrained towers that is small enough to train on a CPU.

The towers are SmolLM2-135M-Instruct and a DINOv2-derived encoder; the connector between them is aligned on the names
of emoji and drawings, with both towers frozen.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)


SIZE, PATCH = 56, 14
NUM_IMAGE_TOKENS = (SIZE // PATCH) ** 2
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
QUESTIONS = ("Name this picture.", "What do you see?", "Describe the picture in a few words.")


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Images `(number, 3, SIZE, SIZE)` with values of 0 to 1, as the encoder takes them."""
    return (images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)


def build(packages: Path, folder: Path, num_steps: int = 240, batch_size: int = 24) -> None:
    """
    Makes the base model and saves it with its tokenizer.

    Args:
        packages (`Path`):
            Where the packages are, unpacked (see `benchmarks/README.md`).
        folder (`Path`):
            Where the model goes.
        num_steps (`int`, defaults to 240):
            Steps in which the connector is aligned.
        batch_size (`int`, defaults to 24):
            Pictures in a step.
    """
    torch.manual_seed(0)
    language, tokenizer = _language_model(packages)
    model = _put_together(language, _vision_encoder(packages), tokenizer)
    pictures = _named_pictures(packages)
    random.Random(0).shuffle(pictures)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    _align(model, tokenizer, pictures, num_steps, batch_size)
    projector.requires_grad_(False)
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _language_model(packages: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    file = next(packages.rglob("*.gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    loaded.config.tie_word_embeddings = True
    # What was read from GGUF cannot be saved again.
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model, tokenizer


def _vision_encoder(packages: Path) -> Dinov2Model:
    """Reads the weights of the encoder out of an ONNX file, in which some of them are constants without a name."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(next(packages.rglob("vit_s_focus.onnx"))).graph
    constants = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    prefix = "backbone."
    weights = {name.removeprefix(prefix): value for name, value in constants.items() if name.startswith(prefix)}
    # Matrices of linear layers are transposed, and named by the bias that is added next.
    factors = {n.output[0]: next((i for i in n.input if i.startswith("onnx::MatMul")), None) for n in graph.node}
    for node in graph.node:
        bias = next((i for i in node.input if i.startswith(prefix) and i.endswith(".bias")), None)
        factor = next((factors[i] for i in node.input if factors.get(i)), None)
        if node.op_type == "Add" and bias and factor:
            weights[bias.removeprefix(prefix).removesuffix("bias") + "weight"] = constants[factor].T.contiguous()
    for_class, for_grid = (
        next(value for name, value in constants.items() if name.startswith(start) and value.shape == (1, length, 384))
        for start, length in (("onnx::Concat", 1), ("onnx::Reshape", 37**2))
    )
    weights["embeddings.position_embeddings"] = torch.cat([for_class, for_grid], dim=1)
    model = Dinov2Model(
        Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=PATCH)
    )
    weights["embeddings.mask_token"] = model.embeddings.mask_token.detach()
    wanted = model.state_dict()
    model.load_state_dict({_name_in_transformers(name, wanted): value for name, value in weights.items()})
    return model


def _name_in_transformers(name: str, wanted: dict[str, torch.Tensor]) -> str:
    renames = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "encoder.layer.": "layers.",
    }
    for old, new in renames.items():
        if name not in wanted:
            name = name.replace(old, new)
    return name


def _put_together(
    language: LlamaForCausalLM, vision: Dinov2Model, tokenizer: PreTrainedTokenizerBase
) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=NUM_IMAGE_TOKENS,
        # Training for saliency has altered the last layers: what is in an image is best read off before them.
        vision_feature_layer=-3,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    return model.requires_grad_(False).eval()


def _named_pictures(packages: Path) -> list[tuple[Path, str]]:
    """Emoji and drawings with names of at most four words."""
    pictures = []
    listing = next(packages.rglob("emoji.json"))
    for entry in json.loads(listing.read_text()):
        file = listing.parent / "img/google/64" / entry["image"]
        if entry["category"] not in ("Flags", "Symbols") and entry.get("has_img_google") and file.exists():
            pictures.append((file, entry["name"] or entry["short_name"]))
    for text in sorted(packages.rglob("tuxpaint/stamps/**/*.txt")):
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        if text.with_suffix(".png").exists() and lines:
            caption = lines[0].strip().rstrip(".!").split(",")[0].split("(")[0].strip()
            for article in ("A ", "An ", "The "):
                caption = caption.removeprefix(article)
            pictures.append((text.with_suffix(".png"), caption))
    return [(file, name.lower()) for file, name in pictures if 0 < len(name.split()) <= 4]


def _read(file: Path) -> torch.Tensor:
    """A picture on a white square."""
    image = Image.open(file).convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    array = np.array(square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def _align(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    pictures: list[tuple[Path, str]],
    num_steps: int,
    batch_size: int,
) -> None:
    """Trains the connector: first image tokens are to point at the words of their name, then answers count."""
    projector = model.model.multi_modal_projector
    embeddings = model.model.language_model.embed_tokens.weight
    with torch.no_grad():
        images = normalize(torch.stack([_read(file) for file, _ in pictures]))
        features = torch.cat([image_features(model, part) for part in images.split(64)])
        # Image tokens start as large as the embeddings of words.
        projector.linear_2.weight.mul_(embeddings.std() / projector(features[:64]).std())
    names = [tokenizer(name, add_special_tokens=False).input_ids for _, name in pictures]
    _point_at_words(projector, features, torch.stack([embeddings[ids].mean(0) for ids in names]), embeddings.std())

    model.model.language_model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, num_steps, 12, 0.02))
    generator, order = random.Random(0), []
    for _ in range(num_steps):
        if len(order) < batch_size:
            order = generator.sample(range(len(pictures)), len(pictures))
        chosen, order = order[:batch_size], order[batch_size:]
        items = [(generator.choice(QUESTIONS), pictures[index][1]) for index in chosen]
        logits, labels = answer_logits(model, features[chosen], *rows(tokenizer, items))[:2]
        nn.functional.cross_entropy(logits, labels).backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _point_at_words(
    projector: nn.Module, features: torch.Tensor, words: torch.Tensor, size: torch.Tensor, num_steps: int = 300
) -> None:
    center = words.mean(0)
    directions = nn.functional.normalize(words - center, dim=-1)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(num_steps):
        chosen = torch.randint(len(features), (128,))
        tokens = projector(features[chosen])
        pooled = nn.functional.normalize(tokens.mean(1) - center, dim=-1)
        loss = nn.functional.cross_entropy(pooled @ directions[chosen].T / 0.1, torch.arange(len(chosen)))
        loss = loss + (tokens.pow(2).mean(-1).sqrt() / size - 1).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def one_cycle(step: int, num_steps: int, num_warmup_steps: int, lowest: float = 0.0) -> float:
    """A linear warm-up, and a cosine after it."""
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    done = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * done))


def rows(tokenizer: PreTrainedTokenizerBase, items: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, padded on the right, and labels of answers, for pairs of an instruction and its answer."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    image, padding = (tokenizer.convert_tokens_to_ids(token) for token in ("<image>", END))
    before = [*ids(USER), *[image] * NUM_IMAGE_TOKENS]
    questions = [[*before, *ids(f"\n{instruction}{ASSISTANT}")] for instruction, _ in items]
    answers = [ids(answer + END) for _, answer in items]
    length = max(len(question) + len(answer) for question, answer in zip(questions, answers))
    input_ids = torch.full((len(items), length), padding)
    labels = torch.full((len(items), length), -100)
    for row, (question, answer) in enumerate(zip(questions, answers)):
        end = len(question) + len(answer)
        input_ids[row, :end] = torch.tensor(question + answer)
        labels[row, len(question) : end] = torch.tensor(answer)
    return input_ids, labels


def image_features(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the connector reads of images. Where nothing of the encoder is trained, once is enough."""
    tower = model.model.vision_tower
    states = tower(pixel_values.to(tower.dtype), output_hidden_states=True).hidden_states
    return states[model.config.vision_feature_layer][:, 1:].float()


def answer_logits(
    model: LlavaForConditionalGeneration, features: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of answers alone, which saves a fifth of the work, their labels, and the sample of each."""
    embeddings = model.get_input_embeddings()(input_ids)
    tokens = model.model.multi_modal_projector(features).to(embeddings.dtype)
    is_image = (input_ids == model.config.image_token_index)[..., None]
    states = model.model.language_model(
        inputs_embeds=embeddings.masked_scatter(is_image, tokens), use_cache=False
    ).last_hidden_state
    answered = labels[:, 1:] != -100
    return model.lm_head(states[:, :-1][answered]).float(), labels[:, 1:][answered], answered.nonzero()[:, 0]
