"""Language models or encoders of which some layers have something else than attention: a state, a convolution."""

import torch
import transformers as tr

from . import reasons
from .parts import (
    AROUND,
    ENCODER,
    END,
    GLM_TOKENS,
    GLM_VISION,
    IDS,
    QWEN_MOE,
    QWEN_TOKENS,
    START,
    TEXT,
    WRAPPED,
    interleaved_mrope,
    mm_token_types,
    mrope,
    patch_rows,
    qwen_family,
    qwen_images,
    qwen_special_tokens,
    qwen_vision,
    text_sizes,
)
from .spec import MEDIA_TOKEN, SEES_ALL, Family, seeded, side_by_side


def qwen3_5():
    return tr.Qwen3_5Config(
        vision_config=tr.Qwen3_5VisionConfig(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=4,
            patch_size=4,
            out_hidden_size=48,
            num_position_embeddings=16,
        ),
        text_config=tr.Qwen3_5TextConfig(
            **text_sizes(
                num_hidden_layers=3,
                head_dim=32,
                layer_types=["linear_attention", "linear_attention", "full_attention"],
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                rope_parameters=mrope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.25),
            )
        ),
        **qwen_special_tokens(),
    )


def minicpmv4_6():
    return tr.MiniCPMV4_6Config(
        vision_config=dict(**ENCODER, image_size=16, patch_size=2),
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


def glm5_next():
    return tr.Glm5NextConfig(
        vision_config=dict(**GLM_VISION, projection_intermediate_size=64),
        text_config=dict(
            **TEXT | {"num_hidden_layers": 4, "num_key_value_heads": 4},
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            q_lora_rank=16,
            kv_lora_rank=16,
            v_head_dim=8,
            qk_nope_head_dim=8,
            linear_head_dim=8,
            linear_num_heads=4,
            hc_mult=2,
            hc_sinkhorn_iters=4,
            index_topk=SEES_ALL,
            index_kpool=2,
            index_head_dim=8,
            index_n_heads=16,
            mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
            layer_types=["linear_attention", "indexed_attention", "indexed_attention", "linear_attention"],
            indexer_types=["full", "full", "shared", "full"],
        ),
        **GLM_TOKENS,
    )


def inkling2():
    return tr.Inkling2Config(
        vision_config=tr.Inkling2VisionConfig(
            **ENCODER, patch_size=4, posemb_grid_size=4, projection_hidden_dim=48, text_hidden_size=48
        ),
        text_config=tr.Inkling2TextConfig(
            **IDS,
            unpadded_vocab_size=MEDIA_TOKEN,
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            swa_head_dim=12,
            sliding_window_size=4,
            d_rel=4,
            rel_extent=8,
            layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"],
            max_position_embeddings=128,
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            route_scale=2.0,
            n_layers_per_attn_res_block=2,
        ),
        image_token_id=MEDIA_TOKEN,
    )


def inkling_mm_model():
    return tr.InklingConfig(
        vision_config=tr.InklingVisionConfig(patch_size=2, n_layers=3, hidden_size=32, num_attention_heads=4),
        audio_config=tr.InklingAudioConfig(n_mel_bins=4, mel_vocab_size=8),
        text_config=tr.InklingTextConfig(
            **IDS,
            unpadded_vocab_size=MEDIA_TOKEN,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            swa_head_dim=12,
            sliding_window_size=4,
            d_rel=4,
            rel_extent=8,
            layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"],
            max_position_embeddings=128,
            mlp_layer_types=["dense", "sparse", "sparse"],
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=2,
            route_scale=2.0,
            logits_mup_width_multiplier=2.0,
        ),
        image_token_id=MEDIA_TOKEN,
        audio_token_id=97,
        image_bos_token_id=96,
        audio_bos_token_id=95,
    )


def lfm2_vl():
    return tr.Lfm2VlConfig(
        vision_config=tr.Siglip2VisionConfig(**ENCODER, patch_size=4, num_patches=16, vision_use_head=False),
        text_config=tr.Lfm2Config(
            **{**TEXT, "num_hidden_layers": 3},
            layer_types=["conv", "full_attention", "conv"],
            block_auto_adjust_ff_dim=False,
        ),
        image_token_id=MEDIA_TOKEN,
        projector_hidden_size=40,
    )


def naflex_image(n):
    """4 x 6 patches and 4 patches of padding for each image."""
    mask = torch.tensor([[1] * 24 + [0] * 4] * n)
    return {
        "pixel_values": seeded(n, 28, 3 * 4 * 4) * mask[:, :, None],
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[4, 6]] * n),
    }


