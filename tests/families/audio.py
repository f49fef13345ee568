"""Families that hear."""

import torch
import transformers as tr

from . import reasons
from .parts import (
    AUDIO,
    ENCODER,
    END,
    IDS,
    OTHER_TOKEN,
    START,
    TEXT,
    VIDEO,
    text_sizes,
    vision,
    without_padding,
)
from .spec import BOS, EOS, MEDIA_TOKEN, PAD, VOCAB_SIZE, Family, seeded


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


def phi4_multimodal():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0] * 6,
        "long_factor": [1.5] * 6,
    }
    return tr.Phi4MultimodalConfig(
        **text_sizes(hidden_size=64),
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


def granite_speech():
    return tr.GraniteSpeechConfig(
        text_config=dict(model_type="granite", **text_sizes()),
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
        audio_token_index=OTHER_TOKEN,
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
        text_config=dict(model_type="llama", **text_sizes(head_dim=12)),
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
        text_config=dict(model_type="qwen3", **text_sizes(head_dim=12)),
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
        text_config=dict(model_type="voxtral_realtime_text", **text_sizes(head_dim=12, sliding_window=6)),
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


def flamingo_encoder():
    """4 frames are a token."""
    return tr.AudioFlamingo3EncoderConfig(**ENCODER, num_mel_bins=8, max_source_positions=16)


def audioflamingo3():
    return tr.AudioFlamingo3Config(
        audio_config=flamingo_encoder(), text_config=tr.Qwen2Config(**TEXT), audio_token_id=MEDIA_TOKEN
    )


def musicflamingo():
    return tr.MusicFlamingoConfig(
        audio_config=flamingo_encoder(),
        text_config=tr.Qwen2Config(**TEXT),
        audio_token_id=MEDIA_TOKEN,
        audio_bos_token_id=96,
        audio_eos_token_id=97,
        rope_parameters={"rope_type": "default", "rope_theta": 1200.0, "partial_rotary_factor": 0.25},
    )


def fun_asr_nano():
    return tr.FunAsrNanoConfig(
        audio_config=tr.FunAsrNanoEncoderConfig(
            **{**ENCODER, "num_hidden_layers": 3},
            num_mel_bins=4,
            num_stacked_frames=2,
            num_timestamp_prediction_layers=1,
            fsmn_kernel_size=3,
            max_position_embeddings=16,
        ),
        adaptor_config=tr.FunAsrNanoAdaptorConfig(
            hidden_size=48,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=4,
            projector_hidden_size=32,
        ),
        text_config=tr.Qwen3Config(**TEXT, head_dim=12),
        audio_token_id=MEDIA_TOKEN,
        tie_word_embeddings=False,
    )


def granite_speech_plus():
    """The first layer's output and the last's stand side by side in front of the projector."""
    return tr.GraniteSpeechPlusConfig(
        text_config=tr.GraniteConfig(**TEXT),
        encoder_config=tr.GraniteSpeechPlusEncoderConfig(
            input_dim=16,
            num_layers=2,
            hidden_dim=32,
            feedforward_mult=2,
            num_heads=4,
            output_dim=12,
            context_size=5,
            max_pos_emb=8,
            conv_kernel_size=3,
            cat_hidden_layers=[0],
        ),
        projector_config=tr.Blip2QFormerConfig(
            **ENCODER, encoder_hidden_size=64, cross_attention_frequency=1, vocab_size=VOCAB_SIZE
        ),
        audio_token_index=MEDIA_TOKEN,
        downsample_rate=2,
        window_size=4,
        has_lora_adapter=False,
    )


def kyutai_speech_to_text():
    """An id of a word and ids of two codebooks make one token; 8 samples are a frame."""
    return tr.KyutaiSpeechToTextConfig(
        **IDS,
        hidden_size=48,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=6,
        num_codebooks=2,
        codebook_vocab_size=9,
        audio_bos_token_id=8,
        audio_pad_token_id=VOCAB_SIZE + 2 * 9,
        codec_config=tr.MimiConfig(
            sampling_rate=100,
            hidden_size=32,
            num_filters=4,
            upsampling_ratios=[2, 2],
            codebook_size=8,
            codebook_dim=16,
            num_quantizers=2,
            vector_quantization_hidden_dimension=16,
            upsample_groups=32,
            num_hidden_layers=1,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=4,
            sliding_window=16,
            frame_rate=12.5,
        ),
    )


def moss_transcribe_diarize():
    """8 frames are a token."""
    return tr.MossTranscribeDiarizeConfig(
        audio_config=tr.MossTranscribeDiarizeAudioConfig(**ENCODER, num_mel_bins=8, max_source_positions=16),
        text_config=tr.Qwen3Config(**TEXT, head_dim=12),
        audio_token_id=MEDIA_TOKEN,
        audio_chunk_size=64,
        tie_word_embeddings=False,
    )


def nemo_speechlm():
    """4 frames are a token. In the language model, attention is the third of four layers."""
    diarization = {"num_speakers": 2, "subsampling_factor": 4}
    return tr.Nemotron3_5TranscribeConfig(
        audio_config=tr.Nemotron3_5TranscribeAudioConfig(
            asr_config=tr.Nemotron3_5TranscribeAsrAudioConfig(**ENCODER, num_mel_bins=8, subsampling_factor=4),
            diarization_config=tr.Nemotron3DiarizationConfig(
                audio_config=tr.Nemotron3DiarizationAudioConfig(**ENCODER, num_mel_bins=8, subsampling_factor=4),
                head_config=tr.Nemotron3DiarizationHeadConfig(**diarization, hidden_size=16, audio_hidden_size=32),
                streaming_config=tr.Nemotron3DiarizationStreamingConfig(**diarization, speaker_cache_length=8),
            ),
        ),
        word_timestamp_config=tr.Nemotron3_5TranscribeWordTimestampConfig(
            **{**ENCODER, "num_hidden_layers": 1}, vocab_size=10, blank_token_id=9
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
        audio_token_id=MEDIA_TOKEN,
    )


def vibevoice_asr():
    """4 samples are a token. The model would add noise to its latents."""
    sizes = {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1], "vae_std": 0.0}
    return tr.VibeVoiceAsrConfig(
        acoustic_tokenizer_encoder_config=tr.VibeVoiceAcousticTokenizerEncoderConfig(**sizes, hidden_size=32),
        semantic_tokenizer_encoder_config=tr.VibeVoiceAcousticTokenizerEncoderConfig(**sizes, hidden_size=24),
        text_config=tr.Qwen2Config(**TEXT),
        audio_token_id=MEDIA_TOKEN,
        audio_bos_token_id=96,
        audio_eos_token_id=97,
        acoustic_tokenizer_chunk_size=16,
    )


def mel(n):
    return {"input_features": seeded(n, 8, 32), "input_features_mask": torch.ones(n, 32, dtype=torch.long)}


def codes(inputs):
    """Each word with the codes of a frame of sound."""
    ids = inputs["input_ids"]
    of_sound = torch.randint(8, (*ids.shape, 2), generator=torch.Generator().manual_seed(2))
    of_sound[:, 0] = 8
    return {"input_ids": torch.cat([ids[..., None], of_sound], dim=-1)}


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
        media_token=OTHER_TOKEN,
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
    Family(
        "audioflamingo3",
        "AudioFlamingo3ForConditionalGeneration",
        audioflamingo3,
        media=mel,
        num_media_tokens=8,
    ),
    Family(
        "musicflamingo",
        "MusicFlamingoForConditionalGeneration",
        musicflamingo,
        media=mel,
        num_media_tokens=8,
        before=(96,),
        after=(97,),
    ),
    Family(
        "fun_asr_nano",
        "FunAsrNanoForConditionalGeneration",
        fun_asr_nano,
        media=lambda n: {"input_features": seeded(n, 6, 8), "input_features_mask": torch.ones(n, 6, dtype=torch.long)},
        num_media_tokens=6,
        connector=reasons.NO_VISUAL,
        refused={"visual": reasons.MIXES},
    ),
    Family(
        "granite_speech_plus",
        "GraniteSpeechPlusForConditionalGeneration",
        granite_speech_plus,
        media=lambda n: {
            "input_features": seeded(n, 8, 16),
            "input_features_mask": torch.ones(n, 4, dtype=torch.bool),
        },
        num_media_tokens=4,
        connector=reasons.QFORMER,
        has_connector=False,
        refused={"visual": reasons.NO_ENCODER_FOUND},
        without={"checkpointing": reasons.NO_CHECKPOINTING},
        since="5.19",
    ),
    Family(
        "kyutai_speech_to_text",
        "KyutaiSpeechToTextForConditionalGeneration",
        kyutai_speech_to_text,
        media=lambda n: {},
        extra=codes,
        labels=None,
        generates=False,
        connector=reasons.NO_VISUAL,
        has_connector=False,
        refused={"visual": reasons.NO_ENCODER_FOUND},
        since="5.19",
    ),
    Family(
        "moss_transcribe_diarize",
        "MossTranscribeDiarizeForConditionalGeneration",
        moss_transcribe_diarize,
        media=lambda n: {**mel(n), "padding_mask": torch.ones(n, 64, dtype=torch.long)},
        num_media_tokens=4,
    ),
    # no prompts in the diarization model, which stands beside the encoder and says only who speaks
    Family(
        "nemo_speechlm",
        "Nemotron3_5TranscribeForConditionalGeneration",
        nemo_speechlm,
        media=lambda n: {
            "input_features": seeded(n, 32, 8),
            "input_features_mask": torch.ones(n, 32, dtype=torch.long),
        },
        num_media_tokens=8,
        without={"generation": reasons.UNTUNED_CACHE},
    ),
    Family(
        "vibevoice_asr",
        "VibeVoiceAsrForConditionalGeneration",
        vibevoice_asr,
        media=lambda n: {"input_values": seeded(n, 1, 16), "padding_mask": torch.ones(n, 16, dtype=torch.bool)},
        num_media_tokens=4,
        before=(96,),
        after=(97,),
        connector=reasons.NO_VISUAL,
        has_connector=False,
        refused={"visual": reasons.NO_ENCODER_FOUND},
        without={"attention": reasons.EAGER_TOKENIZER},
        since="5.19",
    ),
]
