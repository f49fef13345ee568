"""Patches of images of any size, often of several images in one sequence."""

import torch
import transformers as tr

from . import reasons
from .parts import (
    ENCODER,
    END,
    SECOND_MEDIA_TOKEN,
    START,
    TEXT,
    VIDEO,
    mm_token_types,
    patches,
    positions,
    qwen_images,
    text_sizes,
    vit_sizes,
)
from .spec import MEDIA_TOKEN, PAD, SEES_ALL, VOCAB_SIZE, Family, seeded


GEMMA4_AUDIO_TOKEN = 96
GEMMA4_TEXT = {**TEXT, "head_dim": 8, "global_head_dim": 16, "sliding_window": 6}
GEMMA4_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}
GEMMA4_TOKENS = {
    "image_token_id": MEDIA_TOKEN,
    "video_token_id": SECOND_MEDIA_TOKEN,
    "audio_token_id": GEMMA4_AUDIO_TOKEN,
    "boi_token_id": 95,
    "eoi_token_id": 94,
    "boa_token_id": 93,
    "eoa_token_index": 92,
}


def gemma4(audio=False):
    """As E2B: the last two layers use the keys and values of the first two and have a wider MLP, embeddings per
    layer."""
    text = tr.Gemma4TextConfig(
        **{
            **GEMMA4_TEXT,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
        }
    )
    audio_config = tr.Gemma4AudioConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        subsampling_conv_channels=[128, 4],
        attention_chunk_size=2,
        attention_context_left=3,
        output_proj_dims=24,
    )
    return tr.Gemma4Config(
        vision_config=tr.Gemma4VisionConfig(**GEMMA4_VISION, use_clipped_linears=True),
        text_config=text,
        audio_config=audio_config if audio else None,
        **GEMMA4_TOKENS,
    )


def gemma4_moe():
    """As 26B-A4B: experts, keys that are the values too in the full attention layers, image tokens that see each other
    in the sliding ones."""
    text = tr.Gemma4TextConfig(
        **{
            **GEMMA4_TEXT,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "use_bidirectional_attention": "vision",
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        }
    )
    vision = tr.Gemma4VisionConfig(**GEMMA4_VISION, standardize=True)
    return tr.Gemma4Config(vision_config=vision, text_config=text, **GEMMA4_TOKENS)


def gemma4_pixels(n):
    """4 x 4 patches, pooled to 2 x 2 tokens, and 8 patches of padding."""
    positions = torch.full((n, 24, 2), -1)
    positions[:, :16] = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
    values = seeded(n, 24, 48).sigmoid()
    values[:, 16:] = 0
    return {"pixel_values": values, "image_position_ids": positions}


def gemma4_pixels_and_audio(n):
    """16 frames of audio make 4 tokens; the last 4 of 20 are padding."""
    mask = torch.ones(n, 20, dtype=torch.bool)
    mask[:, 16:] = False
    features = seeded(n, 20, 128, seed=4) * mask[..., None]
    return {**gemma4_pixels(n), "input_features": features, "input_features_mask": mask}


def gemma4_token_types(inputs):
    ids = inputs["input_ids"]
    return {"mm_token_type_ids": (ids == MEDIA_TOKEN).long() + 3 * (ids == GEMMA4_AUDIO_TOKEN).long()}


def mistral3():
    return tr.Mistral3Config(
        vision_config=tr.PixtralVisionConfig(**vit_sizes(image_size=24)),
        text_config=tr.MistralConfig(**text_sizes(head_dim=16, sliding_window=None)),
        image_token_index=MEDIA_TOKEN,
    )


def padded_images(number):
    """Images of 16x24 padded to 24x24."""
    return {"pixel_values": seeded(number, 3, 24, 24), "image_sizes": torch.tensor([[16, 24]] * number)}


def diffusion_gemma():
    return tr.DiffusionGemmaConfig(
        vision_config=tr.Gemma4VisionConfig(
            **ENCODER,
            num_key_value_heads=4,
            head_dim=8,
            patch_size=4,
            pooling_kernel_size=2,
            position_embedding_size=8,
        ),
        text_config=dict(
            **TEXT | {"num_hidden_layers": 3},
            head_dim=12,
            global_head_dim=16,
            num_global_key_value_heads=1,
            sliding_window=8,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=32,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            use_bidirectional_attention="vision",
        ),
        image_token_id=MEDIA_TOKEN,
        boi_token_id=START,
        eoi_token_id=END,
        canvas_length=6,
    )


def gemma4_image(n):
    """4x4 patches with their (x, y), pooled two by two."""
    positions = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), dim=-1).reshape(1, 16, 2)
    return {"pixel_values": seeded(n, 16, 48).sigmoid(), "image_position_ids": positions.repeat(n, 1, 1)}


