"""An encoder of square images, whose features are tokens of the text."""

import torch
import transformers as tr

from . import reasons
from .parts import (
    AROUND,
    ENCODER,
    END,
    FAKE_TOKEN,
    SECOND_MEDIA_TOKEN,
    SPECIAL,
    START,
    TEXT,
    VISION,
    WRAPPED,
    one_image,
    pixels,
    text_sizes,
    vision,
    vit_sizes,
)
from .spec import MEDIA_TOKEN, PAD, VOCAB_SIZE, Family, seeded


def llama_text(**kwargs):
    return tr.LlamaConfig(**{**TEXT, **kwargs})


def clip_vision(**kwargs):
    return tr.CLIPVisionConfig(**{**VISION, "num_hidden_layers": 3, **kwargs})


def siglip_vision(**kwargs):
    return tr.SiglipVisionConfig(**{**VISION, "vision_use_head": False, **kwargs})


def any_resolution_pixels(n):
    """The whole image and its two crops side by side. Of the 2 x 4 patches of the crops the outer columns are padding
    and dropped again: an image has 4 + 2 * (2 + 1 newline) = 10 tokens."""
    return {"pixel_values": seeded(n, 3, 3, 16, 16), "image_sizes": torch.tensor([[14, 16]] * n)}


def llava():
    return tr.LlavaConfig(vision_config=clip_vision(), text_config=llama_text(), image_token_index=MEDIA_TOKEN)


def llava_next():
    return tr.LlavaNextConfig(
        vision_config=clip_vision(),
        text_config=llama_text(),
        image_token_index=MEDIA_TOKEN,
        image_grid_pinpoints=[[16, 32], [48, 16]],
    )


def llava_onevision():
    return tr.LlavaOnevisionConfig(
        vision_config=siglip_vision(),
        text_config=tr.Qwen2Config(**TEXT),
        image_token_index=MEDIA_TOKEN,
        video_token_index=SECOND_MEDIA_TOKEN,
        image_grid_pinpoints=[[16, 32], [48, 16]],
    )


def llava_next_video():
    return tr.LlavaNextVideoConfig(
        vision_config=clip_vision(patch_size=4),
        text_config=llama_text(),
        image_token_index=SECOND_MEDIA_TOKEN,
        video_token_index=MEDIA_TOKEN,
        image_grid_pinpoints=[[16, 32], [48, 16]],
    )


def vipllava():
    return tr.VipLlavaConfig(
        vision_config=clip_vision(),
        text_config=llama_text(),
        image_token_index=MEDIA_TOKEN,
        vision_feature_layer=(-2, -3, 1),
    )


def video_llava():
    return tr.VideoLlavaConfig(
        vision_config=clip_vision(),
        text_config=llama_text(),
        image_token_index=MEDIA_TOKEN,
        video_token_index=SECOND_MEDIA_TOKEN,
    )


def paligemma():
    """One key-value head and heads wider than hidden_size / num_attention_heads, as in Gemma 2B."""
    return tr.PaliGemmaConfig(
        vision_config=siglip_vision(),
        text_config=tr.GemmaConfig(**{**TEXT, "num_key_value_heads": 1, "head_dim": 16}),
        image_token_index=MEDIA_TOKEN,
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        projection_dim=48,
    )


def colpali():
    return tr.ColPaliConfig(vlm_config=paligemma(), embedding_dim=24)


def paligemma_token_types(inputs):
    """0 for the prompt, inside of which attention is bidirectional, 1 for the last four tokens, the answer."""
    token_type_ids = torch.zeros_like(inputs["input_ids"])
    token_type_ids[:, -4:] = 1
    return {"token_type_ids": token_type_ids}


def gemma3():
    """4 x 4 patches, pooled to 2 x 2 tokens."""
    text = tr.Gemma3TextConfig(
        **{
            **TEXT,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            },
        }
    )
    return tr.Gemma3Config(
        vision_config=siglip_vision(patch_size=4),
        text_config=text,
        mm_tokens_per_image=4,
        image_token_index=MEDIA_TOKEN,
        boi_token_index=95,
        eoi_token_index=94,
    )


def image_token_types(inputs):
    return {"token_type_ids": (inputs["input_ids"] == MEDIA_TOKEN).long()}


GLOBAL_IMAGE_TOKEN = 96  # <global-img> of Idefics 3


def idefics3(config_class=tr.Idefics3Config):
    """4 x 4 patches, 2 x 2 of which make one token."""
    return config_class(
        vision_config={**VISION, "patch_size": 4},
        text_config=llama_text(),
        image_token_id=MEDIA_TOKEN,
        scale_factor=2,
        pad_token_id=PAD,
    )


def smolvlm():
    return idefics3(tr.SmolVLMConfig)


def one_tile(n):
    return {
        "pixel_values": seeded(n, 1, 3, 16, 16),
        "pixel_attention_mask": torch.ones(n, 1, 16, 16, dtype=torch.long),
    }


