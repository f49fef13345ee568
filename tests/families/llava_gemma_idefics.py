"""Tiny models of the Llava, Gemma and Idefics families.

gemma3n as released cannot be built here: its vision tower (MobileNetV5) is a timm model and timm is not installed. Its
entry has a small convolutional stand-in for that tower, everything else is the family's own.
"""

import torch
import transformers as tr
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from . import reasons
from .spec import BOS, EOS, MEDIA_TOKEN, PAD, VOCAB_SIZE, Family, seeded


SECOND_MEDIA_TOKEN = 97  # the video placeholder where MEDIA_TOKEN is the image's, and the other way round

TEXT_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
VISION_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def llama_text(**kwargs):
    return tr.LlamaConfig(**{**TEXT_SIZES, **kwargs})


def clip_vision(**kwargs):
    return tr.CLIPVisionConfig(**{**VISION_SIZES, "num_hidden_layers": 3, **kwargs})


def siglip_vision(**kwargs):
    return tr.SiglipVisionConfig(**{**VISION_SIZES, "vision_use_head": False, **kwargs})


def pixels(n):
    return {"pixel_values": seeded(n, 3, 16, 16)}


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
        text_config=tr.Qwen2Config(**TEXT_SIZES),
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
        text_config=tr.GemmaConfig(**{**TEXT_SIZES, "num_key_value_heads": 1, "head_dim": 16}),
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
            **TEXT_SIZES,
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


class ConvVisionConfig(tr.Gemma3nVisionConfig):
    model_type = "gemma3n_vision_stand_in"


class ConvVision(tr.PreTrainedModel):
    """In place of timm's MobileNetV5: 16 x 16 pixels to a map of 2 x 2 positions with hidden_size channels."""

    config_class = ConvVisionConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.stem = nn.Conv2d(3, 16, kernel_size=4, stride=4)
        self.head = nn.Conv2d(16, config.hidden_size, kernel_size=2, stride=2)
        self.post_init()

    def forward(self, pixel_values, do_pooling=False, return_dict=True, **kwargs):
        return BaseModelOutputWithPooling(last_hidden_state=self.head(nn.functional.gelu(self.stem(pixel_values))))


tr.AutoModel.register(ConvVisionConfig, ConvVision)

# The ids of gemma3n: text and the tokens in front of media (88, 89), then those embedded by embed_vision (90 to 93),
# then those embedded by embed_audio (94 to 98).
GEMMA3N_IMAGE_TOKEN, GEMMA3N_AUDIO_TOKEN = 91, 95


def gemma3n():
    """The last two layers use the keys and values of the first two; a text layer's hidden states are of shape
    (altup_num_inputs, batch, length, hidden_size)."""
    text = tr.Gemma3nTextConfig(
        **{
            **TEXT_SIZES,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "head_dim": 12,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.8, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 90,
            "altup_num_inputs": 3,
            "laurel_rank": 8,
        }
    )
    audio = tr.Gemma3nAudioConfig(
        vocab_size=5,
        vocab_offset=94,
        input_feat_size=16,
        hidden_size=32,
        conf_attention_chunk_size=2,
        conf_attention_context_left=3,
        conf_num_attention_heads=4,
        conf_num_hidden_layers=2,
        conf_reduction_factor=2,
        sscp_conv_channel_size=(8, 4),
    )
    return tr.Gemma3nConfig(
        text_config=text,
        vision_config=ConvVisionConfig(hidden_size=32, vocab_size=4, vocab_offset=90),
        audio_config=audio,
        vision_soft_tokens_per_image=4,
        audio_soft_tokens_per_image=5,
        boi_token_id=88,
        eoi_token_id=90,
        image_token_id=GEMMA3N_IMAGE_TOKEN,
        boa_token_id=89,
        eoa_token_id=94,
        audio_token_id=GEMMA3N_AUDIO_TOKEN,
    )


def gemma3n_pixels_and_audio(n):
    """32 frames of audio make 4 tokens, the last of which is padding; one more is added by the model."""
    mask = torch.ones(n, 32, dtype=torch.bool)
    mask[:, 24:] = False
    return {**pixels(n), "input_features": seeded(n, 32, 16, seed=4) * mask[..., None], "input_features_mask": mask}


