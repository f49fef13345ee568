"""Tiny models of the families of group e.

Not here: perception_lm (its vision tower is a timm_wrapper, and timm is not installed).
"""

import torch
import transformers as tr

from . import reasons
from .spec import BOS, EOS, MEDIA_TOKEN, PAD, SEES_ALL, VOCAB_SIZE, Family, seeded, side_by_side


IDS = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
TEXT = dict(
    IDS,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VIDEO_TOKEN = 97
IMAGE_START, IMAGE_END = 96, 95


def mm_token_types(inputs):
    return {"mm_token_type_ids": (inputs["input_ids"] == MEDIA_TOKEN).long()}


def patches(t, h, w, channels, name="pixel_values"):
    """Flattened patches of n images of t x h x w patches, with the grids."""

    def media(n):
        return {name: seeded(n * t * h * w, channels), "image_grid_thw": torch.tensor([[t, h, w]] * n)}

    return media


def hunyuan_vl():
    return tr.HunYuanVLConfig(
        vision_config=tr.HunYuanVLVisionConfig(**VISION, patch_size=4, max_image_size=24),
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
        im_start_id=IMAGE_START,
        im_end_id=IMAGE_END,
        im_newline_id=94,
    )


def hyperclovax_vision_v2():
    return tr.HyperCLOVAXVisionV2Config(
        vision_config=tr.Qwen2_5_VLVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            depth=2,
            num_heads=4,
            patch_size=4,
            window_size=16,
            fullatt_block_indexes=[1],
            out_hidden_size=40,
        ),
        text_config=tr.HyperCLOVAXConfig(
            **TEXT, embedding_multiplier=1.5, logits_scaling=0.5, residual_multiplier=0.7, attention_multiplier=0.25
        ),
        image_token_id=MEDIA_TOKEN,
        video_token_id=VIDEO_TOKEN,
    )