def internvl():
    return tr.InternVLConfig(
        vision_config=tr.InternVLVisionConfig(**vit_sizes(attention_bias=True)),
        text_config=tr.Qwen2Config(**text_sizes()),
        image_token_id=MEDIA_TOKEN,
        image_seq_length=4,
    )


def llama4():
    # rotary positions and attention within chunks in the first two layers, neither in the third; the first is dense
    return tr.Llama4Config(
        vision_config=tr.Llama4VisionConfig(
            **vit_sizes(
                intermediate_size=128,
                projector_input_dim=40,
                projector_output_dim=40,
                vision_output_dim=40,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            )
        ),
        text_config=tr.Llama4TextConfig(
            **text_sizes(
                num_hidden_layers=3,
                head_dim=12,
                intermediate_size=32,
                intermediate_size_mlp=64,
                no_rope_layers=[1, 1, 0],
                moe_layers=[1, 2],
                num_local_experts=4,
                attention_chunk_size=8,
            )
        ),
        image_token_index=MEDIA_TOKEN,
        boi_token_index=95,
        eoi_token_index=96,
    )


def cohere2(**kwargs):
    return tr.Cohere2Config(
        **text_sizes(layer_types=["sliding_attention", "full_attention"], sliding_window=6, logit_scale=0.25), **kwargs
    )


def aya_vision():
    return tr.AyaVisionConfig(
        vision_config=tr.SiglipVisionConfig(**vit_sizes(vision_use_head=False)),
        text_config=cohere2(),
        image_token_index=MEDIA_TOKEN,
    )


