"""Tiny models of the families that came with transformers 5.24."""

import torch
import transformers as tr

from . import reasons
from .spec import BOS, EOS, MEDIA_TOKEN, PAD, SEES_ALL, TEXT_IDS, VOCAB_SIZE, Family, seeded


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
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
AUDIO_TOKEN, VIDEO_TOKEN = 97, 96


def apertus1p5():
    """Images are 6 of 8 codes, which are token ids; so would be sounds."""
    return tr.Apertus1p5Config(
        vision_config=tr.Apertus1p5VisionTokenizerConfig(
            codebook_size=8,
            embed_dim=8,
            latent_channels=8,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            attn_resolutions=[],
            resolution=8,
        ),
        audio_config=tr.WavTokenizerEncoderConfig(
            num_filters=4,
            upsampling_ratios=[2, 2],
            num_lstm_layers=1,
            hidden_size=16,
            codebook_size=4,
            codebook_dim=16,
            decoder_hidden_size=32,
        ),
        text_config=tr.Apertus1p5TextConfig(**TEXT, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        image_token_id=MEDIA_TOKEN,
        audio_token_id=AUDIO_TOKEN,
        image_token_offset=TEXT_IDS[1],
        audio_token_offset=TEXT_IDS[1] + 8,
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
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
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
        video_token_id=VIDEO_TOKEN,
    )


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


def omniasr_audio():
    """A frame of 8 samples is a token."""
    return tr.OmniASRAudioConfig(
        **ENCODER,
        conv_dim=[32, 32],
        conv_kernel=[4, 2],
        conv_stride=[4, 2],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )


def omniasr():
    return tr.OmniASRConfig(
        audio_config=omniasr_audio(),
        text_config=tr.LlamaConfig(**TEXT),
        audio_token_id=MEDIA_TOKEN,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def omniasr_ctc():
    return tr.OmniASRCTCConfig(audio_config=omniasr_audio(), vocab_size=VOCAB_SIZE)


def waves(n):
    return {"input_values": seeded(n, 1, 32), "padding_mask": torch.ones(n, 32, dtype=torch.long)}


FAMILIES = [
    Family(
        "apertus1p5",
        "Apertus1p5ForConditionalGeneration",
        apertus1p5,
        media=lambda n: {"pixel_values": seeded(n, 3, 4, 6), "image_sizes": torch.tensor([[4, 6]] * n)},
        num_media_tokens=6,
        connector=reasons.NO_VISUAL,
        has_connector=False,
        refused={"visual": reasons.NO_ENCODER_FOUND},
        without={"attention": reasons.EAGER_TOKENIZER},
        since="5.24.0",
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
    Family(
        "omniasr",
        "OmniASRForConditionalGeneration",
        omniasr,
        media=waves,
        num_media_tokens=4,
        since="5.24.0",
    ),
    Family(
        "omniasr_ctc",
        "OmniASRForCTC",
        omniasr_ctc,
        media=waves,
        labels=None,
        generates=False,
        text=False,
        connector=reasons.NO_LANGUAGE_MODEL,
        has_connector=False,
        refused={"textual": reasons.NO_DECODER_FOUND},
        since="5.24.0",
    ),
]