def diffusion_gemma_extra(inputs):
    canvas = torch.tensor([[9, 33, 51, 20, 44, 7], [64, 17, 5, 70, 21, 30]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(canvas)], dim=1)
    return {
        **mm_token_types(inputs),
        "decoder_input_ids": canvas,
        "decoder_attention_mask": mask,
        "self_conditioning_logits": seeded(2, 6, VOCAB_SIZE),
    }


def dots3_note():
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "head_dim": 12,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    text = TEXT | heads | {f"swa_{name}": value for name, value in heads.items()}
    return tr.Dots3NoteConfig(
        vision_config=dict(
            **ENCODER,
            patch_size=4,
            moe_intermediate_size=24,
            num_local_experts=4,
            num_experts_per_tok=2,
            mlp_layer_types=["dense", "sparse"],
            adapter_in_dim=32,
            adapter_out_dim=48,
        ),
        audio_config=dict(
            **ENCODER,
            feature_size=8,
            hop_length=2,
            downsample_hidden_size=8,
            max_position_embeddings=16,
            whisper_adapter_in_dim=32,
            whisper_adapter_out_dim=48,
        ),
        text_config=text
        | {
            "num_hidden_layers": 3,
            "qk_rope_head_dim": 4,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "index_topk": SEES_ALL,
            "index_head_dim": 8,
            "index_n_heads": 16,
            "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        image_token_id=MEDIA_TOKEN,
        video_token_id=96,
        audio_token_id=97,
    )


def dots3_note_media(n):
    """An image and 24 frames of sound, which become 3 tokens."""
    return {
        **patches(1, 4, 4, 48)(n),
        "input_features": seeded(n, 8, 24, seed=5),
        "chunk_sample_lengths": torch.tensor([48] * n),
    }


def exaone4_5():
    return tr.Exaone4_5_Config(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "num_key_value_heads": 2,
            "patch_size": 4,
            "window_size": 8,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 48,
        },
        text_config=tr.Exaone4Config(
            **TEXT | {"num_hidden_layers": 3},
            sliding_window=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        image_token_id=MEDIA_TOKEN,
        video_token_id=97,
    )


def granite_docling():
    return tr.GraniteDoclingConfig(
        vision_config=dict(
            **ENCODER | {"num_hidden_layers": 3},
            image_size=16,
            patch_size=4,
            out_hidden_size=48,
            scale_factor=2,
            deepstack_visual_indexes=[0, 1],
            use_fine_route=False,
        ),
        text_config=dict(
            **TEXT | {"num_hidden_layers": 3},
            embedding_multiplier=3.0,
            attention_multiplier=0.25,
            residual_multiplier=0.5,
            logits_scaling=2.0,
        ),
        image_token_id=MEDIA_TOKEN,
        pad_token_id=PAD,
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
        video_token_id=97,
    )


def kimi_k25():
    return tr.Kimi_K25Config(
        vision_config=tr.Kimi_K25VisionConfig(
            **ENCODER, patch_size=4, pos_emb_height=6, pos_emb_width=6, pos_emb_time=2
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
        video_token_id=97,
        vision_start_token_id=96,
        vision_end_token_id=95,
        tie_word_embeddings=False,
    )


def pixtral():
    return tr.PixtralVisionConfig(**ENCODER, patch_size=4, image_size=32, hidden_act="silu")


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


def minimax_m3_vl():
    return tr.MiniMaxM3VLConfig(
        vision_config=tr.MiniMaxM3VLVisionConfig(**{**ENCODER, "hidden_size": 48}, patch_size=4, image_size=32),
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
        video_token_index=97,
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


MUSE_VISION = dict(
    ENCODER,
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
        video_token_id=97,
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
        video_token_id=97,
        audio_token_id=94,
        out_hidden_size=128,
        projector_hidden_size=40,
    )


def video_llama_3():
    return tr.VideoLlama3Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_size": 4,
        },
        text_config=dict(model_type="qwen2", **text_sizes()),
        image_token_id=MEDIA_TOKEN,
        video_token_id=VIDEO,
    )


def merged_patches(n):
    return {
        "pixel_values": seeded(n * 24, 3 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 6]] * n),
        "image_merge_sizes": torch.tensor([2] * n),
    }