def cohere2_vision():
    return tr.Cohere2VisionConfig(
        vision_config=tr.SiglipVisionConfig(**vit_sizes(vision_use_head=False)),
        text_config=cohere2(),
        image_token_id=MEDIA_TOKEN,
        alignment_intermediate_size=64,
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


def deepseek_vl():
    return tr.DeepseekVLConfig(
        vision_config=tr.SiglipVisionConfig(**ENCODER, image_size=16, patch_size=8, vision_use_head=False),
        text_config=tr.LlamaConfig(**TEXT),
        image_token_id=MEDIA_TOKEN,
    )


OVIS_INDICATORS = (90, 91, 92, 93, 94)  # start, grid, column, row, end


def ovis2():
    return tr.Ovis2Config(
        vision_config=dict(
            **ENCODER, image_size=16, patch_size=4, vocab_size=29, hidden_stride=2, num_visual_indicator_tokens=5
        ),
        text_config=tr.Qwen2Config(**TEXT),
        image_token_id=MEDIA_TOKEN,
        visual_indicator_token_ids=list(OVIS_INDICATORS),
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
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
            "encoder_config": dict(**ENCODER, num_key_value_heads=2, max_position_embeddings=512),
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
        vision_config=tr.SiglipVisionConfig(**ENCODER, image_size=16, patch_size=8, vision_use_head=False),
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


def git():
    return tr.GitConfig(
        vision_config=dict(**ENCODER, image_size=16, patch_size=8),
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SPECIAL,
    )


def qianfan_ocr():
    return tr.QianfanOCRConfig(
        vision_config=tr.QianfanOCRVisionConfig(**vision(patch_size=4)),
        text_config=tr.Qwen3Config(**text_sizes(head_dim=12)),
        image_token_id=MEDIA_TOKEN,
    )


def step3p7():
    return tr.Step3p7Config(
        vision_config=tr.Step3p7VisionConfig(
            hidden_size=32,
            mlp_ratio=1.5,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=4,
            max_position_embeddings=64,
        ),
        text_config=text_sizes(
            num_hidden_layers=3,
            head_dim=12,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            mlp_layer_types=["dense", "sparse", "sparse"],
            sliding_window=5,
            num_sliding_attention_heads=6,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            share_expert_dim=16,
        ),
        image_token_id=MEDIA_TOKEN,
    )


def unlimited_ocr():
    # the window of the text layers only concerns cached generation: it is wider than the generated text here, as the
    # same model without a cache sees everything
    return tr.UnlimitedOcrConfig(
        vision_config={
            "sam_config": {
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": 4,
                "window_size": 3,
                "global_attn_indexes": [1],
                "mlp_dim": 48,
                "downsample_channels": [24, 32],
            },
            "encoder_config": vision(image_size=8, patch_size=4),
        },
        text_config=text_sizes(
            num_key_value_heads=4,
            num_hidden_layers=3,
            mlp_layer_types=["dense", "sparse", "sparse"],
            sliding_window=16,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
        image_token_id=MEDIA_TOKEN,
    )


FAMILIES = [
    # The last vision layer and the vision tower's final norm get no gradient: vision_feature_layer is -2.
    Family("llava", "LlavaForConditionalGeneration", llava, media=pixels, num_media_tokens=4),
    # The same vision parameters as in llava get no gradient.
    Family(
        "llava_next", "LlavaNextForConditionalGeneration", llava_next, media=any_resolution_pixels, num_media_tokens=10
    ),
    # The vision tower's final norm gets no gradient: the last layer's hidden states are taken in front of it.
    Family(
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        llava_onevision,
        media=any_resolution_pixels,
        num_media_tokens=10,
    ),
    # A video of two frames, 4 x 4 patches pooled to 2 x 2. No gradient: as in llava, and image_newline (images only).
    Family(
        "llava_next_video",
        "LlavaNextVideoForConditionalGeneration",
        llava_next_video,
        num_media_tokens=8,
        media=lambda n: {"pixel_values_videos": seeded(n, 2, 3, 16, 16)},
    ),
    # The same vision parameters as in llava get no gradient.
    Family(
        "vipllava",
        "VipLlavaForConditionalGeneration",
        vipllava,
        media=pixels,
        num_media_tokens=4,
        since="5.23",
    ),
    # Two vision towers: one image (4 tokens) and behind it one video of two frames (5 tokens each, CLS is kept).
    # No gradient: as in llava, in both towers.
    Family(
        "video_llava",
        "VideoLlavaForConditionalGeneration",
        video_llava,
        num_media_tokens=4,
        after=(SECOND_MEDIA_TOKEN,) * 10,
        media=lambda n: {**pixels(n), "pixel_values_videos": seeded(n, 2, 3, 16, 16, seed=4)},
        since="5.23",
    ),
    Family(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        paligemma,
        media=pixels,
        num_media_tokens=4,
        extra=paligemma_token_types,
        without={"forcing": reasons.SEES_AHEAD},
    ),
    # Retrieval: an embedding of length 1 for each token.
    Family(
        "colpali",
        "ColPaliForRetrieval",
        colpali,
        media=pixels,
        num_media_tokens=4,
        extra=paligemma_token_types,
        labels=None,
        generates=False,
        without={"checkpointing": reasons.NO_CHECKPOINTING},
    ),
    Family(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        gemma3,
        media=pixels,
        num_media_tokens=4,
        before=(95,),
        after=(94,),
        extra=image_token_types,
        connector=reasons.POOLS,
    ),
    Family(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        idefics3,
        media=one_tile,
        num_media_tokens=4,
        before=(FAKE_TOKEN, GLOBAL_IMAGE_TOKEN),
        after=(FAKE_TOKEN,),
        connector=4,
    ),
    Family(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        smolvlm,
        media=one_tile,
        num_media_tokens=4,
        before=(FAKE_TOKEN, GLOBAL_IMAGE_TOKEN),
        after=(FAKE_TOKEN,),
        connector=4,
    ),
    Family("internvl", "InternVLForConditionalGeneration", internvl, pixels, 4, **WRAPPED),
    Family(
        "llama4",
        "Llama4ForConditionalGeneration",
        llama4,
        pixels,
        4,
        **WRAPPED,
        without={"checkpointing": reasons.BY_KEYWORD},
        fails_in={"5.24.0": reasons.NO_IMAGE_OUTPUTS},
    ),
    # no gradient in vision_tower.post_layernorm: the features are hidden_states[-1], taken before it
    Family(
        "aya_vision",
        "AyaVisionForConditionalGeneration",
        aya_vision,
        pixels,
        4,
        **WRAPPED,
        connector=4,
    ),
    Family(
        "cohere2_vision",
        "Cohere2VisionForConditionalGeneration",
        cohere2_vision,
        pixels,
        4,
        **WRAPPED,
        connector=4,
    ),
    # No gradient in vqmodel and generation_*: they only make images.
    Family("janus", "JanusForConditionalGeneration", janus, pixels, num_media_tokens=4, **AROUND),
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
    # no sdpa in transformers; image features are put in front of the text (logits are longer than input_ids); learned
    # positions count from the first column, padded or not, so a padded row differs (equal at shifted positions)
    Family(
        "git",
        "GitForCausalLM",
        git,
        media=pixels,
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={"textual": reasons.BYPASSES},
        without={
            "attention": reasons.NO_SDPA,
            "checkpointing": reasons.IN_PLACE,
            "padding": reasons.UNTUNED_PADDING,
        },
        since="5.23",
    ),
    # drop path in training mode (vision layers)
    Family(
        "qianfan_ocr",
        "QianfanOCRForConditionalGeneration",
        qianfan_ocr,
        media=pixels,
        num_media_tokens=4,
        before=(START,),
        after=(END,),
    ),
    Family(
        "step3p7",
        "Step3p7ForConditionalGeneration",
        step3p7,
        media=one_image(32),
        num_media_tokens=4,
        before=(START,),
        after=(END,),
    ),
    # SAM attention: relative position bias, no ALL_ATTENTION_FUNCTIONS, an own class for sdpa chosen when the model is
    # made
    Family(
        "unlimited_ocr",
        "UnlimitedOcrForConditionalGeneration",
        unlimited_ocr,
        media=one_image(32),
        num_media_tokens=7,
    ),
]
