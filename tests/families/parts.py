"""Sizes, placeholders and inputs that the tiny models share."""

import torch

from .spec import BOS, EOS, MEDIA_TOKEN, PAD, VOCAB_SIZE, Family, seeded


SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
IDS = {"vocab_size": VOCAB_SIZE, **SPECIAL}
TEXT = dict(
    IDS,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# 2 x 2 patches of 8 pixels.
VISION = {**ENCODER, "image_size": 16, "patch_size": 8}

# Around a placeholder, and in the place of others.
START, END, VIDEO, AUDIO = 80, 81, 83, 90


def text_sizes(**kwargs):
    return {**TEXT, **kwargs}


def vision(**kwargs):
    return {**VISION, **kwargs}


def vit_sizes(**kwargs):
    """4 x 4 patches of 4 pixels."""
    return {**VISION, "patch_size": 4, **kwargs}


def mrope(*mrope_section, **kwargs):
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(mrope_section), **kwargs}


def pixels(n):
    return {"pixel_values": seeded(n, 3, 16, 16)}


def mm_token_types(inputs):
    return {"mm_token_type_ids": (inputs["input_ids"] == MEDIA_TOKEN).long()}


def patches(t, h, w, channels, name="pixel_values", seed=3):
    """Flattened patches of n images of t x h x w patches, with the grids."""

    def media(n):
        return {name: seeded(n * t * h * w, channels, seed=seed), "image_grid_thw": torch.tensor([[t, h, w]] * n)}

    return media


# Patches of 4 pixels and two frames: 4 rows and 6 columns of them, or 4 columns. The models make a token of 2 x 2.
qwen_images = patches(1, 4, 6, 3 * 2 * 4 * 4)
patch_rows = patches(1, 4, 4, 3 * 2 * 4 * 4)


SECOND_MEDIA_TOKEN = 97  # the video placeholder where MEDIA_TOKEN is the image's, and the other way round
FAKE_TOKEN = 97  # <fake_token_around_image> of the Idefics families


def qwen_special_tokens():
    return {
        "image_token_id": MEDIA_TOKEN,
        "video_token_id": 93,
        "vision_start_token_id": 95,
        "vision_end_token_id": 96,
    }


WRAPPED = {"before": (95,), "after": (96,)}
VISION_START, VISION_END = 90, 91
AROUND = {"before": (VISION_START,), "after": (VISION_END,)}
GLM_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "out_hidden_size": 48,
}
GLM_TOKENS = {
    "image_token_id": MEDIA_TOKEN,
    "video_token_id": 97,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": 82,
    "video_end_token_id": 83,
}


def flattened_patches(n):
    """Rows and columns (from 1) in front of each patch; the last patch is padding."""
    places = torch.tensor([[row, column] for row in (1, 2) for column in (1, 2, 3)] + [[0, 0]]).float()
    pixels = seeded(n, 7, 48)
    pixels[:, -1] = 0
    return torch.cat([places.expand(n, -1, -1), pixels], -1)


def positions(inputs):
    return {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


# Placeholder where the untuned tiny model would generate MEDIA_TOKEN. A generated placeholder makes generation fail
# without a cache (placeholders and features no longer match): the ids here only keep the untuned models from it.
OTHER_TOKEN = 97


def one_image(size=16):
    return lambda n: {"pixel_values": seeded(n, 3, size, size)}


def other_token_types(inputs):
    return {"mm_token_type_ids": (inputs["input_ids"] == OTHER_TOKEN).long()}


def qwen_vision(**kwargs):
    sizes = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 48,
        "num_position_embeddings": 16,
    }
    return {**sizes, **kwargs}


QWEN_TOKENS = {
    "image_token_id": OTHER_TOKEN,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def interleaved_mrope(*sections, theta=10000.0, **kwargs):
    return {
        "rope_type": "default",
        "rope_theta": theta,
        "mrope_section": list(sections),
        "mrope_interleaved": True,
        **kwargs,
    }


def qwen_family(
    name,
    model_class,
    config,
    media=patch_rows,
    before=(START,),
    after=(END,),
    extra=other_token_types,
    connector=4,
    **kwargs,
):
    return Family(
        name,
        model_class,
        config,
        media=media,
        num_media_tokens=4,
        media_token=OTHER_TOKEN,
        before=before,
        after=after,
        extra=extra,
        connector=connector,
        **kwargs,
    )


def without_padding(inputs):
    """Fills the padding with words, for models in which padding cannot stand on the left."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    words = 3 + torch.arange(ids.shape[1]) * 5 % 77
    ids = torch.where(mask == 1, ids, words)
    ids[:, 0] = BOS
    return {"input_ids": ids, "attention_mask": torch.ones_like(mask)}
