"""Group f: tiny models of families from qianfan_ocr to dinov3_vit (see the comments above the entries for quirks)."""

import torch
import transformers as tr

from . import reasons
from .spec import BOS, EOS, MEDIA_TOKEN, PAD, VOCAB_SIZE, Family, seeded


START, END, VIDEO, AUDIO = 80, 81, 83, 90  # special tokens around and beside the image placeholder
# Placeholder where the untuned tiny model would generate MEDIA_TOKEN. A generated placeholder makes generation fail
# without a cache (placeholders and features no longer match): the ids here only keep the untuned models from it.
IMAGE = 97
SPECIAL = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def text(**kwargs):
    """What the language models share."""
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    return {**sizes, **SPECIAL, **kwargs}


def vision(**kwargs):
    """What the vision towers share: 2 x 2 patches of 8 pixels unless told otherwise."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    }
    return {**sizes, **kwargs}


def one_image(size=16):
    return lambda n: {"pixel_values": seeded(n, 3, size, size)}


def image_token_types(inputs):
    return {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def qianfan_ocr():
    return tr.QianfanOCRConfig(
        vision_config=tr.QianfanOCRVisionConfig(**vision(patch_size=4)),
        text_config=tr.Qwen3Config(**text(head_dim=12)),
        image_token_id=MEDIA_TOKEN,
    )


# --- the later Qwen models: one image of 4 x 4 patches, merged 2 x 2 ---


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
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
QWEN_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def mrope(*sections, theta=10000.0, **kwargs):
    return {
        "rope_type": "default",
        "rope_theta": theta,
        "mrope_section": list(sections),
        "mrope_interleaved": True,
        **kwargs,
    }


def patch_rows(n):
    """Images of 4 x 4 patches of 4 pixels in the flattened form of the Qwen2-VL processor (two equal frames)."""
    return {"pixel_values": seeded(n * 16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * n)}


def qwen_family(
    name,
    model_class,
    config,
    media=patch_rows,
    before=(START,),
    after=(END,),
    extra=image_token_types,
    connector=4,
    **kwargs,
):
    return Family(
        name,
        model_class,
        config,
        media=media,
        num_media_tokens=4,
        media_token=IMAGE,
        before=before,
        after=after,
        extra=extra,
        connector=connector,
        **kwargs,
    )


def qwen3_5_moe():
    hybrid = text(
        **QWEN_MOE,
        **QWEN_LINEAR,
        shared_expert_intermediate_size=16,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        rope_parameters=mrope(2, 1, 1, partial_rotary_factor=0.5),
    )
    del hybrid["intermediate_size"]
    return tr.Qwen3_5MoeConfig(text_config=hybrid, vision_config=qwen_vision(), **QWEN_TOKENS)


def qwen3_omni_moe_thinker():
    return tr.Qwen3OmniMoeThinkerConfig(
        text_config=text(**QWEN_MOE, num_hidden_layers=3, mlp_only_layers=[1], rope_parameters=mrope(2, 2, 2)),
        vision_config=qwen_vision(depth=3, deepstack_visual_indexes=[0, 1]),
        audio_config={
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "d_model": 32,
            "output_dim": 48,
            "downsample_hidden_size": 8,
            "max_source_positions": 64,
        },
        **QWEN_TOKENS,
        audio_token_id=AUDIO,
        audio_start_token_id=84,
    )


def image_and_audio(n):
    return {
        **patch_rows(n),
        "input_features": seeded(n, 16, 30, seed=4),
        "feature_attention_mask": torch.ones(n, 30, dtype=torch.long),
    }


def qwen3_vl_moe():
    return tr.Qwen3VLMoeConfig(
        text_config=text(**QWEN_MOE, num_hidden_layers=3, mlp_only_layers=[1], rope_parameters=mrope(2, 2, 2)),
        vision_config=qwen_vision(depth=3, deepstack_visual_indexes=[0, 1]),
        **QWEN_TOKENS,
    )


def qwen4_exp():
    hybrid = text(
        **QWEN_MOE,
        **QWEN_LINEAR,
        shared_expert_intermediate_size=16,
        head_dim=16,
        num_hidden_layers=3,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        rope_parameters=mrope(2, 1, 1, partial_rotary_factor=0.5),
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
        text_config=text(
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


# --- encoder-decoder models: image and text in the encoder, another text in the decoder ---


def decoder_text(inputs):
    """As long as the encoder's text and padded alike."""
    words = 3 + inputs["input_ids"] * 7 % 77
    return {
        "decoder_input_ids": torch.where(inputs["attention_mask"] == 1, words, PAD),
        "decoder_attention_mask": inputs["attention_mask"].clone(),
    }