def gemma3n_token_types(inputs):
    ids = inputs["input_ids"]
    return {"token_type_ids": (ids == GEMMA3N_IMAGE_TOKEN).long() + 3 * (ids == GEMMA3N_AUDIO_TOKEN).long()}


GEMMA4_AUDIO_TOKEN = 96
GEMMA4_TEXT = {**TEXT_SIZES, "head_dim": 8, "global_head_dim": 16, "sliding_window": 6}
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


FAKE_TOKEN = 97  # <fake_token_around_image> of the Idefics families
GLOBAL_IMAGE_TOKEN = 96  # <global-img> of Idefics 3


def idefics():
    """Images are read by cross-attention in front of the layers 0 and 2. The released models freeze their text and
    vision layers, these are left trainable."""
    return tr.IdeficsConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        cross_layer_interval=2,
        alpha_type="vector",
        qk_layer_norms=True,
        use_resampler=True,
        freeze_text_layers=False,
        freeze_vision_layers=False,
        vision_config={
            "embed_dim": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 3,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "qk_layer_norms_perceiver": True,
        },
    )


def idefics_image_mask(inputs):
    """The text sees the image from the image token on."""
    return {"image_attention_mask": (inputs["input_ids"] == MEDIA_TOKEN).cumsum(1)[..., None]}


def idefics2():
    return tr.Idefics2Config(
        vision_config={**VISION_SIZES, "patch_size": 4},
        perceiver_config={
            "hidden_size": 48,
            "resampler_n_latents": 4,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 12,
            "num_key_value_heads": 2,
        },
        text_config=tr.MistralConfig(**TEXT_SIZES, sliding_window=12),
        image_token_id=MEDIA_TOKEN,
    )


def pixels_with_margin(n):
    """An image of 16 x 12 pixels, padded to 16 x 16."""
    mask = torch.ones(n, 1, 16, 16, dtype=torch.long)
    mask[..., 12:] = 0
    return {"pixel_values": seeded(n, 1, 3, 16, 16) * mask[:, :, None], "pixel_attention_mask": mask}


def idefics3(config_class=tr.Idefics3Config):
    """4 x 4 patches, 2 x 2 of which make one token."""
    return config_class(
        vision_config={**VISION_SIZES, "patch_size": 4},
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
    # Cannot be reloaded from a saved folder: reading the config makes a tr.Gemma3nVisionConfig, which asks for timm.
    Family(
        "gemma3n",
        "Gemma3nForConditionalGeneration",
        gemma3n,
        media=gemma3n_pixels_and_audio,
        num_media_tokens=4,
        media_token=GEMMA3N_IMAGE_TOKEN,
        before=(88,),
        after=(90, 89, *[GEMMA3N_AUDIO_TOKEN] * 5, 94),
        extra=gemma3n_token_types,
        connector=reasons.NO_VISUAL,
        has_connector=False,
        refused={"visual": reasons.NO_SELF_ATTENTION},
        without={"checkpointing": reasons.SHARED_KEYS},
    ),
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
    # No additional_vocab_size, though the released models have 2: the model's loss then fails (it views the logits as
    # vocab_size wide). The vision tower's final norm gets no gradient: it is only for the unused pooled output.
    Family(
        "idefics",
        "IdeficsForVisionText2Text",
        idefics,
        num_media_tokens=1,
        before=(FAKE_TOKEN,),
        after=(FAKE_TOKEN,),
        media=lambda n: {"pixel_values": seeded(n, 1, 3, 16, 16)},
        extra=idefics_image_mask,
        connector=reasons.RESAMPLER_BETWEEN,
        has_connector=False,
        since="5.23",
    ),
    Family(
        "idefics2",
        "Idefics2ForConditionalGeneration",
        idefics2,
        media=pixels_with_margin,
        num_media_tokens=4,
        before=(FAKE_TOKEN,),
        after=(FAKE_TOKEN,),
        connector=reasons.RESAMPLER,
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
]
