"""The Qwen-VL line: positions of text have three axes (M-RoPE)."""

import torch
import transformers as tr

from . import reasons
from .parts import (
    AUDIO,
    QWEN_MOE,
    QWEN_TOKENS,
    START,
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
from .spec import MEDIA_TOKEN, Family, seeded


def qwen_windowed_vision(**kwargs):
    # a window is 2x2 tokens, so that the 2x3 tokens of an image need two; the second of two layers sees all of it
    return dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        patch_size=4,
        spatial_merge_size=2,
        window_size=16,
        out_hidden_size=48,
        fullatt_block_indexes=[1],
        **kwargs,
    )


def qwen2_vl():
    return tr.Qwen2VLConfig(
        vision_config=tr.Qwen2VLVisionConfig(
            depth=2, embed_dim=32, hidden_size=48, mlp_ratio=2, num_heads=4, patch_size=4
        ),
        text_config=tr.Qwen2VLTextConfig(**text_sizes(rope_parameters=mrope(2, 2, 2))),
        **qwen_special_tokens(),
    )


def colqwen2():
    return tr.ColQwen2Config(vlm_config=qwen2_vl(), embedding_dim=24)


def patches_by_image(inputs):
    """The patches of each image apart, as ColQwen2 takes them."""
    if "pixel_values" not in inputs:
        return inputs
    return {**inputs, "pixel_values": inputs["pixel_values"].unflatten(0, (len(inputs["image_grid_thw"]), -1))}


def qwen2_5_vl():
    return tr.Qwen2_5_VLConfig(
        vision_config=tr.Qwen2_5_VLVisionConfig(**qwen_windowed_vision(tokens_per_second=2)),
        text_config=tr.Qwen2_5_VLTextConfig(**text_sizes(rope_parameters=mrope(2, 2, 2))),
        **qwen_special_tokens(),
    )


def qwen3_vl():
    # the first two vision layers also feed the language model's first two layers (deepstack)
    return tr.Qwen3VLConfig(
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
            **text_sizes(num_hidden_layers=3, head_dim=16, rope_parameters=mrope(4, 2, 2, mrope_interleaved=True))
        ),
        **qwen_special_tokens(),
    )


def qwen2_5_omni_thinker():
    return tr.Qwen2_5OmniThinkerConfig(
        audio_config=tr.Qwen2_5OmniAudioEncoderConfig(
            num_mel_bins=8,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=48,
            d_model=32,
            max_source_positions=32,
            n_window=4,
            output_dim=48,
        ),
        vision_config=tr.Qwen2_5OmniVisionEncoderConfig(**qwen_windowed_vision()),
        text_config=tr.Qwen2_5OmniTextConfig(**text_sizes(rope_parameters=mrope(2, 2, 2), tie_word_embeddings=False)),
        image_token_index=MEDIA_TOKEN,
        video_token_index=93,
        audio_token_index=92,
        audio_start_token_id=90,
        audio_end_token_id=91,
        vision_start_token_id=95,
        vision_end_token_id=96,
    )


def images_and_sounds(number):
    """Per sample one image and one sound of 16 frames, which the audio tower sees in two chunks and makes 4 tokens."""
    return {
        **qwen_images(number),
        "input_features": seeded(number, 8, 16, seed=4),
        "feature_attention_mask": torch.ones(number, 16, dtype=torch.long),
    }


def qwen3_omni_moe_thinker():
    return tr.Qwen3OmniMoeThinkerConfig(
        text_config=text_sizes(
            **QWEN_MOE, num_hidden_layers=3, mlp_only_layers=[1], rope_parameters=interleaved_mrope(2, 2, 2)
        ),
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
        text_config=text_sizes(
            **QWEN_MOE, num_hidden_layers=3, mlp_only_layers=[1], rope_parameters=interleaved_mrope(2, 2, 2)
        ),
        vision_config=qwen_vision(depth=3, deepstack_visual_indexes=[0, 1]),
        **QWEN_TOKENS,
    )


FAMILIES = [
    Family(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        qwen2_vl,
        qwen_images,
        6,
        **WRAPPED,
        extra=mm_token_types,
        connector=4,
    ),
    # Retrieval: an embedding of length 1 for each token.
    Family(
        "colqwen2",
        "ColQwen2ForRetrieval",
        colqwen2,
        qwen_images,
        6,
        **WRAPPED,
        extra=mm_token_types,
        pack=patches_by_image,
        labels=None,
        generates=False,
        connector=4,
        without={"checkpointing": reasons.NO_CHECKPOINTING},
    ),
    Family(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        qwen2_5_vl,
        qwen_images,
        6,
        **WRAPPED,
        extra=mm_token_types,
        connector=4,
    ),
    Family(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        qwen3_vl,
        qwen_images,
        6,
        **WRAPPED,
        extra=mm_token_types,
        connector=4,
    ),
    # no gradient in audio_tower.audio_bos_eos_token: the forward never reads it
    Family(
        "qwen2_5_omni_thinker",
        "Qwen2_5OmniThinkerForConditionalGeneration",
        qwen2_5_omni_thinker,
        images_and_sounds,
        6,
        before=(90, *[92] * 4, 91, 95),
        after=(96,),
        connector=4,
        since="5.23",
    ),
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
]
