"""Tiny models of group c: image-text families, encoder-decoders, dual encoders and image classifiers.

All families of the group can be built. Eager and sdpa attention differ at padded positions only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tr

from . import reasons
from .spec import BOS, EOS, MEDIA_TOKEN, PAD, TEXT_IDS, VOCAB_SIZE, Family, seeded, side_by_side


SPECIAL = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
TEXT = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    **SPECIAL,
)
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION_START, VISION_END = 90, 91


def pixels(n: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": seeded(n, 3, 16, 16)}


def text_ids(n: int, length: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(*TEXT_IDS, (n, length), generator=torch.Generator().manual_seed(seed))


ARIA_IMAGE = 97  # 98 is what the random model happens to generate: without a cache that is one more placeholder


def aria():
    return tr.AriaConfig(
        vision_config=tr.Idefics3VisionConfig(**VISION, image_size=16, patch_size=4),
        text_config=tr.AriaTextConfig(**TEXT, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=2),
        projector_patch_to_query_dict={16: 4},
        image_token_index=ARIA_IMAGE,
    )


def aria_media(n: int) -> dict[str, torch.Tensor]:
    pixel_mask = torch.ones(n, 16, 16, dtype=torch.bool)
    pixel_mask[:, 12:] = False  # the processor pads an image to a square: the lowest row of patches is padding
    return {**pixels(n), "pixel_mask": pixel_mask}


def chameleon():
    return tr.ChameleonConfig(
        **TEXT,
        vq_config=tr.ChameleonVQVAEConfig(
            embed_dim=16,
            num_embeddings=10,
            latent_channels=16,
            resolution=16,
            base_channels=32,
            channel_multiplier=(1, 1, 1, 1),
            num_res_blocks=1,
        ),
        # the names of image tokens spell their number in letters: A is 0, B is 1, ...
        vocabulary_map={"<image>": MEDIA_TOKEN, **{f"IMGIMG{digit}Z": 80 + i for i, digit in enumerate("ABCDEFGHIJ")}},
    )


def florence2():
    return tr.Florence2Config(
        vision_config=tr.Florence2VisionConfig(
            depths=(1, 1),
            patch_size=(7, 3),
            patch_stride=(4, 2),
            patch_padding=(3, 1),
            patch_prenorm=(False, True),
            embed_dim=(32, 32),
            num_heads=(4, 4),
            num_groups=(4, 4),
            window_size=2,
            projection_dim=48,
            max_position_embeddings=8,
        ),
        text_config=tr.BartConfig(
            d_model=48,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=128,
            decoder_start_token_id=EOS,
            forced_eos_token_id=None,
            **SPECIAL,
        ),
        image_token_id=MEDIA_TOKEN,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def kosmos2():
    return tr.Kosmos2Config(
        vision_config=tr.Kosmos2VisionConfig(**VISION, image_size=16, patch_size=8),
        text_config=tr.Kosmos2TextConfig(
            embed_dim=48,
            layers=2,
            ffn_dim=64,
            attention_heads=4,
            max_position_embeddings=128,
            **SPECIAL,
        ),
        latent_query_num=4,
    )


def janus():
    return tr.JanusConfig(
        vision_config=tr.JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
            mlp_ratio=2.0,
            projection_dim=48,
            num_image_tokens=4,
        ),
        text_config=tr.LlamaConfig(**TEXT),
        vq_config=tr.JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=10,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=(1, 1),
            num_res_blocks=1,
            projection_dim=48,
            image_token_embed_dim=48,
        ),
        image_token_id=MEDIA_TOKEN,
    )


def media_types(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"mm_token_type_ids": (inputs["input_ids"] == MEDIA_TOKEN).long()}


def glm4v():
    return tr.Glm4vConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "image_size": 16,
            "patch_size": 4,
            "out_hidden_size": 48,
            "intermediate_size": 64,
        },
        text_config=dict(
            **TEXT,
            # heads of 12, of which 6 are rotated: 3 frequencies, one per axis
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [1, 1, 1],
            },
        ),
        image_token_id=MEDIA_TOKEN,
        video_token_id=97,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        video_start_token_id=92,
        video_end_token_id=93,
    )


def grid_media(patch_values: int) -> Callable[[int], dict[str, torch.Tensor]]:
    """4 x 4 patches, merged 2 x 2 to 4 tokens."""
    return lambda n: {
        "pixel_values": seeded(n * 16, patch_values),
        "image_grid_thw": torch.tensor([[1, 4, 4]]).repeat(n, 1),
    }


def ernie4_5_vl_moe():
    return tr.Ernie4_5_VLMoeConfig(
        vision_config={"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "intermediate_size": 48},
        text_config=dict(
            **TEXT,
            moe_intermediate_size=[24, 16],
            moe_num_experts=4,
            moe_k=2,
            moe_num_shared_experts=1,
            mlp_layer_types=["dense", "sparse"],
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [2, 2, 2]},
        ),
        image_token_id=MEDIA_TOKEN,
        video_token_id=97,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        video_start_token_id=92,
        video_end_token_id=93,
    )


def ernie_types(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    of_vision = torch.isin(inputs["input_ids"], torch.tensor([MEDIA_TOKEN, VISION_START, VISION_END]))
    return {**media_types(inputs), "moe_mm_token_type_ids": of_vision.long()}  # start and end are for vision experts


def deepseek_vl():
    return tr.DeepseekVLConfig(
        vision_config=tr.SiglipVisionConfig(**VISION, image_size=16, patch_size=8, vision_use_head=False),
        text_config=tr.LlamaConfig(**TEXT),
        image_token_id=MEDIA_TOKEN,
    )


OVIS_INDICATORS = (90, 91, 92, 93, 94)  # start, grid, column, row, end


def ovis2():
    return tr.Ovis2Config(
        vision_config=dict(
            **VISION, image_size=16, patch_size=4, vocab_size=29, hidden_stride=2, num_visual_indicator_tokens=5
        ),
        text_config=tr.Qwen2Config(**TEXT),
        image_token_id=MEDIA_TOKEN,
        visual_indicator_token_ids=list(OVIS_INDICATORS),
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
    )


def molmo2():
    return tr.Molmo2Config(
        vision_config=dict(
            **VISION,
            num_key_value_heads=4,
            head_dim=8,
            image_size=[16, 16],
            patch_size=4,
        ),
        adapter_config={
            "vision_feature_layer": [1, 0],
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "intermediate_size": 48,
            "text_hidden_size": 48,
        },
        text_config={
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "vocab_size": VOCAB_SIZE,
            "additional_vocab_size": 4,
            "max_position_embeddings": 128,
        },
        image_patch_id=MEDIA_TOKEN,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        low_res_image_start_token_id=92,
        frame_start_token_id=93,
        frame_end_token_id=94,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def molmo2_pack(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The patches to pool are counted through the whole batch."""
    num_images = len(inputs["image_grids"])
    num_patches = inputs["pixel_values"].shape[:2].numel() // num_images
    pooling = inputs["image_token_pooling"]
    first = num_patches * torch.arange(num_images).repeat_interleave(len(pooling) // num_images)[:, None]
    return {**inputs, "image_token_pooling": torch.where(pooling >= 0, pooling + first, -1)}


def molmo2_media(n: int) -> dict[str, torch.Tensor]:
    """The whole image as 2 x 2 tokens of 2 x 2 patches, then one crop of it of 2 x 1 tokens, one with a patch less."""
    whole = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    crop = [[16, 17, 20, 21], [24, 25, 28, -1]]
    return {
        "pixel_values": seeded(n * 2, 16, 3 * 4 * 4),
        "image_token_pooling": torch.tensor([whole + crop] * n).flatten(0, 1),
        "image_grids": torch.tensor([[2, 2, 2, 1]] * n),
        "image_num_crops": torch.tensor([2] * n),
    }


def minicpmv4_6():
    return tr.MiniCPMV4_6Config(
        vision_config=dict(**VISION, image_size=16, patch_size=2),
        text_config=dict(
            model_type="qwen3_5_text",
            **TEXT,
            head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        ),
        insert_layer_id=0,
        image_size=16,
        image_token_id=MEDIA_TOKEN,
        video_token_id=97,
    )


def minicpm_media(n: int) -> dict[str, torch.Tensor]:
    """8 x 8 patches of 2 x 2 pixels side by side, merged twice to 2 x 2 tokens."""
    return {"pixel_values": seeded(n, 3, 2, 64 * 2), "target_sizes": torch.tensor([[8, 8]] * n, dtype=torch.int32)}


def got_ocr2():
    return tr.GotOcr2Config(
        vision_config={
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 2,
            "window_size": 3,
            "global_attn_indexes": [1],
            "mlp_dim": 48,
        },
        text_config=tr.Qwen2Config(**TEXT),
        image_token_index=MEDIA_TOKEN,
        image_seq_length=4,
    )


def vision_encoder_decoder(decoder, **encoder):
    return tr.VisionEncoderDecoderConfig(
        encoder=tr.ViTConfig(**VISION, image_size=16, patch_size=8, **encoder),
        decoder=decoder,
        decoder_start_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def trocr():
    """As TrOCR: no biases in the encoder's qkv, cross-attention keys and values from the encoder's hidden size."""
    return vision_encoder_decoder(
        tr.TrOCRConfig(
            d_model=48,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=64,
            max_position_embeddings=128,
            cross_attention_hidden_size=32,
            is_decoder=True,
            add_cross_attention=True,
            decoder_start_token_id=EOS,
            **SPECIAL,
        ),
        qkv_bias=False,
    )


def vit_gpt2():
    return vision_encoder_decoder(
        tr.GPT2Config(
            n_embd=48,
            n_layer=2,
            n_head=4,
            n_positions=128,
            is_decoder=True,
            add_cross_attention=True,
            **SPECIAL,
        )
    )


def captioned(n: int) -> dict[str, torch.Tensor]:
    start = torch.full((n, 1), EOS)
    return {**pixels(n), "decoder_input_ids": torch.cat([start, text_ids(n, 7)], dim=1)}


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
        vision_config=tr.CLIPVisionConfig(**VISION, image_size=16, patch_size=8, projection_dim=24),
        projection_dim=24,
    )


def siglip():
    return tr.SiglipConfig(
        text_config=dict(**TOWER_TEXT, projection_size=32),
        vision_config=dict(**VISION, image_size=16, patch_size=8),
    )


def siglip2():
    return tr.Siglip2Config(
        text_config=dict(**TOWER_TEXT, projection_size=32),
        vision_config=dict(**VISION, num_patches=16, patch_size=4),
    )


def siglip2_media(n: int) -> dict[str, torch.Tensor]:
    """2 x 3 patches, padded to 8."""
    return {
        "pixel_values": seeded(n, 8, 3 * 4 * 4),
        "pixel_attention_mask": torch.tensor([[1] * 6 + [0] * 2] * n),
        "spatial_shapes": torch.tensor([[2, 3]] * n),
    }


def vit():
    return tr.ViTConfig(**VISION, image_size=16, patch_size=8, num_labels=5)


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


AROUND = {"before": (VISION_START,), "after": (VISION_END,)}
WITHOUT_TEXT = {"text": False, "labels": None, "generates": False}
DUAL_ENCODER = {"extra": end_of_text, "labels": None, "generates": False}


FAMILIES = [
    # The features are those in front of the vision tower's last norm, which gets no gradient.
    Family(
        "aria",
        "AriaForConditionalGeneration",
        aria,
        aria_media,
        num_media_tokens=4,
        media_token=ARIA_IMAGE,
        connector=reasons.RESAMPLER,
    ),
    # No gradient in the VQ model: its image tokens are the argmin over the code book, only their embeddings are used.
    # The logits of the ten image tokens are the lowest number of the type (their squares are infinite).
    Family(
        "chameleon",
        "ChameleonForConditionalGeneration",
        chameleon,
        pixels,
        num_media_tokens=4,
        **AROUND,
        connector=reasons.NO_VISUAL,
        has_connector=False,
        refused={"visual": reasons.NO_ENCODER_FOUND},
    ),
    # Placeholders and text go to the BART encoder, the decoder's ids come from the labels; without labels the decoder
    # reads its start token only (logits of one position).
    # A padded row differs: BART's learned positions count the padding too.
    Family(
        "florence2",
        "Florence2ForConditionalGeneration",
        florence2,
        pixels,
        num_media_tokens=5,
        connector=reasons.NO_VISUAL,
        has_connector=False,
        refused={"visual": reasons.NOT_BEHIND_NORM},
        without={"padding": reasons.UNTUNED_PADDING},
    ),
    Family(
        "kosmos-2",
        "Kosmos2ForConditionalGeneration",
        kosmos2,
        pixels,
        num_media_tokens=4,
        **AROUND,
        extra=lambda inputs: {"image_embeds_position_mask": inputs["input_ids"] == MEDIA_TOKEN},
        connector=reasons.RESAMPLER_BETWEEN,
        has_connector=False,
        without={
            "checkpointing": reasons.IN_PLACE,
            "generation": reasons.UNTUNED_CACHE,
            "padding": reasons.UNTUNED_PADDING,
        },
        since="5.23",
    ),
    # No gradient in vqmodel and generation_*: they only make images.
    Family("janus", "JanusForConditionalGeneration", janus, pixels, num_media_tokens=4, **AROUND),
    Family(
        "glm4v",
        "Glm4vForConditionalGeneration",
        glm4v,
        grid_media(3 * 2 * 4 * 4),
        num_media_tokens=4,
        **AROUND,
        extra=media_types,
    ),
    # Generation without a cache crashes: generate() lengthens mm_token_type_ids but not moe_mm_token_type_ids. With a
    # cache it works.
    # e_score_correction_bias is made without a gradient: it only takes part in choosing the experts.
    Family(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeForConditionalGeneration",
        ernie4_5_vl_moe,
        grid_media(3 * 4 * 4),
        num_media_tokens=4,
        **AROUND,
        extra=ernie_types,
        generates=False,
        connector=reasons.BETWEEN_BY_SIZE,
        has_connector=False,
    ),
    Family("deepseek_vl", "DeepseekVLForConditionalGeneration", deepseek_vl, pixels, num_media_tokens=4),
    Family(
        "ovis2",
        "Ovis2ForConditionalGeneration",
        ovis2,
        pixels,
        num_media_tokens=4,
        before=OVIS_INDICATORS[:1],
        after=(OVIS_INDICATORS[1], OVIS_INDICATORS[4]),
        connector="its encoder gives words of a visual vocabulary",
        has_connector=False,
    ),
    # All image tokens of a row see one another, also those that come later (mm_token_type_ids).
    Family(
        "molmo2",
        "Molmo2ForConditionalGeneration",
        molmo2,
        molmo2_media,
        num_media_tokens=6,
        pack=molmo2_pack,
        **AROUND,
        extra=media_types,
        connector=reasons.RESAMPLER,
    ),
    Family(
        "minicpmv4_6",
        "MiniCPMV4_6ForConditionalGeneration",
        minicpmv4_6,
        minicpm_media,
        num_media_tokens=4,
        pack=side_by_side,
        **AROUND,
        connector=reasons.BY_SIZE,
    ),
    # No sdpa: the vision attention (windows, decomposed relative positions as in SAM) is written out.
    Family(
        "got_ocr2",
        "GotOcr2ForConditionalGeneration",
        got_ocr2,
        pixels,
        num_media_tokens=4,
        **AROUND,
        connector=reasons.NO_VISUAL,
        has_connector=False,
        refused={"visual": reasons.GOES_ROUND},
        without={"attention": reasons.NO_SDPA},
    ),
    # The text is that of the decoder (decoder_input_ids). No gradient in the encoder's pooler, which is not used.
    Family(
        "vision-encoder-decoder",
        "VisionEncoderDecoderModel",
        vit_gpt2,
        captioned,
        text=False,
        labels=None,
        connector=reasons.CROSS_ATTENTION,
        has_connector=False,
        since="5.23",
    ),
    # No sdpa: TrOCR's attention is written out.
    Family(
        "vision-encoder-decoder-trocr",
        "VisionEncoderDecoderModel",
        trocr,
        captioned,
        text=False,
        labels=None,
        connector=reasons.CROSS_ATTENTION,
        has_connector=False,
        refused={"textual": reasons.NO_SELF_ATTENTION},
        without={"attention": reasons.NO_SDPA},
        since="5.23",
    ),
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
]