def inkling2():
    return tr.Inkling2Config(
        vision_config=tr.Inkling2VisionConfig(
            **VISION, patch_size=4, posemb_grid_size=4, projection_hidden_dim=48, text_hidden_size=48
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
        audio_token_id=VIDEO_TOKEN,
        image_bos_token_id=IMAGE_START,
        audio_bos_token_id=95,
    )


def instructblipvideo():
    return tr.InstructBlipVideoConfig(
        vision_config=tr.InstructBlipVideoVisionConfig(**VISION, image_size=16, patch_size=8),
        qformer_config=tr.InstructBlipVideoQFormerConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        text_config=tr.LlamaConfig(**TEXT),
        num_query_tokens=3,
        video_token_index=MEDIA_TOKEN,
    )


def qformer_text(inputs):
    ids = inputs["input_ids"][:, -4:]  # the instruction, for the Q-Former too
    return {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def kimi_k25():
    return tr.Kimi_K25Config(
        vision_config=tr.Kimi_K25VisionConfig(
            **VISION, patch_size=4, pos_emb_height=6, pos_emb_width=6, pos_emb_time=2
        ),
        text_config=tr.DeepseekV3Config(
            **{**TEXT, "num_key_value_heads": 4},
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=12,
            num_mtp_layers=0,
        ),
        projection_hidden_size=32,
        image_token_id=MEDIA_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
        tie_word_embeddings=False,
    )


def kosmos2_5():
    return tr.Kosmos2_5Config(
        vision_config=tr.Kosmos2_5VisionConfig(**VISION, head_dim=8, patch_embed_hidden_size=48, max_num_patches=8),
        text_config=tr.Kosmos2_5TextConfig(
            **IDS, embed_dim=48, layers=2, ffn_dim=64, attention_heads=4, max_position_embeddings=64, dropout=0.0
        ),
        latent_query_num=5,
    )


def flattened_patches(n):
    """Rows and columns (from 1) in front of each patch; the last patch is padding."""
    places = torch.tensor([[row, column] for row in (1, 2) for column in (1, 2, 3)] + [[0, 0]]).float()
    pixels = seeded(n, 7, 48)
    pixels[:, -1] = 0
    return torch.cat([places.expand(n, -1, -1), pixels], -1)


def lfm2_vl():
    return tr.Lfm2VlConfig(
        vision_config=tr.Siglip2VisionConfig(**VISION, patch_size=4, num_patches=16, vision_use_head=False),
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
            **{**VISION, "num_hidden_layers": 3},
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
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
        projector_hidden_size=40,
    )


def pixtral():
    return tr.PixtralVisionConfig(**VISION, patch_size=4, image_size=32, hidden_act="silu")


def sized_image(n):
    """Images of 4 x 6 patches, which become 2 x 3 tokens."""
    return {"pixel_values": seeded(n, 3, 16, 24), "image_sizes": torch.tensor([[16, 24]] * n)}


def lighton_ocr():
    return tr.LightOnOcrConfig(
        vision_config=pixtral(),
        text_config=tr.Qwen3Config(**TEXT, head_dim=16),
        image_token_id=MEDIA_TOKEN,
        spatial_merge_size=2,
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
        vision_config=tr.MiniCPMOcrVisionConfig(**VISION, image_size=24, patch_size=4),
        text_config=qwen3_5_text(),
        insert_layer_id=0,
        image_token_id=MEDIA_TOKEN,
        video_token_id=VIDEO_TOKEN,
    )


def minicpmv4_7():
    return tr.MiniCPMV4_7Config(
        vision_config=tr.MiniCPMV4_7VisionConfig(**VISION, image_size=24, patch_size=4),
        text_config=qwen3_5_text(),
        insert_layer_id=0,
        image_token_id=MEDIA_TOKEN,
        video_token_id=VIDEO_TOKEN,
        image_start_id=IMAGE_START,
        image_end_id=IMAGE_END,
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


def minimax_m3_vl():
    return tr.MiniMaxM3VLConfig(
        vision_config=tr.MiniMaxM3VLVisionConfig(**{**VISION, "hidden_size": 48}, patch_size=4, image_size=32),
        text_config=tr.MiniMaxM3VLTextConfig(
            **{**TEXT, "num_hidden_layers": 3},
            head_dim=16,
            rotary_dim=8,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            dense_intermediate_size=64,
            shared_intermediate_size=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
            mlp_layer_types=["dense", "sparse", "sparse"],
            index_n_heads=2,
            index_head_dim=16,
            index_block_size=4,
            index_topk_blocks=SEES_ALL,
            index_local_blocks=1,
        ),
        image_token_index=MEDIA_TOKEN,
        video_token_index=VIDEO_TOKEN,
        projector_hidden_size=40,
    )


def mistral4():
    return tr.Mistral3Config(
        vision_config=pixtral(),
        text_config=tr.Mistral4Config(
            **{**TEXT, "num_key_value_heads": 4},
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=12,
        ),
        image_token_index=MEDIA_TOKEN,
        vision_feature_layer=-1,
        spatial_merge_size=2,
    )


def mistral_large4():
    return tr.MistralLarge4Config(
        vision_config=pixtral(),
        text_config=tr.MistralLarge4TextConfig(
            **{**TEXT, "num_hidden_layers": 4, "num_key_value_heads": 4},
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=12,
            index_topk=SEES_ALL,
            index_head_dim=16,
            index_n_heads=8,
            no_rope_layers=[1, 1, 0, 0],
            kv_source_layers=[0, 0, 2, 2],
            indexer_types=["full", "shared", "full", "full"],
        ),
        image_token_index=MEDIA_TOKEN,
        spatial_merge_size=2,
    )


def positions(inputs):
    return {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


MUSE_VISION = dict(
    VISION,
    patch_size=4,
    pos_emb_height=3,
    pos_emb_width=3,
    max_position_embeddings=9,
    layer_types=["window_attention", "full_attention"],
)
MUSE_TEXT = dict(
    TEXT, head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention"], output_multiplier=0.5
)


def muse_glimmer():
    return tr.MuseGlimmerConfig(
        vision_config=tr.MuseGlimmerVisionConfig(**MUSE_VISION),
        text_config=tr.MuseGlimmerTextConfig(**MUSE_TEXT),
        image_token_id=MEDIA_TOKEN,
        video_token_id=VIDEO_TOKEN,
        out_hidden_size=128,
        projector_hidden_size=40,
    )


def muse_spark():
    return tr.MuseSparkConfig(
        vision_config=tr.MuseSparkVisionConfig(**MUSE_VISION),
        text_config=tr.MuseSparkTextConfig(
            **MUSE_TEXT,
            moe_intermediate_size=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            moe_hidden_size=24,
            mlp_layer_types=["dense", "sparse"],
        ),
        audio_config=tr.MuseSparkAudioConfig(
            patch_sizes=[4, 2], hidden_sizes=[8, 16], depths=[1, 1], num_hidden_layers=2, out_hidden_size=48
        ),
        image_token_id=MEDIA_TOKEN,
        video_token_id=VIDEO_TOKEN,
        audio_token_id=94,
        out_hidden_size=128,
        projector_hidden_size=40,
    )


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
        video_token_id=VIDEO_TOKEN,
        audio_token_id=94,
        vision_hidden_size=32,
        projector_hidden_size=40,
    )


def paddleocr_vl():
    return tr.PaddleOCRVLConfig(
        vision_config=tr.PaddleOCRVisionConfig(**VISION, image_size=20, patch_size=4),
        text_config=tr.PaddleOCRTextConfig(
            **TEXT,
            head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        ),
        image_token_id=MEDIA_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
    )


def pi0():
    gemma = dict(TEXT, head_dim=16, num_key_value_heads=1)
    return tr.PI0Config(
        vlm_config=tr.PaliGemmaConfig(
            vision_config=tr.SiglipVisionConfig(**VISION, image_size=16, patch_size=8, vision_use_head=False),
            text_config=tr.GemmaConfig(**gemma),
            projection_dim=48,
            image_token_id=MEDIA_TOKEN,
        ),
        dit_config=tr.GemmaConfig(**{**gemma, "hidden_size": 32}),
        chunk_size=5,
        max_state_dim=6,
        max_action_dim=6,
    )


def robot(n):
    """One camera, the robot's state, and a noised chunk of actions at a given time."""
    return {
        "pixel_values": seeded(n, 1, 3, 16, 16),
        "pixel_attention_mask": torch.ones(n, 1, dtype=torch.bool),
        "state": seeded(n, 6, seed=4),
        "noise": seeded(n, 5, 6, seed=5),
        "actions": seeded(n, 5, 6, seed=6),
        "timestep": torch.linspace(0.3, 0.7, n),
    }


def pix2struct():
    return tr.Pix2StructConfig(
        vision_config=tr.Pix2StructVisionConfig(
            hidden_size=32,
            patch_embed_hidden_size=48,
            d_ff=48,
            d_kv=8,
            num_hidden_layers=2,
            num_attention_heads=4,
            seq_len=8,
        ),
        text_config=tr.Pix2StructTextConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=PAD,
            eos_token_id=EOS,
            decoder_start_token_id=PAD,
        ),
    )


def decoder_text(n, start):
    """What the decoder of an encoder-decoder model reads, and what it is to say."""
    labels = torch.randint(3, 80, (n, 6), generator=torch.Generator().manual_seed(5))
    return {"decoder_input_ids": torch.cat([torch.full((n, 1), start), labels[:, :-1]], 1), "labels": labels}


def document(n):
    mask = torch.tensor([[1.0] * 6 + [0.0]] * n)
    return {"flattened_patches": flattened_patches(n), "attention_mask": mask, **decoder_text(n, PAD)}


def pp_formulanet():
    return tr.PPFormulaNetConfig(
        vision_config=tr.PPFormulaNetVisionConfig(
            **{**VISION, "intermediate_size": 48},
            mlp_dim=48,
            output_channels=24,
            image_size=32,
            patch_size=4,
            window_size=3,
            global_attn_indexes=[1],
            post_conv_in_channels=24,
            post_conv_mid_channels=24,
            post_conv_out_channels=32,
            decoder_hidden_size=32,
        ),
        text_config=tr.PPFormulaNetTextConfig(
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=64,
            d_model=32,
            encoder_layers=2,
            encoder_attention_heads=4,
            decoder_layers=2,
            decoder_ffn_dim=48,
            decoder_attention_heads=4,
            dropout=0.0,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            decoder_start_token_id=EOS,
        ),
    )


def formula(n):
    return {"pixel_values": seeded(n, 3, 32, 32), **decoder_text(n, EOS)}


FAMILIES = [
    # the second row differs a little (1e-4): get_rope_index counts images through the batch, not through the row;
    # no gradient in the patch merger's image_sep, which the family has but does not use
    Family(
        "hunyuan_vl",
        "HunYuanVLForConditionalGeneration",
        hunyuan_vl,
        media=patches(1, 4, 4, 3 * 4 * 4),
        num_media_tokens=2 * (2 + 1) + 2,
        before=(IMAGE_START,),
        after=(IMAGE_END,),
        extra=mm_token_types,
        connector=reasons.BETWEEN_BY_SIZE,
        has_connector=False,
    ),
    Family(
        "hyperclovax_vision_v2",
        "HyperCLOVAXVisionV2ForConditionalGeneration",
        hyperclovax_vision_v2,
        media=patches(1, 4, 6, 3 * 2 * 4 * 4),
        num_media_tokens=6,
        before=(IMAGE_START,),
        after=(IMAGE_END,),
        connector=reasons.BY_SIZE,
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
        before=(IMAGE_START,),
        media=lambda n: {"pixel_values": seeded(n * 4, 2, 2, 2, 3)},
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={
            "textual": reasons.MIXES,
            "visual": reasons.NO_SELF_ATTENTION,
        },
    ),
    # no gradient in the last Q-Former layer's feed-forward for text, whose output is dropped
    Family(
        "instructblipvideo",
        "InstructBlipVideoForConditionalGeneration",
        instructblipvideo,
        media=lambda n: {"pixel_values": seeded(n, 2, 3, 16, 16)},
        num_media_tokens=6,
        extra=qformer_text,
        connector=reasons.QFORMER,
        has_connector=False,
        since="5.23",
    ),
    Family(
        "kimi_k25",
        "Kimi_K25ForConditionalGeneration",
        kimi_k25,
        num_media_tokens=4,
        before=(IMAGE_START,),
        after=(IMAGE_END,),
        media=lambda n: {"pixel_values": seeded(n * 16, 3, 4, 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * n)},
        connector=4,
    ),
    # the vision tower's attention is always eager: it looks its function up with getattr, not by key
    Family(
        "kosmos-2.5",
        "Kosmos2_5ForConditionalGeneration",
        kosmos2_5,
        num_media_tokens=5,
        before=(IMAGE_START,),
        after=(IMAGE_END,),
        media=lambda n: {"flattened_patches": flattened_patches(n)},
        extra=lambda inputs: {"image_embeds_position_mask": (inputs["input_ids"] == MEDIA_TOKEN).long()},
        connector=reasons.RESAMPLER_BETWEEN,
        has_connector=False,
        refused={"visual": reasons.GOES_ROUND},
        without={
            "generation": reasons.UNTUNED_CACHE,
            "padding": reasons.UNTUNED_PADDING,
        },
    ),
    Family(
        "lfm2_vl",
        "Lfm2VlForConditionalGeneration",
        lfm2_vl,
        media=naflex_image,
        num_media_tokens=6,
        before=(IMAGE_START,),
        after=(IMAGE_END,),
        connector=reasons.BY_SIZE,
    ),
    Family(
        "lfm3_vl",
        "Lfm3VlForConditionalGeneration",
        lfm3_vl,
        media=patches(1, 4, 6, 3 * 2 * 4 * 4),
        num_media_tokens=6,
        before=(IMAGE_START,),
        after=(IMAGE_END,),
        connector=4,
    ),
    Family(
        "lighton_ocr",
        "LightOnOcrForConditionalGeneration",
        lighton_ocr,
        media=sized_image,
        num_media_tokens=6,
        connector=reasons.BY_SIZE,
    ),
    # no gradient in vision_tower.vit_merger: the released "4x" mode skips it
    Family(
        "minicpm_ocr",
        "MiniCPMOcrForConditionalGeneration",
        minicpm_ocr,
        pack=side_by_side,
        media=packed_image(4, 6),
        num_media_tokens=6,
        before=(IMAGE_START,),
        after=(IMAGE_END,),
        connector=reasons.BY_SIZE,
    ),
    Family(
        "minicpmv4_7",
        "MiniCPMV4_7ForConditionalGeneration",
        minicpmv4_7,
        pack=side_by_side,
        media=packed_image(8, 8),
        num_media_tokens=4,
        before=(IMAGE_START,),
        after=(IMAGE_END,),
        extra=mm_token_types,
        connector=reasons.BY_SIZE,
    ),
    # a padded row differs, and eager from sdpa with padding: the sparse layers' indexer counts blocks from the padding
    # on and lets it compete (with index_topk_blocks=8, all blocks, rows are equal); no gradient in indexers (top-k)
    Family(
        "minimax_m3_vl",
        "MiniMaxM3SparseForConditionalGeneration",
        minimax_m3_vl,
        media=patches(1, 4, 6, 3 * 2 * 4 * 4),
        num_media_tokens=6,
        before=(IMAGE_START,),
        after=(IMAGE_END,),
        connector=reasons.BY_SIZE,
        without={"padding": reasons.UNTUNED_PADDING},
        since="5.23",
    ),
    Family(
        "mistral4",
        "Mistral3ForConditionalGeneration",
        mistral4,
        media=sized_image,
        num_media_tokens=6,
        connector=reasons.BY_SIZE,
    ),
    # position_ids as in generate: forward counts padding, and queries are scaled with their absolute positions;
    # no gradient in the indexers (top-k)
    Family(
        "mistral_large4",
        "MistralLarge4ForConditionalGeneration",
        mistral_large4,
        media=sized_image,
        num_media_tokens=6,
        extra=positions,
        connector=reasons.BY_SIZE,
        without={"checkpointing": reasons.SHARED_KEYS},
    ),
    Family(
        "muse_glimmer",
        "MuseGlimmerForConditionalGeneration",
        muse_glimmer,
        media=patches(1, 4, 6, 2 * 3 * 4 * 4),
        num_media_tokens=6,
        before=(IMAGE_START,),
        after=(IMAGE_END,),
    ),
    # no gradient in the audio tower (no audio here)
    Family(
        "muse_spark",
        "MuseSparkForConditionalGeneration",
        muse_spark,
        media=patches(1, 4, 6, 2 * 3 * 4 * 4),
        num_media_tokens=6,
        before=(IMAGE_START,),
        after=(IMAGE_END,),
    ),
    # no gradient in the vision tower's video_patch_projection (no video here)
    Family(
        "nemotron_h_omni",
        "NemotronH_Omni_Reasoning_V3",
        nemotron_h_omni,
        num_media_tokens=6,
        before=(IMAGE_START,),
        after=(IMAGE_END,),
        media=lambda n: {"pixel_values": seeded(n * 24, 3 * 4 * 4), "image_grid_hw": torch.tensor([[4, 6]] * n)},
        without={"generation": reasons.UNTUNED_CACHE},
    ),
    Family(
        "paddleocr_vl",
        "PaddleOCRVLForConditionalGeneration",
        paddleocr_vl,
        num_media_tokens=6,
        before=(IMAGE_START,),
        after=(IMAGE_END,),
        extra=mm_token_types,
        media=lambda n: {"pixel_values": seeded(n * 24, 3, 4, 4), "image_grid_thw": torch.tensor([[1, 4, 6]] * n)},
        connector=reasons.BY_SIZE,
    ),
    # a flow-matching policy: the loss is that of the actions, logits are velocities; no gradient in the last layer of
    # the vision-language model but for its keys and values, which the action expert attends to
    Family(
        "pi0",
        "PI0ForConditionalGeneration",
        pi0,
        media=robot,
        num_media_tokens=4,
        labels=None,
        generates=False,
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={"textual": reasons.NO_DECODER_FOUND},
        without={"checkpointing": reasons.FAILS},
    ),
    # attention_mask is that of the patches; the decoder's text is in media
    Family(
        "pix2struct",
        "Pix2StructForConditionalGeneration",
        pix2struct,
        media=document,
        text=False,
        labels=None,
        generates=False,
        connector=reasons.CROSS_ATTENTION,
        has_connector=False,
        refused={"textual": reasons.UNKNOWN_ARGUMENTS},
        without={"checkpointing": reasons.NO_CHECKPOINTING},
        since="5.23",
    ),
    # the decoder's text is in media; the encoder has an attention of its own (relative positions, always eager)
    Family(
        "pp_formulanet",
        "PPFormulaNetForConditionalGeneration",
        pp_formulanet,
        media=formula,
        text=False,
        labels=None,
        generates=False,
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={"visual": reasons.GOES_ROUND, "textual": reasons.NO_DECODER_FOUND},
        since="5.23",
    ),
]
