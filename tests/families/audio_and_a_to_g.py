"""Tiny models of families of group d."""

#
# Left out:
# fast_vlm: its vision tower is timm's FastViT (timm_wrapper), and timm is not installed; the rest is a Qwen2.
# evolla reads proteins, not images: its "media" are protein_input_ids (with right padding of their own).
#
# A tiny random model may generate the placeholder id, which a forward pass without a cache then counts as one more
# image ("features and tokens do not match"); where that happened, the media have another seed.
import torch
import transformers as tr

from . import reasons
from .spec import BOS, EOS, MEDIA_TOKEN, PAD, SEES_ALL, VOCAB_SIZE, Family, seeded


IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
TEXT = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=128,
    **IDS,
)
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}  # heads of width 12
START, END = 80, 81  # around an image


def mm_token_types(inputs):
    return {"mm_token_type_ids": (inputs["input_ids"] == MEDIA_TOKEN).long()}


def image_patches(width, seed=3):
    """Per image 4x4 flattened patches, which the models merge two by two."""
    return lambda n: {
        "pixel_values": seeded(16 * n, width, seed=seed),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * n),
    }


# ---------------------------------------------------------------------------------------------------- audio
def qwen2_audio():
    return tr.Qwen2AudioConfig(
        audio_config=tr.Qwen2AudioEncoderConfig(
            d_model=32,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=12,
        ),
        text_config=tr.Qwen2Config(**TEXT),
        audio_token_index=MEDIA_TOKEN,
    )


def qwen2_audio_media(n):
    mask = torch.zeros(n, 24, dtype=torch.long)
    mask[:, :18] = 1  # 9 positions behind the strided convolution, 4 behind the pooling
    return {"input_features": seeded(n, 8, 24), "feature_attention_mask": mask}


def voxtral():
    return tr.VoxtralConfig(
        audio_config=tr.VoxtralEncoderConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_mel_bins=8,
            max_source_positions=12,
        ),  # two positions become one token
        text_config=tr.LlamaConfig(**TEXT, head_dim=12),
        audio_token_id=MEDIA_TOKEN,
    )


def whisper():
    return tr.WhisperConfig(
        vocab_size=VOCAB_SIZE,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=12,
        max_target_positions=64,
        decoder_start_token_id=BOS,
        begin_suppress_tokens=None,
        **IDS,
    )


# --------------------------------------------------------------------------------------------------- images
def blip():
    return tr.BlipConfig(
        vision_config=dict(**VISION, image_size=16, patch_size=8),
        text_config=dict(
            vocab_size=VOCAB_SIZE,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            sep_token_id=EOS,
            **IDS,
        ),
    )


def cohere_compass():
    rope = {"sliding_attention": MROPE, "full_attention": None}  # no rotation in full attention layers
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
        vision_config=dict(**VISION, patch_size=4, num_patches=16),
        text_config=dict(**TEXT, head_dim=12, rope_parameters=MROPE),
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
            **TEXT | {"num_hidden_layers": 3}, head_dim=12, rope_parameters=MROPE | {"mrope_interleaved": True}
        ),
        image_token_id=MEDIA_TOKEN,
        video_token_id=97,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def deepseek_ocr2():
    return tr.DeepseekOcr2Config(
        vision_config={
            "sam_config": {
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 64,
                "patch_size": 8,
                "mlp_ratio": 1.5,
                "window_size": 3,
                "global_attn_indexes": [1],
                "downsample_channels": [24, 32],
            },
            "encoder_config": dict(**VISION, num_key_value_heads=2, max_position_embeddings=512),
        },
        text_config=dict(
            **TEXT | {"max_position_embeddings": 512, "num_key_value_heads": 4},
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            mlp_layer_types=["dense", "sparse"],
        ),
        image_token_id=MEDIA_TOKEN,
    )


