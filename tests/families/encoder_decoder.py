"""The text reads images or sounds by cross-attention, or has an encoder of its own."""

import torch
import transformers as tr

from . import reasons
from .parts import (
    ENCODER,
    END,
    FAKE_TOKEN,
    IDS,
    SPECIAL,
    START,
    TEXT,
    flattened_patches,
    one_image,
    pixels,
    text_sizes,
    vision,
)
from .spec import BOS, EOS, MEDIA_TOKEN, PAD, TEXT_IDS, VOCAB_SIZE, Family, seeded


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


def mllama():
    # the vision output is the last layer's next to that of the first
    return tr.MllamaConfig(
        vision_config=tr.MllamaVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=4,
            image_size=16,
            patch_size=8,
            max_num_tiles=2,
            supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
            intermediate_layers_indices=[0],
            vision_output_dim=64,
        ),
        text_config=tr.MllamaTextConfig(**text_sizes(num_hidden_layers=3, cross_attention_layers=[1])),
        image_token_index=MEDIA_TOKEN,
    )


def tiled_images(number):
    """The images of even samples fill two tiles side by side, those of odd samples one and leave one empty."""
    tiles = torch.tensor([[[1, 1]], [[1, 0]]])[torch.arange(number) % 2]
    return {
        "pixel_values": seeded(number, 1, 2, 3, 16, 16) * tiles[..., None, None, None],
        "aspect_ratio_ids": tiles.sum(-1),  # 1 is 1x1, 2 is 1x2
        "aspect_ratio_mask": tiles,
    }


def cross_attention_mask(inputs):
    """Text from the image on attends to the tiles in use."""
    behind = (inputs["input_ids"] == MEDIA_TOKEN).cumsum(1)
    return {"cross_attention_mask": behind[:, :, None, None] * inputs["aspect_ratio_mask"][:, None]}