FAMILIES = [
    Family(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        gemma4,
        media=gemma4_pixels,
        num_media_tokens=4,
        before=(95,),
        after=(94,),
        extra=gemma4_token_types,
        without={"checkpointing": reasons.SHARED_KEYS},
    ),
    # The same with an audio tower: an image and behind it 4 audio tokens. Eager only: the audio tower refuses sdpa.
    Family(
        "gemma4_audio",
        "Gemma4ForConditionalGeneration",
        lambda: gemma4(audio=True),
        num_media_tokens=4,
        media=gemma4_pixels_and_audio,
        before=(95,),
        after=(94, 93, *[GEMMA4_AUDIO_TOKEN] * 4, 92),
        extra=gemma4_token_types,
        without={
            "attention": reasons.NO_SDPA,
            "checkpointing": reasons.SHARED_KEYS,
        },
    ),
    Family(
        "gemma4_moe",
        "Gemma4ForConditionalGeneration",
        gemma4_moe,
        media=gemma4_pixels,
        num_media_tokens=4,
        before=(95,),
        after=(94,),
        extra=gemma4_token_types,
    ),
    # the row-break tokens its processor puts between rows of placeholders are left out (placeholders in one run)
    Family(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        mistral3,
        padded_images,
        6,
        after=(96,),
        connector=reasons.BY_SIZE,
    ),
    # logits are those of the canvas (decoder_input_ids); encoder and decoder layers share their weights; forward
    # builds the mask with bidirectional images but does not use it; a row alone needs
    # decoder_attention_mask[:, padding:], not cut by sample(), and is then equal to the padded row; generate() is of
    # its own (block diffusion)
    Family(
        "diffusion_gemma",
        "DiffusionGemmaForBlockDiffusion",
        diffusion_gemma,
        media=gemma4_image,
        num_media_tokens=4,
        before=(START,),
        after=(END,),
        extra=diffusion_gemma_extra,
        labels=None,
        generates=False,
        without={
            "checkpointing": reasons.FAILS,
            "exact": reasons.OTHER_KEYS,
            "padding": reasons.COUNTS_PADDING,
        },
    ),
    # the indexers (top-k choice of keys) get no gradient; with few index heads their scores tie at 0 (relu) and ties
    # break by column, so that a padded row differs: 16 heads
    Family(
        "dots3_note",
        "Dots3NoteForConditionalGeneration",
        dots3_note,
        media=dots3_note_media,
        num_media_tokens=4,
        before=(START,),
        after=(END, 82, 97, 97, 97, 83),
        connector=4,
    ),
    Family(
        "exaone4_5",
        "Exaone4_5_ForConditionalGeneration",
        exaone4_5,
        media=patches(1, 4, 4, 96, seed=4),
        num_media_tokens=4,
        before=(START,),
        after=(END,),
        connector=4,
    ),
    # two tiles of 2x2 tokens; without the connector's second, finer route, which has no gradient unless it is taken
    Family(
        "granite_docling",
        "GraniteDoclingForConditionalGeneration",
        granite_docling,
        num_media_tokens=8,
        media=lambda n: {
            "pixel_values": seeded(n, 2, 3, 16, 16),
            "pixel_attention_mask": torch.ones(n, 2, dtype=torch.bool),
        },
        connector=reasons.BY_SIZE,
    ),
    Family(
        "hyperclovax_vision_v2",
        "HyperCLOVAXVisionV2ForConditionalGeneration",
        hyperclovax_vision_v2,
        media=qwen_images,
        num_media_tokens=6,
        before=(96,),
        after=(95,),
        connector=reasons.BY_SIZE,
    ),
    Family(
        "kimi_k25",
        "Kimi_K25ForConditionalGeneration",
        kimi_k25,
        num_media_tokens=4,
        before=(96,),
        after=(95,),
        media=lambda n: {"pixel_values": seeded(n * 16, 3, 4, 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * n)},
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
    # a padded row differs, and eager from sdpa with padding: the sparse layers' indexer counts blocks from the padding
    # on and lets it compete (with index_topk_blocks=8, all blocks, rows are equal); no gradient in indexers (top-k)
    Family(
        "minimax_m3_vl",
        "MiniMaxM3SparseForConditionalGeneration",
        minimax_m3_vl,
        media=qwen_images,
        num_media_tokens=6,
        before=(96,),
        after=(95,),
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
        before=(96,),
        after=(95,),
    ),
    # no gradient in the audio tower (no audio here)
    Family(
        "muse_spark",
        "MuseSparkForConditionalGeneration",
        muse_spark,
        media=patches(1, 4, 6, 2 * 3 * 4 * 4),
        num_media_tokens=6,
        before=(96,),
        after=(95,),
    ),
    Family(
        "video_llama_3",
        "VideoLlama3ForConditionalGeneration",
        video_llama_3,
        media=merged_patches,
        num_media_tokens=6,
    ),
]