def deepseek_vl_hybrid():
    return tr.DeepseekVLHybridConfig(
        vision_config=tr.SiglipVisionConfig(**VISION, image_size=16, patch_size=8, vision_use_head=False),
        high_res_vision_config=tr.SamVisionConfig(
            hidden_size=32,
            output_channels=4,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
            mlp_ratio=1.5,
            window_size=3,
            global_attn_indexes=[1, 2],
        ),
        text_config=tr.LlamaConfig(**TEXT),
        image_token_id=MEDIA_TOKEN,
    )


def diffusion_gemma():
    return tr.DiffusionGemmaConfig(
        vision_config=tr.Gemma4VisionConfig(
            **VISION, num_key_value_heads=4, head_dim=8, patch_size=4, pooling_kernel_size=2, position_embedding_size=8
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
            **VISION,
            patch_size=4,
            moe_intermediate_size=24,
            num_local_experts=4,
            num_experts_per_tok=2,
            mlp_layer_types=["dense", "sparse"],
            adapter_in_dim=32,
            adapter_out_dim=48,
        ),
        audio_config=dict(
            **VISION,
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
        **image_patches(48)(n),
        "input_features": seeded(n, 8, 24, seed=5),
        "chunk_sample_lengths": torch.tensor([48] * n),
    }


def emu3():
    names = {"<image>": MEDIA_TOKEN, "<|extra_200|>": 97}
    names |= {f"<|visual token {number:06d}|>": 80 + number for number in range(16)}
    return tr.Emu3Config(
        vq_config={
            "codebook_size": 16,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [1],
            "hidden_size": 32,
            "temporal_downsample_factor": 2,
        },
        text_config=dict(**TEXT, attention_dropout=0.0),
        vocabulary_map=names,
    )


def evolla():
    protein = {
        "vocab_size": 30,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return tr.EvollaConfig(
        protein_encoder_config=protein,
        **TEXT,
        aligner_ffn_mult=2,
        aligner_num_add_layers=2,
        aligner_attention_probs_dropout_prob=0.0,
        resampler_depth=2,
        resampler_dim_head=8,
        resampler_heads=4,
        resampler_num_latents=6,
        resampler_ff_mult=2,
    )


def evolla_media(n):
    proteins = torch.randint(5, 30, (n, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(n, 9, dtype=torch.long)
    proteins[1:, 7:], mask[1:, 7:] = 1, 0
    return {"protein_input_ids": proteins, "protein_attention_mask": mask}


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


def fuyu():
    text = dict(TEXT)
    del text["num_key_value_heads"]
    return tr.FuyuConfig(
        image_size=16, patch_size=4, image_token_id=MEDIA_TOKEN, text_config=tr.PersimmonConfig(**text)
    )


def gemma4_unified():
    return tr.Gemma4UnifiedConfig(
        vision_config={
            "patch_size": 2,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 32,
            "mm_posemb_size": 4,
            "output_proj_dims": 32,
        },
        text_config=dict(
            **TEXT | {"num_hidden_layers": 4},
            head_dim=12,
            global_head_dim=16,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            num_kv_shared_layers=2,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        image_token_id=MEDIA_TOKEN,
        video_token_id=97,
        audio_token_id=96,
        boi_token_id=START,
        eoi_token_id=END,
    )


def gemma4_unified_image(n):
    """2x2 patches with their (x, y)."""
    positions = torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]]])
    return {"pixel_values": seeded(n, 4, 48).sigmoid(), "image_position_ids": positions.repeat(n, 1, 1)}


def git():
    return tr.GitConfig(
        vision_config=dict(**VISION, image_size=16, patch_size=8),
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **IDS,
    )


# The GLM language models turn half of a head: 3 frequencies of 12-wide heads.
GLM_ROPE = MROPE | {"mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5}
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


def glm_ocr():
    return tr.GlmOcrConfig(vision_config=GLM_VISION, text_config=dict(**TEXT, rope_parameters=MROPE), **GLM_TOKENS)


def granite4_vision():
    return tr.Granite4VisionConfig(
        vision_config=tr.SiglipVisionConfig(
            hidden_size=128,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=4,
            vision_use_head=False,
        ),
        qformer_config={
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 64,
            "cross_attention_frequency": 1,
            "use_qformer_text_input": False,
            "max_position_embeddings": 64,
        },
        text_config=dict(
            **TEXT | {"num_hidden_layers": 6},
            embedding_multiplier=3.0,
            attention_multiplier=0.25,
            residual_multiplier=0.5,
            logits_scaling=2.0,
        ),
        image_token_index=MEDIA_TOKEN,
        vision_feature_select_strategy="full",
        downsample_rate="2/4",
        deepstack_layer_map=[[-3, 0], [-2, 1]],
        spatial_target_layers=[2, 3, 4, 5],
        projector_dropout=0.0,
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32]],
    )