def text_ids(n: int, length: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(*TEXT_IDS, (n, length), generator=torch.Generator().manual_seed(seed))


def florence2():
    return tr.Florence2Config(
        vision_config=tr.Florence2VisionConfig(
            depths=(1, 1),
            patch_size=(7, 3),
            patch_stride=(4, 2),
            patch_padding=(3, 1),
            patch_prenorm=(False, True),
            embed_dim=(32, 32),
            num_heads=(4, 4),
            num_groups=(4, 4),
            window_size=2,
            projection_dim=48,
            max_position_embeddings=8,
        ),
        text_config=tr.BartConfig(
            d_model=48,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=128,
            decoder_start_token_id=EOS,
            forced_eos_token_id=None,
            **IDS,
        ),
        image_token_id=MEDIA_TOKEN,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def vision_encoder_decoder(decoder, **encoder):
    return tr.VisionEncoderDecoderConfig(
        encoder=tr.ViTConfig(**ENCODER, image_size=16, patch_size=8, **encoder),
        decoder=decoder,
        decoder_start_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def trocr():
    """As TrOCR: no biases in the encoder's qkv, cross-attention keys and values from the encoder's hidden size."""
    return vision_encoder_decoder(
        tr.TrOCRConfig(
            d_model=48,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=64,
            max_position_embeddings=128,
            cross_attention_hidden_size=32,
            is_decoder=True,
            add_cross_attention=True,
            decoder_start_token_id=EOS,
            **IDS,
        ),
        qkv_bias=False,
    )


def vit_gpt2():
    return vision_encoder_decoder(
        tr.GPT2Config(
            n_embd=48,
            n_layer=2,
            n_head=4,
            n_positions=128,
            is_decoder=True,
            add_cross_attention=True,
            **IDS,
        )
    )


def captioned(n: int) -> dict[str, torch.Tensor]:
    start = torch.full((n, 1), EOS)
    return {**pixels(n), "decoder_input_ids": torch.cat([start, text_ids(n, 7)], dim=1)}


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
        **SPECIAL,
    )


def blip():
    return tr.BlipConfig(
        vision_config=dict(**ENCODER, image_size=16, patch_size=8),
        text_config=dict(
            vocab_size=VOCAB_SIZE,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            sep_token_id=EOS,
            **SPECIAL,
        ),
    )


def pi0():
    gemma = dict(TEXT, head_dim=16, num_key_value_heads=1)
    return tr.PI0Config(
        vlm_config=tr.PaliGemmaConfig(
            vision_config=tr.SiglipVisionConfig(**ENCODER, image_size=16, patch_size=8, vision_use_head=False),
            text_config=tr.GemmaConfig(**gemma),
            projection_dim=48,
            image_token_id=MEDIA_TOKEN,
        ),
        dit_config=tr.GemmaConfig(**{**gemma, "hidden_size": 32}),
        chunk_size=5,
        max_state_dim=6,
        max_action_dim=6,
    )


def robot(n):
    """One camera, the robot's state, and a noised chunk of actions at a given time."""
    return {
        "pixel_values": seeded(n, 1, 3, 16, 16),
        "pixel_attention_mask": torch.ones(n, 1, dtype=torch.bool),
        "state": seeded(n, 6, seed=4),
        "noise": seeded(n, 5, 6, seed=5),
        "actions": seeded(n, 5, 6, seed=6),
        "timestep": torch.linspace(0.3, 0.7, n),
    }


def pix2struct():
    return tr.Pix2StructConfig(
        vision_config=tr.Pix2StructVisionConfig(
            hidden_size=32,
            patch_embed_hidden_size=48,
            d_ff=48,
            d_kv=8,
            num_hidden_layers=2,
            num_attention_heads=4,
            seq_len=8,
        ),
        text_config=tr.Pix2StructTextConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=PAD,
            eos_token_id=EOS,
            decoder_start_token_id=PAD,
        ),
    )


def decoder_words(n, start):
    """What the decoder of an encoder-decoder model reads, and what it is to say."""
    labels = torch.randint(3, 80, (n, 6), generator=torch.Generator().manual_seed(5))
    return {"decoder_input_ids": torch.cat([torch.full((n, 1), start), labels[:, :-1]], 1), "labels": labels}


def document(n):
    mask = torch.tensor([[1.0] * 6 + [0.0]] * n)
    return {"flattened_patches": flattened_patches(n), "attention_mask": mask, **decoder_words(n, PAD)}


def pp_formulanet():
    return tr.PPFormulaNetConfig(
        vision_config=tr.PPFormulaNetVisionConfig(
            **{**ENCODER, "intermediate_size": 48},
            mlp_dim=48,
            output_channels=24,
            image_size=32,
            patch_size=4,
            window_size=3,
            global_attn_indexes=[1],
            post_conv_in_channels=24,
            post_conv_mid_channels=24,
            post_conv_out_channels=32,
            decoder_hidden_size=32,
        ),
        text_config=tr.PPFormulaNetTextConfig(
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=64,
            d_model=32,
            encoder_layers=2,
            encoder_attention_heads=4,
            decoder_layers=2,
            decoder_ffn_dim=48,
            decoder_attention_heads=4,
            dropout=0.0,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            decoder_start_token_id=EOS,
        ),
    )


def formula(n):
    return {"pixel_values": seeded(n, 3, 32, 32), **decoder_words(n, EOS)}


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


def t5gemma2():
    decoder = text_sizes(
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


FAMILIES = [
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
    # without cross_attention_mask, sdpa differs from eager: MllamaTextCrossAttention has no is_causal (default: True)
    Family("mllama", "MllamaForConditionalGeneration", mllama, tiled_images, 1, extra=cross_attention_mask),
    # Placeholders and text go to the BART encoder, the decoder's ids come from the labels; without labels the decoder
    # reads its start token only (logits of one position).
    # A padded row differs: BART's learned positions count the padding too.
    Family(
        "florence2",
        "Florence2ForConditionalGeneration",
        florence2,
        pixels,
        num_media_tokens=5,
        connector=reasons.NO_VISUAL,
        has_connector=False,
        refused={"visual": reasons.NOT_BEHIND_NORM},
        without={"padding": reasons.UNTUNED_PADDING},
    ),
    # The text is that of the decoder (decoder_input_ids). No gradient in the encoder's pooler, which is not used.
    Family(
        "vision-encoder-decoder",
        "VisionEncoderDecoderModel",
        vit_gpt2,
        captioned,
        text=False,
        labels=None,
        connector=reasons.CROSS_ATTENTION,
        has_connector=False,
        since="5.23",
    ),
    # No sdpa: TrOCR's attention is written out.
    Family(
        "vision-encoder-decoder-trocr",
        "VisionEncoderDecoderModel",
        trocr,
        captioned,
        text=False,
        labels=None,
        connector=reasons.CROSS_ATTENTION,
        has_connector=False,
        refused={"textual": reasons.NO_SELF_ATTENTION},
        without={"attention": reasons.NO_SDPA},
        since="5.23",
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
        media=pixels,
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={"visual": reasons.BYPASSES, "textual": reasons.BYPASSES},
        without={"attention": reasons.NO_SDPA, "padding": reasons.UNTUNED_PADDING},
    ),
    # a flow-matching policy: the loss is that of the actions, logits are velocities; no gradient in the last layer of
    # the vision-language model but for its keys and values, which the action expert attends to
    Family(
        "pi0",
        "PI0ForConditionalGeneration",
        pi0,
        media=robot,
        num_media_tokens=4,
        labels=None,
        generates=False,
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={"textual": reasons.NO_DECODER_FOUND},
        without={"checkpointing": reasons.FAILS},
    ),
    # attention_mask is that of the patches; the decoder's text is in media
    Family(
        "pix2struct",
        "Pix2StructForConditionalGeneration",
        pix2struct,
        media=document,
        text=False,
        labels=None,
        generates=False,
        connector=reasons.CROSS_ATTENTION,
        has_connector=False,
        refused={"textual": reasons.UNKNOWN_ARGUMENTS},
        without={"checkpointing": reasons.NO_CHECKPOINTING},
        since="5.23",
    ),
    # the decoder's text is in media; the encoder has an attention of its own (relative positions, always eager)
    Family(
        "pp_formulanet",
        "PPFormulaNetForConditionalGeneration",
        pp_formulanet,
        media=formula,
        text=False,
        labels=None,
        generates=False,
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={"visual": reasons.BYPASSES, "textual": reasons.NO_DECODER_FOUND},
        since="5.23",
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
        media=pixels,
        extra=boxes_and_decoder_text,
        connector=reasons.NO_TEXTUAL,
        has_connector=False,
        refused={"visual": reasons.NO_ENCODER_FOUND, "textual": reasons.BYPASSES},
        since="5.23",
    ),
]
