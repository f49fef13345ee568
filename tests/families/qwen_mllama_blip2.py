"""Tiny models: the Qwen-VL line, InternVL, Mistral 3, Llama vision, the BLIP-2 line and Cohere vision."""

import torch
import transformers as tr

from . import reasons
from .spec import BOS, EOS, MEDIA_TOKEN, PAD, VOCAB_SIZE, Family, seeded


AUDIO_START, AUDIO_END, AUDIO_TOKEN = 90, 91, 92
VIDEO_TOKEN = 93
IMAGE_START, IMAGE_END = 95, 96

SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def text_sizes(**kwargs):
    """The sizes that nearly all the language models here name alike."""
    sizes = dict(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=128,
        **SPECIAL,
    )
    return {**sizes, **kwargs}


def vit_sizes(**kwargs):
    """A vision tower that sees 16x16 images as 4x4 patches."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    return {**sizes, **kwargs}


def square_images(number):
    return {"pixel_values": seeded(number, 3, 16, 16)}


# Qwen: patches come flattened (channels x 2 frames x 4 x 4), 4 rows and 6 columns of them; 2x2 make one token.
GRID = [1, 4, 6]


def qwen_images(number):
    return {
        "pixel_values": seeded(number * 24, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([GRID] * number),
    }


def qwen_token_types(inputs):
    return {"mm_token_type_ids": (inputs["input_ids"] == MEDIA_TOKEN).long()}


def qwen_special_tokens():
    return {
        "image_token_id": MEDIA_TOKEN,
        "video_token_id": VIDEO_TOKEN,
        "vision_start_token_id": IMAGE_START,
        "vision_end_token_id": IMAGE_END,
    }


def qwen_rope(*mrope_section, **kwargs):
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(mrope_section), **kwargs}


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
        text_config=tr.Qwen2VLTextConfig(**text_sizes(rope_parameters=qwen_rope(2, 2, 2))),
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
        text_config=tr.Qwen2_5_VLTextConfig(**text_sizes(rope_parameters=qwen_rope(2, 2, 2))),
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
            **text_sizes(num_hidden_layers=3, head_dim=16, rope_parameters=qwen_rope(4, 2, 2, mrope_interleaved=True))
        ),
        **qwen_special_tokens(),
    )


def qwen3_5():
    return tr.Qwen3_5Config(
        vision_config=tr.Qwen3_5VisionConfig(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=4,
            patch_size=4,
            out_hidden_size=48,
            num_position_embeddings=16,
        ),
        text_config=tr.Qwen3_5TextConfig(
            **text_sizes(
                num_hidden_layers=3,
                head_dim=32,
                layer_types=["linear_attention", "linear_attention", "full_attention"],
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                rope_parameters=qwen_rope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.25),
            )
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
        text_config=tr.Qwen2_5OmniTextConfig(
            **text_sizes(rope_parameters=qwen_rope(2, 2, 2), tie_word_embeddings=False)
        ),
        image_token_index=MEDIA_TOKEN,
        video_token_index=VIDEO_TOKEN,
        audio_token_index=AUDIO_TOKEN,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
    )


def images_and_sounds(number):
    """Per sample one image and one sound of 16 frames, which the audio tower sees in two chunks and makes 4 tokens."""
    return {
        **qwen_images(number),
        "input_features": seeded(number, 8, 16, seed=4),
        "feature_attention_mask": torch.ones(number, 16, dtype=torch.long),
    }


def internvl():
    return tr.InternVLConfig(
        vision_config=tr.InternVLVisionConfig(**vit_sizes(attention_bias=True)),
        text_config=tr.Qwen2Config(**text_sizes()),
        image_token_id=MEDIA_TOKEN,
        image_seq_length=4,
    )


def mistral3():
    return tr.Mistral3Config(
        vision_config=tr.PixtralVisionConfig(**vit_sizes(image_size=24)),
        text_config=tr.MistralConfig(**text_sizes(head_dim=16, sliding_window=None)),
        image_token_index=MEDIA_TOKEN,
    )


def padded_images(number):
    """Images of 16x24 padded to 24x24."""
    return {"pixel_values": seeded(number, 3, 24, 24), "image_sizes": torch.tensor([[16, 24]] * number)}


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
        boi_token_index=IMAGE_START,
        eoi_token_index=IMAGE_END,
    )


def qformer_sizes():
    # cross-attention in the first of the two layers
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 32,
        "cross_attention_frequency": 2,
    }


def blip2():
    return tr.Blip2Config(
        vision_config=tr.Blip2VisionConfig(**vit_sizes(patch_size=8)),
        qformer_config=tr.Blip2QFormerConfig(**qformer_sizes()),
        text_config=tr.OPTConfig(
            hidden_size=48,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=128,
            word_embed_proj_dim=48,
            **SPECIAL,
        ),
        num_query_tokens=4,
        image_token_index=MEDIA_TOKEN,
    )


def instructblip():
    return tr.InstructBlipConfig(
        vision_config=tr.InstructBlipVisionConfig(**vit_sizes(patch_size=8)),
        qformer_config=tr.InstructBlipQFormerConfig(**qformer_sizes()),
        text_config=tr.LlamaConfig(**text_sizes()),
        num_query_tokens=4,
        image_token_index=MEDIA_TOKEN,
    )


def images_and_instructions(number):
    """The Q-Former reads the instruction too, in its own tokens, padded on the right (every second one is shorter)."""
    instructions = torch.randint(3, 80, (number, 5), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(instructions)
    mask[1::2, 3:] = 0
    return {**square_images(number), "qformer_input_ids": instructions * mask, "qformer_attention_mask": mask}


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


WRAPPED = {"before": (IMAGE_START,), "after": (IMAGE_END,)}

FAMILIES = [
    Family(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        qwen2_vl,
        qwen_images,
        6,
        **WRAPPED,
        extra=qwen_token_types,
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
        extra=qwen_token_types,
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
        extra=qwen_token_types,
        connector=4,
    ),
    Family(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        qwen3_vl,
        qwen_images,
        6,
        **WRAPPED,
        extra=qwen_token_types,
        connector=4,
    ),
    Family(
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        qwen3_5,
        qwen_images,
        6,
        **WRAPPED,
        extra=qwen_token_types,
        connector=4,
    ),
    # no gradient in audio_tower.audio_bos_eos_token: the forward never reads it
    Family(
        "qwen2_5_omni_thinker",
        "Qwen2_5OmniThinkerForConditionalGeneration",
        qwen2_5_omni_thinker,
        images_and_sounds,
        6,
        before=(AUDIO_START, *[AUDIO_TOKEN] * 4, AUDIO_END, IMAGE_START),
        after=(IMAGE_END,),
        connector=4,
        since="5.23",
    ),
    Family("internvl", "InternVLForConditionalGeneration", internvl, square_images, 4, **WRAPPED),
    # the row-break tokens its processor puts between rows of placeholders are left out (placeholders in one run)
    Family(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        mistral3,
        padded_images,
        6,
        after=(IMAGE_END,),
        connector=reasons.BY_SIZE,
    ),
    # without cross_attention_mask, sdpa differs from eager: MllamaTextCrossAttention has no is_causal (default: True)
    Family("mllama", "MllamaForConditionalGeneration", mllama, tiled_images, 1, extra=cross_attention_mask),
    Family(
        "llama4",
        "Llama4ForConditionalGeneration",
        llama4,
        square_images,
        4,
        **WRAPPED,
        without={"checkpointing": reasons.BY_KEYWORD},
        fails_in={"5.24.0": reasons.NO_IMAGE_OUTPUTS},
    ),
    Family(
        "blip-2",
        "Blip2ForConditionalGeneration",
        blip2,
        square_images,
        4,
        connector=reasons.QFORMER,
        has_connector=False,
        since="5.23",
    ),
    # no gradient in the MLP for text in the Q-Former's last layer: its outputs at the text are thrown away
    Family(
        "instructblip",
        "InstructBlipForConditionalGeneration",
        instructblip,
        images_and_instructions,
        4,
        connector=reasons.QFORMER,
        has_connector=False,
        since="5.23",
    ),
    # no gradient in vision_tower.post_layernorm: the features are hidden_states[-1], taken before it
    Family(
        "aya_vision",
        "AyaVisionForConditionalGeneration",
        aya_vision,
        square_images,
        4,
        **WRAPPED,
        connector=4,
    ),
    Family(
        "cohere2_vision",
        "Cohere2VisionForConditionalGeneration",
        cohere2_vision,
        square_images,
        4,
        **WRAPPED,
        connector=4,
    ),
]
