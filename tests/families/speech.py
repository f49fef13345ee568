"""
Tiny models of families that hear, and write text.

Not here: qwen2_5_omni and qwen3_omni_moe as a whole have no forward pass. What is tuned is their thinker.
"""

import torch
import transformers as tr

from . import reasons
from .spec import BOS, EOS, MEDIA_TOKEN, PAD, VOCAB_SIZE, Family, seeded


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
AUDIO_START, AUDIO_END = 96, 97


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
        audio_bos_token_id=AUDIO_START,
        audio_eos_token_id=AUDIO_END,
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
        audio_bos_token_id=AUDIO_START,
        audio_eos_token_id=AUDIO_END,
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
        before=(AUDIO_START,),
        after=(AUDIO_END,),
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
        before=(AUDIO_START,),
        after=(AUDIO_END,),
        connector=reasons.NO_VISUAL,
        has_connector=False,
        refused={"visual": reasons.NO_ENCODER_FOUND},
        without={"attention": reasons.EAGER_TOKENIZER},
        since="5.19",
    ),
]