def lfm3_vl():
    return tr.Lfm3VlConfig(
        vision_config=tr.Lfm3VlVisionConfig(
            **{**ENCODER, "num_hidden_layers": 3},
            num_key_value_heads=2,
            patch_size=4,
            layer_types=["conv", "full_attention", "conv"],
        ),
        text_config=tr.Lfm3Config(
            **{**TEXT, "num_hidden_layers": 3},
            head_dim=16,
            sliding_window=4,
            conv_L_cache=3,
            layer_types=["conv", "sliding_attention", "full_attention"],
        ),
        image_token_id=MEDIA_TOKEN,
        video_token_id=97,
        vision_start_token_id=96,
        vision_end_token_id=95,
        projector_hidden_size=40,
    )


def qwen3_5_text():
    return tr.Qwen3_5TextConfig(
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
    )


def minicpm_ocr():
    return tr.MiniCPMOcrConfig(
        vision_config=tr.MiniCPMOcrVisionConfig(**ENCODER, image_size=24, patch_size=4),
        text_config=qwen3_5_text(),
        insert_layer_id=0,
        image_token_id=MEDIA_TOKEN,
        video_token_id=97,
    )


def minicpmv4_7():
    return tr.MiniCPMV4_7Config(
        vision_config=tr.MiniCPMV4_7VisionConfig(**ENCODER, image_size=24, patch_size=4),
        text_config=qwen3_5_text(),
        insert_layer_id=0,
        image_token_id=MEDIA_TOKEN,
        video_token_id=97,
        image_start_id=96,
        image_end_id=95,
        slice_start_id=94,
        slice_end_id=93,
        newline_id=92,
    )


def packed_image(height, width):
    def media(n):
        return {
            "pixel_values": seeded(n, 3, 4, height * width * 4),
            "target_sizes": torch.tensor([[height, width]] * n),
        }

    return media


def nemotron_h_omni():
    return tr.NemotronH_Omni_Reasoning_V3_Config(
        vision_config=tr.RadioConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            mlp_ratio=1.5,
            patch_size=4,
            image_size=24,
            max_img_size=32,
            num_cls_tokens=2,
            num_registers=1,
            video_temporal_patch_size=2,
        ),
        text_config=tr.NemotronHConfig(
            **IDS,
            hidden_size=48,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            max_position_embeddings=128,
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
            ssm_state_size=8,
            mamba_num_heads=4,
            mamba_head_dim=12,
            n_groups=2,
            expand=1,
            chunk_size=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            moe_shared_expert_intermediate_size=32,
        ),
        image_token_id=MEDIA_TOKEN,
        video_token_id=97,
        audio_token_id=94,
        vision_hidden_size=32,
        projector_hidden_size=40,
    )


QWEN_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def qwen3_5_moe():
    hybrid = text_sizes(
        **QWEN_MOE,
        **QWEN_LINEAR,
        shared_expert_intermediate_size=16,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        rope_parameters=interleaved_mrope(2, 1, 1, partial_rotary_factor=0.5),
    )
    del hybrid["intermediate_size"]
    return tr.Qwen3_5MoeConfig(text_config=hybrid, vision_config=qwen_vision(), **QWEN_TOKENS)


def qwen4_exp():
    hybrid = text_sizes(
        **QWEN_MOE,
        **QWEN_LINEAR,
        shared_expert_intermediate_size=16,
        head_dim=16,
        num_hidden_layers=3,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        rope_parameters=interleaved_mrope(2, 1, 1, partial_rotary_factor=0.5),
        hc_count=2,
        hc_lowrank=8,
        ple_layer_ids=[2],
        ple_embed_dim=16,
        heads_per_ngram=2,
        ngram_vocab_size_base=50,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=2,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=2,
    )
    del hybrid["intermediate_size"]
    return tr.Qwen4ExpConfig(text_config=hybrid, vision_config=qwen_vision(), **QWEN_TOKENS)


def inkling2_loop():
    """The second of three layers runs twice."""
    return tr.Inkling2LoopConfig(
        vision_config=tr.Inkling2VisionConfig(
            **ENCODER, patch_size=4, posemb_grid_size=4, projection_hidden_dim=48, text_hidden_size=48
        ),
        text_config=tr.Inkling2LoopTextConfig(
            **IDS,
            unpadded_vocab_size=MEDIA_TOKEN,
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            swa_head_dim=12,
            sliding_window_size=4,
            d_rel=4,
            rel_extent=8,
            layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"],
            max_position_embeddings=128,
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            route_scale=2.0,
            n_layers_per_attn_res_block=1,
            loop_layer_index_start=1,
            loop_layer_index_end=2,
            loop_num_passes=2,
            loop_gate_rank=4,
        ),
        image_token_id=MEDIA_TOKEN,
    )


