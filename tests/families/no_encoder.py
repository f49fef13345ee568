"""What stands in front of the language model has no self-attention that prompts could act in."""

import torch
import transformers as tr
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from . import reasons
from .parts import AROUND, END, START, TEXT, mm_token_types, pixels
from .spec import MEDIA_TOKEN, TEXT_IDS, Family, seeded


# The tower of gemma3n as released (MobileNetV5) is a model of timm, which is not installed. This stands in for it.
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
            **TEXT,
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


def chameleon():
    return tr.ChameleonConfig(
        **TEXT,
        vq_config=tr.ChameleonVQVAEConfig(
            embed_dim=16,
            num_embeddings=10,
            latent_channels=16,
            resolution=16,
            base_channels=32,
            channel_multiplier=(1, 1, 1, 1),
            num_res_blocks=1,
        ),
        # the names of image tokens spell their number in letters: A is 0, B is 1, ...
        vocabulary_map={"<image>": MEDIA_TOKEN, **{f"IMGIMG{digit}Z": 80 + i for i, digit in enumerate("ABCDEFGHIJ")}},
    )


def got_ocr2():
    return tr.GotOcr2Config(
        vision_config={
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 2,
            "window_size": 3,
            "global_attn_indexes": [1],
            "mlp_dim": 48,
        },
        text_config=tr.Qwen2Config(**TEXT),
        image_token_index=MEDIA_TOKEN,
        image_seq_length=4,
    )


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
        audio_token_id=97,
        image_token_offset=TEXT_IDS[1],
        audio_token_offset=TEXT_IDS[1] + 8,
    )


FAMILIES = [
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
    # No gradient in the VQ model: its image tokens are the argmin over the code book, only their embeddings are used.
    # The logits of the ten image tokens are the lowest number of the type (their squares are infinite).
    Family(
        "chameleon",
        "ChameleonForConditionalGeneration",
        chameleon,
        pixels,
        num_media_tokens=4,
        **AROUND,
        connector=reasons.NO_VISUAL,
        has_connector=False,
        refused={"visual": reasons.NO_ENCODER_FOUND},
    ),
    # No sdpa: the vision attention (windows, decomposed relative positions as in SAM) is written out.
    Family(
        "got_ocr2",
        "GotOcr2ForConditionalGeneration",
        got_ocr2,
        pixels,
        num_media_tokens=4,
        **AROUND,
        connector=reasons.NO_VISUAL,
        has_connector=False,
        refused={"visual": reasons.BYPASSES},
        without={"attention": reasons.NO_SDPA},
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
    # reads proteins, not images: its "media" are protein_input_ids (with right padding of their own)
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
]