def granite_docling():
    return tr.GraniteDoclingConfig(
        vision_config=dict(
            **VISION | {"num_hidden_layers": 3},
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


FAMILIES = [
    # audio encoders: the sinusoidal positions (embed_positions) are frozen, here and in voxtral and whisper
    Family(
        "qwen2_audio",
        "Qwen2AudioForConditionalGeneration",
        qwen2_audio,
        media=qwen2_audio_media,
        num_media_tokens=4,
        before=(80,),
        after=(81,),
    ),
    Family(
        "voxtral",
        "VoxtralForConditionalGeneration",
        voxtral,
        num_media_tokens=6,
        before=(80,),
        media=lambda n: {"input_features": seeded(n, 8, 24, seed=4)},
    ),
    # generate() returns the new ids only, without decoder_input_ids
    Family(
        "whisper",
        "WhisperForConditionalGeneration",
        whisper,
        text=False,
        media=lambda n: {"input_features": seeded(n, 8, 24)},
        extra=lambda inputs: {
            "decoder_input_ids": torch.tensor([[BOS, 80, 81, 82, 9, 33, 51, 20], [BOS, 80, 81, 82, 64, 17, 5, 70]])
        },
        connector=reasons.CROSS_ATTENTION,
        has_connector=False,
    ),
    # no sdpa in transformers; learned positions count from the first column, padded or not, so a padded row differs;
    # generate() writes BOS into column 0 of input_ids (in place) and drops the last id
    Family(
        "blip",
        "BlipForConditionalGeneration",
        blip,
        media=lambda n: {"pixel_values": seeded(n, 3, 16, 16)},
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={"visual": reasons.GOES_ROUND, "textual": reasons.GOES_ROUND},
        without={"attention": reasons.NO_SDPA, "padding": reasons.UNTUNED_PADDING},
    ),
    Family(
        "cohere_compass",
        "CohereCompassForConditionalGeneration",
        cohere_compass,
        media=image_patches(96),
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
        media=image_patches(48),
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
        media=image_patches(96),
        num_media_tokens=4,
        before=(START,),
        after=(END,),
        extra=mm_token_types,
        connector=4,
    ),
    # 144 learned queries and a separator per image of up to 144 SAM features (query_1024_resolution: for more)
    Family(
        "deepseek_ocr2",
        "DeepseekOcr2ForConditionalGeneration",
        deepseek_ocr2,
        num_media_tokens=145,
        media=lambda n: {"pixel_values": seeded(n, 3, 64, 64), "num_local_patches": torch.zeros(n, dtype=torch.long)},
    ),
    # two vision towers, SigLIP and SAM, side by side in the features of each token
    Family(
        "deepseek_vl_hybrid",
        "DeepseekVLHybridForConditionalGeneration",
        deepseek_vl_hybrid,
        num_media_tokens=4,
        media=lambda n: {"pixel_values": seeded(n, 3, 16, 16), "high_res_pixel_values": seeded(n, 3, 64, 64, seed=5)},
        connector="its connector takes the features of two encoders",
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
    # the image becomes ids (argmin over a codebook), so nothing in vqmodel gets a gradient, and its decoder is unused
    Family(
        "emu3",
        "Emu3ForConditionalGeneration",
        emu3,
        num_media_tokens=20,
        before=(START,),
        after=(END,),
        media=lambda n: {"pixel_values": seeded(n, 3, 8, 8), "image_sizes": torch.tensor([[8, 8]] * n)},
        connector=reasons.NO_VISUAL,
        has_connector=False,
        refused={"visual": reasons.NO_ENCODER_FOUND},
    ),
    # gated cross-attention to the protein's latents behind the layers
    Family(
        "evolla",
        "EvollaForProteinText2Text",
        evolla,
        media=evolla_media,
        connector=reasons.NO_VISUAL,
        has_connector=False,
        refused={"visual": reasons.NO_ENCODER_FOUND},
        without={"checkpointing": reasons.FAILS},
        since="5.23",
    ),
    Family(
        "exaone4_5",
        "Exaone4_5_ForConditionalGeneration",
        exaone4_5,
        media=image_patches(96, seed=4),
        num_media_tokens=4,
        before=(START,),
        after=(END,),
        connector=4,
    ),
    # no vision tower, patches enter by one linear layer; (released inputs have a newline id behind each patch row)
    Family(
        "fuyu",
        "FuyuForCausalLM",
        fuyu,
        media=lambda n: {"pixel_values": seeded(n, 4, 48)},
        num_media_tokens=4,
        after=(END,),
        connector=reasons.NO_VISUAL,
        has_connector=False,
        refused={"visual": reasons.NO_ENCODER_FOUND},
        since="5.23",
    ),
    # no vision tower, patches enter by an embedder; the last two text layers have no keys and values of their own
    Family(
        "gemma4_unified",
        "Gemma4UnifiedForConditionalGeneration",
        gemma4_unified,
        media=gemma4_unified_image,
        num_media_tokens=4,
        before=(START,),
        after=(END,),
        extra=mm_token_types,
        connector=reasons.NO_VISUAL,
        has_connector=False,
        refused={"visual": reasons.NO_ENCODER_FOUND},
        without={"checkpointing": reasons.SHARED_KEYS},
    ),
    # no sdpa in transformers; image features are put in front of the text (logits are longer than input_ids); learned
    # positions count from the first column, padded or not, so a padded row differs (equal at shifted positions)
    Family(
        "git",
        "GitForCausalLM",
        git,
        media=lambda n: {"pixel_values": seeded(n, 3, 16, 16)},
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={"textual": reasons.GOES_ROUND},
        without={
            "attention": reasons.NO_SDPA,
            "checkpointing": reasons.IN_PLACE,
            "padding": reasons.UNTUNED_PADDING,
        },
        since="5.23",
    ),
    Family(
        "glm46v",
        "Glm46VForConditionalGeneration",
        glm46v,
        media=image_patches(96),
        num_media_tokens=4,
        before=(START,),
        after=(END,),
        extra=mm_token_types,
    ),
    Family(
        "glm4v_moe",
        "Glm4vMoeForConditionalGeneration",
        glm4v_moe,
        media=image_patches(96),
        num_media_tokens=4,
        before=(START,),
        after=(END,),
        extra=mm_token_types,
    ),
    # indexers: no gradient and 16 heads, as in dots3_note; linear_attention is Kimi delta attention (reference code)
    Family(
        "glm5_next",
        "Glm5NextForConditionalGeneration",
        glm5_next,
        media=image_patches(96),
        num_media_tokens=4,
        before=(START,),
        after=(END,),
    ),
    Family(
        "glm_ocr",
        "GlmOcrForConditionalGeneration",
        glm_ocr,
        media=image_patches(96),
        num_media_tokens=4,
        before=(START,),
        after=(END,),
        extra=mm_token_types,
    ),
    # image features enter layers 0-5 (placeholders start as zeros), hidden_states skip the tower's post_layernorm;
    # the Q-Former's heads are 64 wide, hence the size;
    # the whole image and one tile of it, 4x4 tokens each, the tile's rows with a newline each
    Family(
        "granite4_vision",
        "Granite4VisionForConditionalGeneration",
        granite4_vision,
        num_media_tokens=36,
        media=lambda n: {"pixel_values": seeded(n, 2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * n)},
        connector=reasons.QFORMER,
        has_connector=False,
        since="5.23",
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
]