def short_decoder_text(inputs):
    """Five words without padding, of which `sample` cuts nothing off."""
    return {"decoder_input_ids": 3 + inputs["input_ids"][:, -5:] * 7 % 77}


def text_positions(inputs):
    return {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def t5gemma2():
    decoder = text(
        num_hidden_layers=2,
        head_dim=12,
        query_pre_attn_scalar=12,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    )
    encoder = {
        "text_config": dict(decoder),
        "vision_config": dict(model_type="siglip_vision_model", **vision(image_size=32)),
        "mm_tokens_per_image": 4,
        "boi_token_index": START,
        "eoi_token_index": END,
        "image_token_index": MEDIA_TOKEN,
    }
    return tr.T5Gemma2Config(encoder=encoder, decoder=decoder, image_token_index=MEDIA_TOKEN)


def udop():
    return tr.UdopConfig(
        vocab_size=VOCAB_SIZE,
        d_model=48,
        d_kv=12,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        image_size=16,
        patch_size=4,
        max_2d_position_embeddings=64,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )


def boxes_and_decoder_text(inputs):
    """A box for every word along a diagonal of the page; none for padding and the first token."""
    place = inputs["attention_mask"].cumsum(1) - 1
    corner = (place * 3 % 10 / 12.0)[..., None] * torch.tensor([1.0, 0.7, 1.0, 0.7])
    box = corner + torch.tensor([0.0, 0.0, 0.2, 0.1])
    return {"bbox": torch.where(place[..., None] > 0, box, 0.0), **decoder_text(inputs)}


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
        text_config=text(
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


def video_llama_3():
    return tr.VideoLlama3Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_size": 4,
        },
        text_config=dict(model_type="qwen2", **text()),
        image_token_id=MEDIA_TOKEN,
        video_token_id=VIDEO,
    )


def merged_patches(n):
    return {
        "pixel_values": seeded(n * 24, 3 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 6]] * n),
        "image_merge_sizes": torch.tensor([2] * n),
    }


def phi4_multimodal():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0] * 6,
        "long_factor": [1.5] * 6,
    }
    return tr.Phi4MultimodalConfig(
        **text(hidden_size=64),
        original_max_position_embeddings=64,
        rope_parameters=rope,
        vision_config=dict(**vision(num_hidden_layers=3, patch_size=4), crop_size=16, image_token_id=MEDIA_TOKEN),
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 2,
            "num_attention_heads": 4,
            "input_size": 16,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 8,
            "bias_max_distance": 16,
            "audio_token_id": AUDIO,
        },
    )


def crops_and_audio(n):
    """The whole image, one crop of it that is padding below the middle, and an audio of 24 frames (3 tokens)."""
    patches = torch.ones(n, 2, 4, 4)
    patches[:, 1, 2:] = 0
    return {
        "image_pixel_values": seeded(n, 2, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16]] * n),
        "image_attention_mask": patches,
        "audio_input_features": seeded(n, 24, 16, seed=4),
        "audio_embed_sizes": torch.tensor([3] * n),
        "audio_attention_mask": torch.ones(n, 24, dtype=torch.bool),
    }


# --- audio and text ---


def granite_speech():
    return tr.GraniteSpeechConfig(
        text_config=dict(model_type="granite", **text()),
        encoder_config={
            "input_dim": 16,
            "num_layers": 2,
            "hidden_dim": 32,
            "feedforward_mult": 2,
            "num_heads": 4,
            "output_dim": 12,
            "context_size": 5,
            "max_pos_emb": 8,
            "conv_kernel_size": 3,
        },
        projector_config={
            "model_type": "blip_2_qformer",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "encoder_hidden_size": 32,
            "cross_attention_frequency": 1,
            "vocab_size": VOCAB_SIZE,
        },
        audio_token_index=IMAGE,
        downsample_rate=2,
        window_size=4,
        has_lora_adapter=False,
    )