FAMILIES = [
    Family(
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        qwen3_5,
        qwen_images,
        6,
        **WRAPPED,
        extra=mm_token_types,
        connector=4,
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
    # indexers: no gradient and 16 heads, as in dots3_note; linear_attention is Kimi delta attention (reference code)
    Family(
        "glm5_next",
        "Glm5NextForConditionalGeneration",
        glm5_next,
        media=patch_rows,
        num_media_tokens=4,
        before=(START,),
        after=(END,),
    ),
    # no sdpa: the relative position bias exists only in the eager attention; the first attention in a layer is that to
    # the outputs of earlier layers
    Family(
        "inkling2",
        "Inkling2ForConditionalGeneration",
        inkling2,
        num_media_tokens=6,
        media=lambda n: {"pixel_values": seeded(n * 6, 8, 8, 3), "image_grid_thw": torch.tensor([[1, 2, 3]] * n)},
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        # In 5.24 another attention, over the outputs of layers, comes before the one with the convolution.
        refused={"textual": f"{reasons.MIXES}|{reasons.NOT_BEHIND_NORM}"},
        without={"attention": reasons.NO_SDPA},
    ),
    # no gradient in the audio tower (no audio here); the vision tower is a folding MLP without attention
    Family(
        "inkling_mm_model",
        "InklingForConditionalGeneration",
        inkling_mm_model,
        num_media_tokens=4,
        before=(96,),
        media=lambda n: {"pixel_values": seeded(n * 4, 2, 2, 2, 3)},
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={
            "textual": reasons.MIXES,
            "visual": reasons.NO_SELF_ATTENTION,
        },
    ),
    Family(
        "lfm2_vl",
        "Lfm2VlForConditionalGeneration",
        lfm2_vl,
        media=naflex_image,
        num_media_tokens=6,
        before=(96,),
        after=(95,),
        connector=reasons.BY_SIZE,
    ),
    Family(
        "lfm3_vl",
        "Lfm3VlForConditionalGeneration",
        lfm3_vl,
        media=qwen_images,
        num_media_tokens=6,
        before=(96,),
        after=(95,),
        connector=4,
    ),
    # no gradient in vision_tower.vit_merger: the released "4x" mode skips it
    Family(
        "minicpm_ocr",
        "MiniCPMOcrForConditionalGeneration",
        minicpm_ocr,
        pack=side_by_side,
        media=packed_image(4, 6),
        num_media_tokens=6,
        before=(96,),
        after=(95,),
        connector=reasons.BY_SIZE,
    ),
    Family(
        "minicpmv4_7",
        "MiniCPMV4_7ForConditionalGeneration",
        minicpmv4_7,
        pack=side_by_side,
        media=packed_image(8, 8),
        num_media_tokens=4,
        before=(96,),
        after=(95,),
        extra=mm_token_types,
        connector=reasons.BY_SIZE,
    ),
    # no gradient in the vision tower's video_patch_projection (no video here)
    Family(
        "nemotron_h_omni",
        "NemotronH_Omni_Reasoning_V3",
        nemotron_h_omni,
        num_media_tokens=6,
        before=(96,),
        after=(95,),
        media=lambda n: {"pixel_values": seeded(n * 24, 3 * 4 * 4), "image_grid_hw": torch.tensor([[4, 6]] * n)},
        without={"generation": reasons.UNTUNED_CACHE},
    ),
    qwen_family("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", qwen3_5_moe),
    # the indexer of full attention chooses tokens by top-k: its parameters never get gradients; no flash attention
    qwen_family(
        "qwen4_exp",
        "Qwen4ExpForConditionalGeneration",
        qwen4_exp,
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={"textual": reasons.NOT_BEHIND_NORM},
    ),
    # no sdpa: the relative position bias exists only in the eager attention; the first attention in a layer is that to
    # the outputs of earlier layers
    Family(
        "inkling2_loop",
        "Inkling2LoopForConditionalGeneration",
        inkling2_loop,
        media=lambda n: {"pixel_values": seeded(n * 6, 8, 8, 3), "image_grid_thw": torch.tensor([[1, 2, 3]] * n)},
        num_media_tokens=6,
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={"textual": reasons.NOT_BEHIND_NORM},
        without={"attention": reasons.NO_SDPA},
        since="5.24.0",
    ),
]
