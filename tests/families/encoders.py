"""Encoders side by side, and encoders alone: no language model that would go on from an image."""

import torch
import transformers as tr

from . import reasons
from .parts import ENCODER, one_image, pixels, text_sizes, vision, without_padding
from .spec import BOS, EOS, PAD, VOCAB_SIZE, Family, seeded


END_OF_TEXT = 95


def end_of_text(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pooled text models read the last token: CLIP searches it, SigLIP takes the last place."""
    input_ids = inputs["input_ids"].clone()
    input_ids[:, -1] = END_OF_TEXT
    return {"input_ids": input_ids}


TOWER_TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": END_OF_TEXT,
}


def clip():
    return tr.CLIPConfig(
        text_config=tr.CLIPTextConfig(**TOWER_TEXT, projection_dim=24),
        vision_config=tr.CLIPVisionConfig(**ENCODER, image_size=16, patch_size=8, projection_dim=24),
        projection_dim=24,
    )


def siglip():
    return tr.SiglipConfig(
        text_config=dict(**TOWER_TEXT, projection_size=32),
        vision_config=dict(**ENCODER, image_size=16, patch_size=8),
    )


def siglip2():
    return tr.Siglip2Config(
        text_config=dict(**TOWER_TEXT, projection_size=32),
        vision_config=dict(**ENCODER, num_patches=16, patch_size=4),
    )


def siglip2_media(n: int) -> dict[str, torch.Tensor]:
    """2 x 3 patches, padded to 8."""
    return {
        "pixel_values": seeded(n, 8, 3 * 4 * 4),
        "pixel_attention_mask": torch.tensor([[1] * 6 + [0] * 2] * n),
        "spatial_shapes": torch.tensor([[2, 3]] * n),
    }


def vit():
    return tr.ViTConfig(**ENCODER, image_size=16, patch_size=8, num_labels=5)


def dinov2():
    return tr.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )


WITHOUT_TEXT = {"text": False, "labels": None, "generates": False}
DUAL_ENCODER = {"extra": end_of_text, "labels": None, "generates": False}


def text_positions(inputs):
    return {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def altclip():
    return tr.AltCLIPConfig(text_config=clip_text(project_dim=24), vision_config=vision(), projection_dim=24)


def clip_text(**kwargs):
    """Text towers have no grouped heads."""
    shared = text_sizes(hidden_size=32, intermediate_size=48, **kwargs)
    del shared["num_key_value_heads"]
    return shared


def chinese_clip():
    return tr.ChineseCLIPConfig(text_config=clip_text(), vision_config=vision(), projection_dim=24)


def metaclip_2():
    return tr.MetaClip2Config(
        text_config=clip_text(projection_dim=24), vision_config=vision(projection_dim=24), projection_dim=24
    )


def with_end_and_positions(inputs):
    """MetaCLIP 2 reads the text at its end token."""
    ids = inputs["input_ids"].clone()
    ids[:, -1] = EOS
    return {"input_ids": ids, **text_positions(inputs)}


def blip_dual():
    return tr.BlipConfig(
        text_config=clip_text(is_decoder=False), vision_config=vision(), projection_dim=24, image_text_hidden_size=24
    )


def deit():
    return tr.DeiTConfig(**vision(), num_labels=3)


def swin():
    """Windows of 4 x 4 patches on 8 x 8 patches, every second layer with shifted ones; then 4 x 4 patches."""
    return tr.SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=4,
        mlp_ratio=2.0,
        num_labels=3,
    )


def vilt():
    return tr.ViltConfig(**vision(), vocab_size=VOCAB_SIZE, max_position_embeddings=40, num_labels=3)


def dinov3_vit():
    return tr.DINOv3ViTConfig(**vision(), num_register_tokens=2)


FAMILIES = [
    # A padded text differs in the three dual encoders: their learned positions count the padding too.
    Family(
        "clip",
        "CLIPModel",
        clip,
        pixels,
        **DUAL_ENCODER,
        connector=reasons.APART,
        has_connector=False,
        without={"padding": reasons.UNTUNED_PADDING},
    ),
    Family(
        "siglip",
        "SiglipModel",
        siglip,
        pixels,
        **DUAL_ENCODER,
        connector=reasons.APART,
        has_connector=False,
        without={"padding": reasons.UNTUNED_PADDING},
    ),
    Family(
        "siglip2",
        "Siglip2Model",
        siglip2,
        siglip2_media,
        **DUAL_ENCODER,
        connector=reasons.APART,
        has_connector=False,
        without={"padding": reasons.UNTUNED_PADDING},
    ),
    Family(
        "vit",
        "ViTForImageClassification",
        vit,
        pixels,
        **WITHOUT_TEXT,
        connector=reasons.NO_LANGUAGE_MODEL,
        has_connector=False,
        refused={"textual": reasons.NO_DECODER_FOUND},
    ),
    # No gradient in mask_token, which only masked images use.
    Family(
        "dinov2",
        "Dinov2ForImageClassification",
        dinov2,
        pixels,
        **WITHOUT_TEXT,
        connector=reasons.NO_LANGUAGE_MODEL,
        has_connector=False,
        refused={"textual": reasons.NO_DECODER_FOUND},
    ),
    # dropout 0.1 in the text towers of altclip and chinese_clip
    Family(
        "altclip",
        "AltCLIPModel",
        altclip,
        media=pixels,
        extra=without_padding,
        labels=None,
        generates=False,
        connector=reasons.APART,
        has_connector=False,
    ),
    Family(
        "chinese_clip",
        "ChineseCLIPModel",
        chinese_clip,
        media=pixels,
        extra=without_padding,
        labels=None,
        generates=False,
        connector=reasons.APART,
        has_connector=False,
    ),
    Family(
        "metaclip_2",
        "MetaClip2Model",
        metaclip_2,
        media=pixels,
        extra=with_end_and_positions,
        labels=None,
        generates=False,
        connector=reasons.APART,
        has_connector=False,
    ),
    # BlipModel has no sdpa: its attention is written out, in both towers
    Family(
        "blip (BlipModel)",
        "BlipModel",
        blip_dual,
        media=pixels,
        extra=without_padding,
        labels=None,
        generates=False,
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={"visual": reasons.BYPASSES, "textual": reasons.BYPASSES},
        without={"attention": reasons.NO_SDPA},
    ),
    Family(
        "deit",
        "DeiTForImageClassification",
        deit,
        media=pixels,
        labels=None,
        generates=False,
        text=False,
        connector=reasons.NO_LANGUAGE_MODEL,
        has_connector=False,
        refused={"textual": reasons.NO_DECODER_FOUND},
    ),
    # relative position bias and the mask of shifted windows come as one attention mask; drop path in training mode
    Family(
        "swin",
        "SwinForImageClassification",
        swin,
        media=one_image(32),
        labels=None,
        generates=False,
        text=False,
        connector=reasons.NO_LANGUAGE_MODEL,
        has_connector=False,
        refused={"visual": reasons.BYPASSES, "textual": reasons.NO_DECODER_FOUND},
        since="5.23",
    ),
    # no sdpa: the attention is written out; patches are put in a random order in every forward (a permutation only)
    Family(
        "vilt",
        "ViltForQuestionAnswering",
        vilt,
        media=pixels,
        extra=without_padding,
        labels=None,
        generates=False,
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={"visual": reasons.NO_ENCODER_FOUND, "textual": reasons.NO_SELF_ATTENTION},
        without={"attention": reasons.NO_SDPA},
    ),
    # no classification head in transformers; mask_token has no gradient; random rescaling of positions in training
    # mode
    Family(
        "dinov3_vit",
        "DINOv3ViTModel",
        dinov3_vit,
        media=pixels,
        labels=None,
        generates=False,
        text=False,
        connector=reasons.NO_LANGUAGE_MODEL,
        has_connector=False,
        refused={"textual": reasons.NO_DECODER_FOUND},
    ),
]