def glmasr():
    return tr.GlmAsrConfig(
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_mel_bins": 16,
            "max_position_embeddings": 64,
        },
        text_config=dict(model_type="llama", **text(head_dim=12)),
        audio_token_id=MEDIA_TOKEN,
    )


def mel_with_mask(n):
    return {"input_features": seeded(n, 16, 32), "input_features_mask": torch.ones(n, 32, dtype=torch.long)}


def padded_mel(n):
    """The chunk of 100 frames on which the family insists, 32 of them an audio (4 tokens)."""
    mask = torch.zeros(n, 100, dtype=torch.long)
    mask[:, :32] = 1
    return {"input_features": seeded(n, 16, 100) * mask[:, None], "input_features_mask": mask}


def qwen3_asr():
    return tr.Qwen3ASRConfig(
        audio_config={
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "d_model": 32,
            "output_dim": 48,
            "downsample_hidden_size": 8,
        },
        text_config=dict(model_type="qwen3", **text(head_dim=12)),
        audio_token_id=MEDIA_TOKEN,
        timestamp_token_id=VIDEO,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )


def voxtral_realtime():
    return tr.VoxtralRealtimeConfig(
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "head_dim": 8,
            "num_mel_bins": 16,
            "max_position_embeddings": 128,
            "sliding_window": 6,
        },
        text_config=dict(model_type="voxtral_realtime_text", **text(head_dim=12, sliding_window=6)),
    )


