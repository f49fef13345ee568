"""Families beside the Qwen-VL line whose positions of text have several axes (M-RoPE)."""

from collections.abc import Callable

import torch
import transformers as tr

from . import reasons
from .parts import (
    AROUND,
    ENCODER,
    END,
    GLM_TOKENS,
    GLM_VISION,
    START,
    TEXT,
    VISION_END,
    VISION_START,
    mm_token_types,
    mrope,
    patch_rows,
    patches,
)
from .spec import MEDIA_TOKEN, SEES_ALL, Family, seeded


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
    return {
        **mm_token_types(inputs),
        "moe_mm_token_type_ids": of_vision.long(),
    }  # start and end are for vision experts


def cohere_compass():
    rope = {"sliding_attention": mrope(2, 2, 2), "full_attention": None}  # no rotation in full attention layers
    return tr.CohereCompassConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "out_hidden_size": 48,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config=dict(
            **TEXT | {"num_hidden_layers": 3},
            sliding_window=8,
            rope_parameters=rope,
            logit_scale=0.5,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        image_token_id=MEDIA_TOKEN,
        video_token_id=97,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def cosmos3_edge():
    return tr.Cosmos3EdgeConfig(
        vision_config=dict(**ENCODER, patch_size=4, num_patches=16),
        text_config=dict(**TEXT, head_dim=12, rope_parameters=mrope(2, 2, 2)),
        projector_hidden_size=64,
        image_token_id=MEDIA_TOKEN,
        video_token_id=97,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def cosmos3_omni():
    return tr.Cosmos3OmniConfig(
        vision_config=tr.Qwen3VLVisionConfig(
            depth=3,
            hidden_size=32,
            intermediate_size=48,
            num_heads=4,
            patch_size=4,
            out_hidden_size=48,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0, 1],
        ),
        text_config=tr.Qwen3VLTextConfig(
            **TEXT | {"num_hidden_layers": 3},
            head_dim=12,
            rope_parameters=mrope(2, 2, 2) | {"mrope_interleaved": True},
        ),
        image_token_id=MEDIA_TOKEN,
        video_token_id=97,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


# The GLM language models turn half of a head: 3 frequencies of 12-wide heads.
GLM_ROPE = mrope(2, 2, 2) | {"mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5}


def glm46v():
    return tr.Glm46VConfig(
        vision_config=tr.Glm4vVisionConfig(**GLM_VISION),
        text_config=tr.Glm4vTextConfig(**TEXT, rope_parameters=GLM_ROPE),
        **GLM_TOKENS,
    )


def glm4v_moe():
    return tr.Glm4vMoeConfig(
        vision_config=GLM_VISION,
        text_config=dict(
            **TEXT,
            rope_parameters=GLM_ROPE,
            moe_intermediate_size=32,
            num_experts_per_tok=2,
            n_routed_experts=4,
            first_k_dense_replace=1,
        ),
        **GLM_TOKENS,
    )


def glm_ocr():
    return tr.GlmOcrConfig(
        vision_config=GLM_VISION, text_config=dict(**TEXT, rope_parameters=mrope(2, 2, 2)), **GLM_TOKENS
    )


def hunyuan_vl():
    return tr.HunYuanVLConfig(
        vision_config=tr.HunYuanVLVisionConfig(**ENCODER, patch_size=4, max_image_size=24),
        text_config=tr.HunYuanVLTextConfig(
            **TEXT,
            head_dim=16,
            rope_parameters={
                "rope_type": "xdrope",
                "rope_theta": 10000.0,
                "factor": 1.0,
                "alpha": 1000.0,
                "mrope_section": [2, 2, 2, 2],
            },
        ),
        image_token_id=MEDIA_TOKEN,
        im_start_id=96,
        im_end_id=95,
        im_newline_id=94,
    )


def paddleocr_vl():
    return tr.PaddleOCRVLConfig(
        vision_config=tr.PaddleOCRVisionConfig(**ENCODER, image_size=20, patch_size=4),
        text_config=tr.PaddleOCRTextConfig(
            **TEXT,
            head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        ),
        image_token_id=MEDIA_TOKEN,
        video_token_id=97,
        vision_start_token_id=96,
        vision_end_token_id=95,
    )


def hy_v4_vl():
    """The third layer reads the keys that the second has selected. A newline ends each row of image tokens."""
    sizes = {**TEXT, "num_hidden_layers": 3}
    del sizes["num_key_value_heads"]
    return tr.HYV4VLConfig(
        vision_config=tr.HYV4VLVisionConfig(**ENCODER, patch_size=4, max_image_size=24, out_hidden_size=48),
        text_config=tr.HYV4VLTextConfig(
            **sizes,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=12,
            v_head_dim=12,
            rope_parameters=mrope(2, 2, 2),
            index_head_dim=16,
            index_n_heads=2,
            index_topk=SEES_ALL,
            indexer_types=["full", "full", "shared"],
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            hc_mult=2,
        ),
        image_token_id=MEDIA_TOKEN,
        video_token_id=96,
    )


FAMILIES = [
    Family(
        "glm4v",
        "Glm4vForConditionalGeneration",
        glm4v,
        grid_media(3 * 2 * 4 * 4),
        num_media_tokens=4,
        **AROUND,
        extra=mm_token_types,
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
    Family(
        "cohere_compass",
        "CohereCompassForConditionalGeneration",
        cohere_compass,
        media=patch_rows,
        num_media_tokens=4,
        before=(START,),
        after=(END,),
        extra=mm_token_types,
        connector=4,
    ),
    Family(
        "cosmos3_edge",
        "Cosmos3EdgeForConditionalGeneration",
        cosmos3_edge,
        media=patches(1, 4, 4, 48),
        num_media_tokens=4,
        before=(START,),
        after=(END,),
        extra=mm_token_types,
        connector=4,
    ),
    Family(
        "cosmos3_omni",
        "Cosmos3OmniForConditionalGeneration",
        cosmos3_omni,
        media=patch_rows,
        num_media_tokens=4,
        before=(START,),
        after=(END,),
        extra=mm_token_types,
        connector=4,
    ),
    Family(
        "glm46v",
        "Glm46VForConditionalGeneration",
        glm46v,
        media=patch_rows,
        num_media_tokens=4,
        before=(START,),
        after=(END,),
        extra=mm_token_types,
    ),
    Family(
        "glm4v_moe",
        "Glm4vMoeForConditionalGeneration",
        glm4v_moe,
        media=patch_rows,
        num_media_tokens=4,
        before=(START,),
        after=(END,),
        extra=mm_token_types,
    ),
    Family(
        "glm_ocr",
        "GlmOcrForConditionalGeneration",
        glm_ocr,
        media=patch_rows,
        num_media_tokens=4,
        before=(START,),
        after=(END,),
        extra=mm_token_types,
    ),
    # the second row differs a little (1e-4): get_rope_index counts images through the batch, not through the row;
    # no gradient in the patch merger's image_sep, which the family has but does not use
    Family(
        "hunyuan_vl",
        "HunYuanVLForConditionalGeneration",
        hunyuan_vl,
        media=patches(1, 4, 4, 3 * 4 * 4),
        num_media_tokens=2 * (2 + 1) + 2,
        before=(96,),
        after=(95,),
        extra=mm_token_types,
        connector=reasons.BETWEEN_BY_SIZE,
        has_connector=False,
    ),
    Family(
        "paddleocr_vl",
        "PaddleOCRVLForConditionalGeneration",
        paddleocr_vl,
        num_media_tokens=6,
        before=(96,),
        after=(95,),
        extra=mm_token_types,
        media=lambda n: {"pixel_values": seeded(n * 24, 3, 4, 4), "image_grid_thw": torch.tensor([[1, 4, 6]] * n)},
        connector=reasons.BY_SIZE,
    ),
    # attends to sinks and to selected keys, which transformers has in eager attention only
    Family(
        "hy_v4_vl",
        "HYV4VLForConditionalGeneration",
        hy_v4_vl,
        media=lambda n: {"pixel_values": seeded(n * 16, 48), "image_grid_thw": torch.tensor([[1, 4, 4]] * n)},
        num_media_tokens=2 * (2 + 1),
        extra=lambda inputs: {"mm_token_type_ids": (inputs["input_ids"] == MEDIA_TOKEN).long()},
        connector=reasons.BETWEEN_BY_SIZE,
        has_connector=False,
        without={"attention": reasons.NO_SDPA},
        since="5.24.0",
    ),
]