def without_padding(inputs):
    """Fills the padding with words, for models in which padding cannot stand on the left."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    words = 3 + torch.arange(ids.shape[1]) * 5 % 77
    ids = torch.where(mask == 1, ids, words)
    ids[:, 0] = BOS
    return {"input_ids": ids, "attention_mask": torch.ones_like(mask)}


# --- dual encoders: their text towers read the first token, so that padding cannot stand on the left ---


def altclip():
    return tr.AltCLIPConfig(text_config=clip_text(project_dim=24), vision_config=vision(), projection_dim=24)


def clip_text(**kwargs):
    """Text towers have no grouped heads."""
    shared = text(hidden_size=32, intermediate_size=48, **kwargs)
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


def blip():
    return tr.BlipConfig(
        text_config=clip_text(is_decoder=False), vision_config=vision(), projection_dim=24, image_text_hidden_size=24
    )


# --- classifiers ---


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
    # drop path in training mode (vision layers)
    Family(
        "qianfan_ocr",
        "QianfanOCRForConditionalGeneration",
        qianfan_ocr,
        media=one_image(),
        num_media_tokens=4,
        before=(START,),
        after=(END,),
    ),
    qwen_family("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", qwen3_5_moe),
    # an image and an audio in every sample
    qwen_family(
        "qwen3_omni_moe_thinker",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        qwen3_omni_moe_thinker,
        media=image_and_audio,
        before=(84, AUDIO, AUDIO, AUDIO, AUDIO, 85, START),
        extra=lambda inputs: {},
        since="5.23",
    ),
    qwen_family("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", qwen3_vl_moe),
    # the indexer of full attention chooses tokens by top-k: its parameters never get gradients; no flash attention
    qwen_family(
        "qwen4_exp",
        "Qwen4ExpForConditionalGeneration",
        qwen4_exp,
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={"textual": reasons.NOT_BEHIND_NORM},
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
    # The decoder's queries meet rotated keys of its own and unrotated keys of the encoder in one attention, so its
    # absolute positions matter: no padding on the left in the decoder, hence a length other than input_ids' and no
    # labels. Without gradient: the pooling head of SigLIP, which is not read.
    Family(
        "t5gemma2",
        "T5Gemma2ForConditionalGeneration",
        t5gemma2,
        media=one_image(32),
        num_media_tokens=4,
        before=(START,),
        after=(END,),
        extra=short_decoder_text,
        labels=None,
        connector=reasons.POOLS,
        refused={"textual": reasons.NO_SELF_ATTENTION},
    ),
    # without gradient: the decoder's patch embedding and 2D position biases, which a decoder never uses; dropout 0.1
    Family(
        "udop",
        "UdopForConditionalGeneration",
        udop,
        media=one_image(),
        extra=boxes_and_decoder_text,
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={"visual": reasons.NO_ENCODER_FOUND, "textual": reasons.GOES_ROUND},
        since="5.23",
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
    Family(
        "video_llama_3",
        "VideoLlama3ForConditionalGeneration",
        video_llama_3,
        media=merged_patches,
        num_media_tokens=6,
    ),
    # An image and an audio in every sample. Vision attention claims is_causal: without a mask (no padded patch
    # anywhere in the batch) sdpa makes it causal but eager does not, so the crop has padding here. Vision features are
    # those of layer -2: without gradient are the last layer, norm and head, and the audio projection for samples
    # without an image.
    Family(
        "phi4_multimodal",
        "Phi4MultimodalForCausalLM",
        phi4_multimodal,
        media=crops_and_audio,
        num_media_tokens=10,
        before=(AUDIO, AUDIO, AUDIO),
        connector="its connector is a list of layers inside of the embedding",
        has_connector=False,
    ),
    # the encoder calls scaled_dot_product_attention itself, in blocks and with relative positions, under "eager" too;
    # dropout 0.1
    Family(
        "granite_speech",
        "GraniteSpeechForConditionalGeneration",
        granite_speech,
        num_media_tokens=4,
        media_token=IMAGE,
        media=lambda n: {
            "input_features": seeded(n, 8, 16),
            "input_features_mask": torch.ones(n, 4, dtype=torch.bool),
        },
        connector=reasons.QFORMER,
        has_connector=False,
        refused={"visual": reasons.NO_ENCODER_FOUND},
        without={"checkpointing": reasons.NO_CHECKPOINTING},
        since="5.23",
    ),
    Family(
        "glmasr",
        "GlmAsrForConditionalGeneration",
        glmasr,
        media=mel_with_mask,
        num_media_tokens=4,
        before=(START,),
        after=(END,),
    ),
    Family(
        "qwen3_asr",
        "Qwen3ASRForConditionalGeneration",
        qwen3_asr,
        media=padded_mel,
        num_media_tokens=4,
        before=(START,),
        after=(END,),
    ),
    # Adds an audio embedding to every text token, so audio (8 frames a token) and text are equally long, without
    # padding; generation wants a longer audio than forward takes (one for all tokens to come).
    Family(
        "voxtral_realtime",
        "VoxtralRealtimeForConditionalGeneration",
        voxtral_realtime,
        extra=without_padding,
        media=lambda n: {"input_features": seeded(n, 16, 80)},
        generates=False,
        without={"checkpointing": reasons.IN_PLACE},
    ),
    # dropout 0.1 in the text towers of altclip and chinese_clip
    Family(
        "altclip",
        "AltCLIPModel",
        altclip,
        media=one_image(),
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
        media=one_image(),
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
        media=one_image(),
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
        blip,
        media=one_image(),
        extra=without_padding,
        labels=None,
        generates=False,
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={"visual": reasons.GOES_ROUND, "textual": reasons.GOES_ROUND},
        without={"attention": reasons.NO_SDPA},
    ),
    Family(
        "deit",
        "DeiTForImageClassification",
        deit,
        media=one_image(),
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
        refused={"visual": reasons.GOES_ROUND, "textual": reasons.NO_DECODER_FOUND},
        since="5.23",
    ),
    # no sdpa: the attention is written out; patches are put in a random order in every forward (a permutation only)
    Family(
        "vilt",
        "ViltForQuestionAnswering",
        vilt,
        media=one_image(),
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
        media=one_image(),
        labels=None,
        generates=False,
        text=False,
        connector=reasons.NO_LANGUAGE_MODEL,
        has_connector=False,
        refused={"textual": reasons.NO_DECODER_FOUND},
    ),
]
